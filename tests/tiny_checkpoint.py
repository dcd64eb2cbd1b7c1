"""The tiny checkpoint of the tests, with as many embeddings as the demo tokenizer has ids."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from stepjax.processing.tokenizer import load_tokenizer

TINY = Path(__file__).parent / "data" / "tiny_vl"


def write_tiny_checkpoint(directory: Path) -> Path:
    tokenizer = load_tokenizer("demo")
    config = json.loads((TINY / "config.json").read_text())
    old, new = config["text_config"]["vocab_size"], tokenizer.vocab_size
    config["text_config"]["vocab_size"] = new
    config["image_token_id"] = tokenizer.special("<im_patch>")
    tensors = load_file(TINY / "model.safetensors")
    rng = np.random.default_rng(0)
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and len(tensor) == old and ("embed" in name or "lm_head" in name):
            rows = rng.standard_normal((new - old, tensor.shape[1])) * tensor.astype(np.float32).std()
            tensors[name] = np.concatenate([tensor, rows.astype(tensor.dtype)])
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    tokenizer.save(directory / "tokenizer.json")
    return directory
