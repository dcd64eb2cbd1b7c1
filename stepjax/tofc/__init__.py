"""TOFC: a device encodes, merges and entropy-codes visual features; a server decodes and answers (arXiv 2503.12926)."""
