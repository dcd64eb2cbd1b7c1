"""A type checker for jaxtyping's import hook that looks at shapes and dtypes alone: NumPy's arrays pass for JAX's."""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, Union, get_args, get_origin

from jaxtyping import AbstractArray

SHAPES_CHECKED = tuple(
    f"stepjax.{name}"
    for name in (
        *("models.attention", "models.layers", "models.perception_encoder", "models.projector", "models.qwen3"),
        *("models.step_vl", "processing.images", "tofc.hyperprior", "tofc.merge", "training.losses"),
    )
)


def check_shapes(function: Callable) -> Callable:
    """The function with its annotated arrays checked; other annotations are left to pyright."""
    if isinstance(function, type):
        return function
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args, **kwargs):
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            parameter = signature.parameters[name]
            for each in value if parameter.kind is inspect.Parameter.VAR_POSITIONAL else (value,):
                _check(each, parameter.annotation, name)
        result = function(*args, **kwargs)
        _check(result, signature.return_annotation, "the result")
        return result

    return checked


def _check(value: Any, annotation: Any, name: str) -> None:
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [each for each in get_args(annotation) if each is not type(None)]
        if value is None or (len(kinds) > 1 and any(_is_array(value, each) for each in kinds)):
            return
        annotation = kinds[0]
    if get_origin(annotation) is tuple:
        for each, its in zip(value, get_args(annotation), strict=False):
            _check(each, its, name)
    elif isinstance(annotation, type) and issubclass(annotation, AbstractArray):
        if not _is_array(value, annotation):
            raise TypeError(
                f"{name} is {getattr(value, 'dtype', type(value))}{getattr(value, 'shape', '')}: {annotation}"
            )


def _is_array(value: Any, annotation: Any) -> bool:
    is_kind = isinstance(annotation, type) and issubclass(annotation, AbstractArray)
    return is_kind and isinstance(value, annotation.dtype[Any, annotation.dim_str])
