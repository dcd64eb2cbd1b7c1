"""The differences between the JAX versions we run on (0.10 to 0.12), in one place."""
