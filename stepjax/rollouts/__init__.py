"""Rollouts: what inference leaves and everything else reads, and how they are sampled."""
