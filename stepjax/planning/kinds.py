"""The kinds of steps that can be planned; `work` says what each does. Apart from it, for it imports JAX."""

from typing import Literal, get_args

Kind = Literal["train", "score", "prefill", "decode"]
KINDS: tuple[Kind, ...] = get_args(Kind)
