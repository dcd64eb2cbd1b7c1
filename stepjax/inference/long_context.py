"""A longer context than a model was trained with, by YaRN."""

import dataclasses
from typing import Any, TypeVar

import jax

from stepjax.errors import ConfigError
from stepjax.models.qwen3 import Qwen3
from stepjax.models.step_vl import StepVL

Model = TypeVar("Model", bound=StepVL | Qwen3)


def stretched(model: Model, factor: float, *, attention_factor: float = 1.0) -> Model:
    """The same weights with rotary positions for `factor` times as many tokens.

    Args:
        attention_factor: of cosines and sines. 1 is what PaCoRe serves with; YaRN's own is 0.1 ln(factor) + 1.

    Raises:
        ConfigError: the factor is below 1, or the model is stretched already.
    """
    decoder = model.decoder if isinstance(model, StepVL) else model
    if factor < 1:
        raise ConfigError(f"factor={factor}: must be at least 1")
    if decoder.config.yarn_factor > 1:
        raise ConfigError(f"factor={factor}: the model is stretched by {decoder.config.yarn_factor} already")
    trained = decoder.config.max_positions
    config = dataclasses.replace(
        decoder.config,
        max_positions=int(trained * factor),
        yarn_factor=factor,
        yarn_trained_positions=trained,
        yarn_attention_factor=attention_factor,
    )
    copy: Any = jax.tree.map(lambda leaf: leaf, model)  # the arrays are shared
    if isinstance(model, StepVL):
        copy.config = dataclasses.replace(model.config, decoder=config)
        copy.decoder.config = config
    else:
        copy.config = config
    return copy
