"""What a step needs and how long it takes on TPUs, compiled ahead of time for their topology; no TPU needed."""

from typing import Literal

StepKind = Literal["train", "score", "prefill", "decode"]  # steps.py says what each does; it imports JAX, this does not
