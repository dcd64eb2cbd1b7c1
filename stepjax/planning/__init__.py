"""What a run would need and cost on a TPU that is not here: the real compiler is asked, no device is."""
