"""Turns images and conversations into model inputs: image views, token ids, and their layout."""
