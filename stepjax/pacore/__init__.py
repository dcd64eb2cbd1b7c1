"""PaCoRe: rounds of parallel trajectories, compacted into messages that guide the next round (arXiv 2601.05593)."""
