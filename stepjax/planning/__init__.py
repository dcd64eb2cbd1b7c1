"""Memory and time of a step on TPUs, compiled ahead of time for their topology; no TPU needed."""

from typing import Literal

StepKind = Literal["train", "score", "prefill", "decode"]  # explained in steps.py; here, so that it needs no JAX
