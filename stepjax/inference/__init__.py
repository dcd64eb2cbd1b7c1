"""Text from a model: prompts in, continuations out."""
