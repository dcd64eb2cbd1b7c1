"""Which part of the model an operation belongs to, by the `jax.named_scope`s in its name.

JAX names an operation by the scopes and transformations around it: `jit(train_step)/transpose(jvp(decoder))/while/body/
checkpoint/rematted_computation/attention/dot_general` is the decoder's attention, computed again for the backward pass.
"""

import re
from typing import Literal

Direction = Literal["forward", "recomputed", "backward"]

_TOWERS = {"encoder": "encoder", "decoder": "decoder"}
_BLOCKS = {"attention": "attention", "mlp": "MLP"}
_OTHERS = {"projector": "projector", "embed": "embedding", "loss": "loss", "optimizer": "optimizer"}

OTHER = "other"
COLLECTIVES = "collectives, exposed"
COPIES = "copies to and from vector memory, exposed"
# The order in which they are shown.
PARTS = (
    "encoder attention",
    "encoder MLP",
    "encoder, rest",
    "projector",
    "embedding",
    "decoder attention",
    "decoder MLP",
    "decoder, rest",
    "loss",
    "optimizer",
    OTHER,
    COPIES,
    COLLECTIVES,
)


def _scopes(op_name: str) -> list[str]:
    """The innermost name of every level: "transpose(jvp(decoder))" is "decoder"."""
    return [re.sub(r"^.*\(|\)+$", "", level) for level in op_name.split("/")]


def part_of(op_name: str) -> str:
    scopes = _scopes(op_name)
    for i, scope in enumerate(scopes):
        if scope in _TOWERS:
            block = next((_BLOCKS[inner] for inner in scopes[i + 1 :] if inner in _BLOCKS), None)
            return f"{_TOWERS[scope]} {block}" if block else f"{_TOWERS[scope]}, rest"
        if scope in _OTHERS:
            return _OTHERS[scope]
    return OTHER


def direction_of(op_name: str) -> Direction:
    if "rematted_computation" in op_name:
        return "recomputed"
    return "backward" if "transpose(" in op_name else "forward"
