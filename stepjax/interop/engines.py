"""Engines from the command line: model, dtype and number of devices."""

import dataclasses
from typing import TYPE_CHECKING

from stepjax.config import DType
from stepjax.errors import ConfigError
from stepjax.inference.config import EngineConfig

if TYPE_CHECKING:  # commands parse their arguments without JAX
    from stepjax.inference.engine import Engine
    from stepjax.interop.text_processor import AnyProcessor


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineArguments:
    """Options for a model loaded into this process."""

    dtype: DType = "bfloat16"  # dtype of parameters and computation
    tensor_parallel: int = 1  # devices that share the model and decode one batch together
    data_parallel: int = 1  # copies of the model, each with its own cache and batches
    yarn_factor: float = 1.0  # stretch the context beyond the trained length; PaCoRe's report uses 2
    engine: EngineConfig = EngineConfig()

    def check(self) -> None:
        """
        Raises:
            ConfigError: a value is out of range. (Not in the constructor: the parser would swallow it.)
        """
        for name in ("tensor_parallel", "data_parallel", "yarn_factor"):
            if not getattr(self, name) >= 1:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")


def load_engines(path: str, arguments: EngineArguments) -> "tuple[list[Engine], AnyProcessor]":
    """One engine per index of the data axis, and the prompt processor.

    Raises:
        ConfigError: there are too few devices, or the arguments do not suit the model.
        CheckpointError, TokenError: see `load`.
    """
    import jax

    from stepjax.config import MeshConfig, NumericsConfig
    from stepjax.inference.replicas import make_engines
    from stepjax.interop.load import load
    from stepjax.models.step_vl import stretched
    from stepjax.sharding import data_parts, make_mesh

    needed, there = arguments.tensor_parallel * arguments.data_parallel, len(jax.devices())
    if needed > there:
        raise ConfigError(
            f"--tensor-parallel {arguments.tensor_parallel} --data-parallel {arguments.data_parallel}: need {needed} "
            f"devices, but there are {there}"
        )
    numerics = NumericsConfig(param_dtype=arguments.dtype, compute_dtype=arguments.dtype, remat="none")
    shape = MeshConfig(data=arguments.data_parallel, fsdp=1, tensor=arguments.tensor_parallel)
    mesh = make_mesh(shape, jax.devices()[:needed])
    model, processor = load(path, numerics=numerics, mesh=data_parts(mesh)[0])
    model = stretched(model, arguments.yarn_factor)
    return make_engines(model, processor, arguments.engine, mesh, donate=True), processor
