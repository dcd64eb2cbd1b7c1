"""From pictures and conversations to what the model reads: views of images, token ids, and their layout."""
