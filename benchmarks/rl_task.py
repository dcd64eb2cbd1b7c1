"""The task of rl_vs_trl.py: prompts of one length and a cheap reward that random weights earn in part."""

import json
from pathlib import Path

import numpy as np

from stepjax.rewards.registry import Record, reward

NUM_PROMPTS = 512


@reward("share_of_digits")
def share_of_digits(record: Record, text: str) -> float:
    """The share of the text's characters that are digits, from 0 to 1."""
    return sum(character.isdigit() for character in text) / max(len(text), 1)


def write_prompts(path: Path, *, digits: int) -> None:
    """Questions of 11 + 2 * digits tokens each: the demo's tokenizer makes two of every " 7"."""
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for number in range(NUM_PROMPTS):
            question = "Add up: " + " ".join(map(str, rng.integers(0, 10, digits)))
            messages = [{"role": "user", "content": question}]
            record = {"id": str(number), "messages": messages, "verifier": "share_of_digits", "answer": "none"}
            file.write(json.dumps(record) + "\n")
