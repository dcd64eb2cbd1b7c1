"""stepjax: train, post-train and serve the STEP3-VL vision-language model in JAX.

    import stepjax

    model, processor = stepjax.load("runs/digits")
    engine = stepjax.Engine(model, processor, stepjax.EngineConfig(max_context=8192))

The names below are the public surface. Each is imported on first use, so `import stepjax` is quick and does not import
JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stepjax.config import PretrainConfig, SftConfig
    from stepjax.config_file import load_recipe
    from stepjax.errors import StepjaxError
    from stepjax.evaluation.evaluate import evaluate
    from stepjax.inference.async_engine import AsyncEngine
    from stepjax.inference.config import EngineConfig
    from stepjax.inference.engine import Engine
    from stepjax.inference.request import SamplingParams
    from stepjax.interop.load import load
    from stepjax.interop.verify import verify
    from stepjax.pacore.config import PacoreConfig
    from stepjax.pacore.coordinator import Coordinator
    from stepjax.pacore.records import Problem
    from stepjax.rollouts.endpoint import EndpointConfig, EndpointSampler
    from stepjax.rollouts.engine import EngineSampler
    from stepjax.rollouts.rollout import Rollout
    from stepjax.training.loop import pretrain

__version__ = "0.1.0"

_PLACES = {
    "AsyncEngine": "inference.async_engine",
    "Coordinator": "pacore.coordinator",
    "EndpointConfig": "rollouts.endpoint",
    "EndpointSampler": "rollouts.endpoint",
    "Engine": "inference.engine",
    "EngineConfig": "inference.config",
    "EngineSampler": "rollouts.engine",
    "PacoreConfig": "pacore.config",
    "PretrainConfig": "config",
    "Problem": "pacore.records",
    "Rollout": "rollouts.rollout",
    "SamplingParams": "inference.request",
    "SftConfig": "config",
    "StepjaxError": "errors",
    "evaluate": "evaluation.evaluate",
    "load": "interop.load",
    "load_recipe": "config_file",
    "pretrain": "training.loop",
    "verify": "interop.verify",
}

__all__ = [  # the keys of the table above; a test compares them
    "AsyncEngine",
    "Coordinator",
    "EndpointConfig",
    "EndpointSampler",
    "Engine",
    "EngineConfig",
    "EngineSampler",
    "PacoreConfig",
    "PretrainConfig",
    "Problem",
    "Rollout",
    "SamplingParams",
    "SftConfig",
    "StepjaxError",
    "evaluate",
    "load",
    "load_recipe",
    "pretrain",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"stepjax.{_PLACES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
