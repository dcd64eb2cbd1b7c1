"""Training: losses, the optimizer, the jitted step, the loop around it, checkpoints and metrics."""
