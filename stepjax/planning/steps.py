"""The steps that can be planned, as functions of abstract arrays, and their compilation for a topology.

    train     one optimizer step
    score     log-probabilities of the tokens of a batch, without gradients: reference and old policies
    prefill   one row of prompt tokens into the engine's cache, images already encoded
    decode    one more token for every sequence of a batch, each with a cache as long as a row

`train` is the step of `stepjax pretrain`: same function, state, batch and shardings, with the state donated. The others
keep the parameters in the compute dtype and take the recipe's micro-batch (rows / accumulation). The last two are
programs of the inference engine. All arrays are abstract: the host needs memory for the compiler, not for the model.

Legend: B rows, R rows of the feature store, D width, T tokens of a page.
"""

import contextlib
import dataclasses
import os
import re
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from pallas_kernels.checks import ArgumentError
from stepjax.config import PretrainConfig
from stepjax.data.packing import RowBudget, pack
from stepjax.errors import ConfigError
from stepjax.inference import programs
from stepjax.inference.batch import Batch
from stepjax.inference.config import EngineConfig
from stepjax.inference.prefill import PrefillArrays
from stepjax.models.flops import decoder_flops
from stepjax.models.paged_cache import make_pool, pool_layout
from stepjax.models.serving_decoder import Weights, serving_model
from stepjax.models.step_vl import abstract_model
from stepjax.planning import StepKind
from stepjax.planning.program_text import program_text
from stepjax.planning.topologies import Topology
from stepjax.sharding import check_batch, check_heads_only, make_mesh, shardings, spec, target_platform
from stepjax.training.footprint import step_flops
from stepjax.training.losses import next_tokens, token_scores
from stepjax.training.optimizer import learning_rate, make_optimizer
from stepjax.training.step import abstract_state, abstract_trained, make_train_step

PAGE_SIZE = 128
_UNITS = {"K": 2.0**-20, "M": 2.0**-10, "G": 1.0, "T": 2.0**10}  # GiB


@dataclasses.dataclass(frozen=True)
class Step:
    """A jitted function and its arguments: abstract arrays over the whole mesh."""

    function: Any
    arguments: tuple[Any, ...]
    parameters: Any
    optimizer: Any
    batch: Any  # including the cache, if any
    static: dict[str, Any] = dataclasses.field(default_factory=dict)  # keyword arguments


def make_step(kind: StepKind, config: PretrainConfig, mesh: Mesh, weights: Weights = None) -> Step:
    """
    Args:
        weights: `EngineConfig.weights`, for `prefill` and `decode`.

    Raises:
        ConfigError: an engine cannot use the mesh (`prefill` and `decode`).
    """
    if kind == "train":
        return _train(config, mesh)
    numerics = dataclasses.replace(config.numerics, param_dtype=config.numerics.compute_dtype)
    model = on_mesh(abstract_model(config.model, numerics), mesh)
    if kind != "score":
        return _of_engine(kind, config, model, mesh, weights)
    batch = abstract_batch(config, mesh, rows_at_once(kind, config))

    def score(model, batch):
        hidden_BTD = model(**{name: batch[name] for name in batch if name not in ("loss_weights_BT", "group_BT")})
        targets_BT, _ = next_tokens(batch["tokens_BT"], batch["loss_weights_BT"])
        with jax.named_scope("loss"):
            return token_scores(hidden_BTD, model.decoder.head(), targets_BT, chunk=numerics.loss_chunk).log_probs_BT

    return Step(jax.jit(score), (model, batch), model, (), batch)


def _train(config: PretrainConfig, mesh: Mesh) -> Step:
    schedule = learning_rate(config.schedule, config.tokens_per_step)
    optimizer = make_optimizer(config.optimizer, schedule, abstract_trained(config))
    state = on_mesh(abstract_state(config, optimizer), mesh)
    batch = abstract_batch(config, mesh, config.batch.rows)
    train_step = jax.jit(make_train_step(config, optimizer, schedule), donate_argnums=0)
    return Step(train_step, (state, batch), (state.model, state.base), state.opt_state, batch)


def _of_engine(kind: StepKind, config: PretrainConfig, model: Any, mesh: Mesh, weights: Weights) -> Step:
    """An engine program, for sequences of up to a row's tokens."""
    check_heads_only(mesh)
    layout = jax.eval_shape(partial(serving_model, weights=weights), model)
    model = on_mesh(layout, mesh)
    decoder, length = config.model.decoder, config.batch.tokens
    rows, row_pages = config.batch.micro_rows, -(-length // PAGE_SIZE)
    dtype = jnp.dtype(config.numerics.compute_dtype)
    shape = jax.eval_shape(lambda: make_pool(decoder, rows * row_pages, PAGE_SIZE, dtype, target_platform()))
    pool_S2KTW = jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=pool_layout(mesh))

    def replicated(tree: Any) -> Any:
        layout = NamedSharding(mesh, spec())
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout), tree)

    if kind == "decode":
        empty = Batch.empty(rows, 1, row_pages, 0)
        function, static = programs.decode, {"steps": 1, "num_top": 0}
        batch = replicated((empty.tables, empty.rows))
    else:
        store_RD = jax.ShapeDtypeStruct((EngineConfig().feature_cache_tokens, decoder.width), dtype)
        function, static = programs.prefill, {}
        batch = replicated((store_RD, *PrefillArrays.empty(1, length, row_pages)))
    return Step(function, (model, pool_S2KTW, *batch), model, (), (pool_S2KTW, batch), static)


