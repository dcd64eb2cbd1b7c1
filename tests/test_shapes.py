"""The shapes and dtypes of public functions are part of their signatures, and the tests run with them checked."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError
from shape_checks import SHAPES_CHECKED

from stepjax.models.attention import attend
from stepjax.processing.images import ImageViews
from stepjax.training.losses import cross_entropy_sum, next_tokens


def zeros(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


def loss(*arrays):
    return cross_entropy_sum(*arrays, z_loss=0.0, chunk=4)


@pytest.mark.parametrize(
    "call",
    [
        lambda: loss(zeros(2, 3, 4), zeros(5, 7), zeros(2, 3, dtype=jnp.int32), zeros(2, 3)),
        lambda: loss(zeros(2, 3, 4), zeros(4, 7), zeros(2, 4, dtype=jnp.int32), zeros(2, 3)),
        lambda: loss(zeros(2, 3, 4), zeros(4, 7), zeros(2, 3), zeros(2, 3)),
        lambda: next_tokens(zeros(2, 3, dtype=jnp.int32), zeros(2, 4)),
        lambda: attend(zeros(1, 2, 4, 8), zeros(1, 3, 2, 8), zeros(1, 3, 2, 8)),
        lambda: ImageViews(np.zeros((4, 5, 3), np.float32), np.zeros((0, 2, 2, 3), np.float32), plan=None),
    ],
    ids=["width", "length", "dtype", "weights", "keys", "pixels"],
)
def test_a_wrong_shape_or_dtype_is_refused(call):
    with pytest.raises(TypeCheckError, match="type"):
        call()


def test_a_wrong_shape_is_refused_while_jax_traces():
    with pytest.raises(TypeCheckError, match="weights"):
        jax.eval_shape(next_tokens, zeros(2, 3, dtype=jnp.int32), zeros(2, 4))


def test_every_module_that_is_checked_states_shapes():
    for name in SHAPES_CHECKED:
        assert "jaxtyping" in repr(vars(importlib.import_module(name)).values()), name
