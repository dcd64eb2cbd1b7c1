"""Post-training: reinforcement learning from rewards (`stepjax rl`)."""