def abstract_batch(config: PretrainConfig, mesh: Mesh, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """An abstract batch of the loader."""
    layout = NamedSharding(mesh, spec("batch"))
    batch = {}
    for key, row in pack([], RowBudget.of(config.batch, config.images, config.numerics.compute_dtype)).items():
        name, _, suffix = key.rpartition("_")
        batch[f"{name}_B{suffix}"] = jax.ShapeDtypeStruct((rows, *row.shape), row.dtype, sharding=layout)
    return batch


def on_mesh(tree: Any, mesh: Mesh) -> Any:
    return jax.tree.map(
        lambda x, layout: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout), tree, shardings(tree, mesh)
    )


# How much work a step is ----------------------------------------------------------------------------------------------


def rows_at_once(kind: StepKind, config: PretrainConfig) -> int:
    """Sequences per call."""
    if kind == "prefill":
        return 1
    return config.batch.rows if kind == "train" else config.batch.micro_rows


def tokens_at_once(kind: StepKind, config: PretrainConfig) -> int:
    """Tokens trained on, scored, read or written per call."""
    return rows_at_once(kind, config) * (1 if kind == "decode" else config.batch.tokens)


def model_flops(kind: StepKind, config: PretrainConfig) -> float:
    """FLOPs of a call with all slots full, examples of maximal length and a full cache."""
    rows, tokens, decoder = rows_at_once(kind, config), config.batch.tokens, config.model.decoder
    if kind == "decode":
        return decoder_flops(decoder, rows, rows * tokens)
    if kind == "prefill":  # without the output projection
        head = 2.0 * decoder.width * decoder.vocab_size * tokens
        return decoder_flops(decoder, tokens, tokens * (tokens + 1) / 2) - head
    return step_flops(config) if kind == "train" else step_flops(config, rows=rows) / 3


# Compilation ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Shortage:
    """The compiler's out-of-memory error."""

    needed_gib: float | None  # arguments included; None if the message gives no figure
    limit_gib: float | None
    message: str


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A compiled step, or why it does not fit. Bytes are per device."""

    mesh: Mesh
    parameter_bytes: int = 0
    optimizer_bytes: int = 0
    batch_bytes: int = 0
    argument_bytes: int = 0  # the three above, as the compiler lays them out
    alias_bytes: int = 0  # outputs that reuse donated arguments
    total_bytes: int = 0  # peak memory of the device
    text: str = ""  # the scheduled program
    shortage: Shortage | None = None
    seconds: float = 0.0  # from tracing to the text
    host_gib: float = 0.0  # peak memory of this process so far

    @property
    def fits(self) -> bool:
        return self.shortage is None


def compile_step(
    config: PretrainConfig,
    topology: Topology,
    *,
    kind: StepKind = "train",
    weights: Weights = None,
    compiler_options: Mapping[str, str] | None = None,
) -> CompiledStep:
    """Compile one step of `config` for `topology`.

    Raises:
        ConfigError: the mesh does not divide the batch or the parameters, or libtpu refuses the topology or an option.
    """
    mesh = make_mesh(config.mesh, topology.devices())
    check_batch(config.batch, mesh)
    with jax.set_mesh(mesh):
        step = make_step(kind, config, mesh, weights)
    return compiled(step, mesh, topology, compiler_options)


def compiled(step: Step, mesh: Mesh, topology: Topology, options: Mapping[str, str] | None = None) -> CompiledStep:
    """Compile a step for devices of `topology`.

    Raises:
        ConfigError: a kernel refuses the shapes, or libtpu the program or an option.
    """
    began = time.monotonic()
    sizes = map(num_bytes, (step.parameters, step.optimizer, step.batch))
    found: dict[str, Any] = dict(zip(("parameter_bytes", "optimizer_bytes", "batch_bytes"), sizes, strict=True))
    with jax.set_mesh(mesh), _without_xla_flags():
        try:
            lowered = step.function.lower(*step.arguments, **step.static)
        except ArgumentError as error:
            raise ConfigError(f"the step cannot be built for {topology.name}: {error}") from error
        try:
            made = lowered.compile(compiler_options={**(options or {})})
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise ConfigError(f"the step does not compile for {topology.name}: {error}") from error
            found["shortage"] = read_shortage(str(error))
        else:
            memory: Any = made.memory_analysis()
            arguments, alias = memory.argument_size_in_bytes, memory.alias_size_in_bytes
            total = arguments + memory.output_size_in_bytes - alias + memory.temp_size_in_bytes
            peak = getattr(memory, "peak_memory_in_bytes", 0)
            found |= {"argument_bytes": arguments, "alias_bytes": alias, "total_bytes": max(peak, total)}
            found["text"] = program_text(made, f"jit_{step.function.__name__}")
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    return CompiledStep(mesh, **found, seconds=time.monotonic() - began, host_gib=usage)


def read_shortage(message: str) -> Shortage:
    """The figures in the compiler's out-of-memory error, which has more than one form."""
    size = r"([\d.]+)([KMGT])"
    for pattern in (rf"required for [^(]*\({size}\) exceeds available HBM \({size}\)", rf"Used {size} of {size} hbm"):
        if found := re.search(pattern, message):
            needed, limit = (float(found[i]) * _UNITS[found[i + 1]] for i in (1, 3))
            return Shortage(needed, limit, message)
    return Shortage(None, None, message)


def num_bytes(tree: Any) -> int:
    """Bytes per device."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


@contextlib.contextmanager
def _without_xla_flags() -> Iterator[None]:
    """Hides XLA_FLAGS: libtpu reads it at its first compilation and aborts on unknown flags, such as CPU flags."""
    flags = os.environ.pop("XLA_FLAGS", None)
    try:
        yield
    finally:
        if flags is not None:
            os.environ["XLA_FLAGS"] = flags
