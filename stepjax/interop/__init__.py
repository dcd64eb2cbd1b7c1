"""The public checkpoint layout (Hugging Face safetensors) and ours, mapped both ways."""
