"""An iteration of `stepjax rl` as a plan: every program, what lives beside it, and how long all of them take.

    decoding        decode_steps tokens of every sequence of an engine, at the middle of their answers
    scoring         log-probabilities and values of the trainer's rows, before the update
    policy, critic  the gradient of a call's rows, added to those of the calls before
    policy step, critic step      the optimizer

All answers are assumed to have the same length and all prompts the longest; images never limit what a row holds. An
engine decodes as many sequences at once as it may, until it has made its share. Devices hold everything all the time:
the trainer's state, the engines' weights and their caches; a program needs its temporaries beside these.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from stepjax.data.packing import RowBudget
from stepjax.errors import ConfigError
from stepjax.inference import programs
from stepjax.inference.batch import Batch
from stepjax.models.paged_cache import make_pool, pool_layout
from stepjax.models.serving_decoder import serving_model
from stepjax.models.step_vl import abstract_model
from stepjax.planning import hlo
from stepjax.planning.core_time import packed_rate
from stepjax.planning.estimate import Estimate, estimate
from stepjax.planning.network import Network
from stepjax.planning.steps import CompiledStep, Step, compiled, num_bytes, on_mesh
from stepjax.planning.topologies import Topology
from stepjax.post_training.config import RLConfig, UpdateConfig
from stepjax.post_training.episodes import Answer, Episode, make_batch, pack_rows, rows_of_process
from stepjax.post_training.sampling import engine_config_of
from stepjax.post_training.step import Programs, abstract_state, make_optimizers
from stepjax.processing.tokens import Example
from stepjax.sharding import check_batch, data_parts, engines_mesh, make_mesh, spec, target_platform
from stepjax.training.footprint import GIB
from stepjax.xla_flags import compiler_options

# Parts of an iteration, by the programs' names.
PARTS = {
    "sampling": ("decoding",),
    "scoring": ("scoring",),
    "update": ("policy", "policy step", "critic", "critic step"),
}
CACHE = "engine cache"


# How much work an iteration is ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Work:
    """An iteration whose answers all have the same length.

    Attributes:
        calls: of each program, one after the other.
        at_once: sequences that an engine decodes together.
        cached: tokens of a sequence's cache in the middle of its answer, with its share of the prompt.
        pairs: visible (query, key) pairs of the fullest row.
    """

    answer_tokens: int
    calls: dict[str, int]
    at_once: int
    cached: int
    pairs: float


def work_of(config: RLConfig, mesh: Mesh, engines: Mesh, answer_tokens: int | None = None) -> Work:
    """
    Raises:
        ConfigError: answers of this length do not fit, or rows or prompts cannot be divided among the processes.
    """
    rollout, most = config.rollout, config.rollout.max_tokens
    length = answer_tokens or most
    if not 0 < length <= most:
        raise ConfigError(f"--answer-tokens {answer_tokens}: must be from 1 to rollout.max_tokens={most}")
    # The first process is like the others.
    process = mesh.devices.flat[0].process_index
    processes = len({device.process_index for device in mesh.devices.flat})
    rows_of_call = rows_of_process(config.batch, mesh, process)
    prompts = config.prompts_of_process(processes)
    budget = RowBudget.of(config.batch, config.images, config.numerics.compute_dtype)
    episodes = [_episode(config.max_prompt_tokens, rollout.samples, length) for _ in range(prompts)]

    def calls(some: list[Episode]) -> int:
        return math.ceil(len(pack_rows(some, budget)) / rows_of_call)

    def gradients(update: UpdateConfig) -> int:
        return update.passes * sum(calls(episodes[place :: update.minibatches]) for place in range(update.minibatches))

    own_critic = config.has_critic and config.critic.trunk == "own"
    parts = data_parts(engines)
    of_engine = -(-prompts // (len(parts) // processes)) * rollout.samples
    cached = math.ceil(config.max_prompt_tokens / rollout.samples + length / 2)
    at_once = max(min(rollout.max_sequences, of_engine, _cache_tokens(config) // cached), 1)
    found = {
        "decoding": math.ceil(of_engine * length / (at_once * rollout.decode_steps)),
        "scoring": calls(episodes) if config.needs_scores else 0,
        "policy": gradients(config.policy),
        "policy step": config.policy.steps,
        "critic": gradients(config.critic.update) if own_critic else 0,
        "critic step": config.critic.update.steps if config.has_critic else 0,
    }
    shared, row = config.max_prompt_tokens - 1, max(pack_rows(episodes, budget), key=_tokens)
    pairs = sum(shared**2 / 2 + len(piece.answers) * ((length + 1) ** 2 / 2 + (length + 1) * shared) for piece in row)
    return Work(length, {name: count for name, count in found.items() if count}, at_once, cached, pairs)


def _episode(prompt_tokens: int, samples: int, answer_tokens: int) -> Episode:
    nothing = np.zeros((0, 0, 0, 3), np.float32)
    zeros = np.zeros(prompt_tokens, np.int32)
    prompt = Example("planned", zeros, zeros.astype(np.float32), zeros - 1, nothing, nothing)
    mask_L, empty_L = np.ones(answer_tokens, bool), np.zeros(0, np.float32)
    unread: Any = None
    answers = [Answer(unread, unread, mask_L, *[empty_L] * 7) for _ in range(samples)]
    return Episode(0, 0, {}, prompt, answers)


def _tokens(row: Any) -> int:
    return sum(len(answer.mask_L) for piece in row for answer in piece.answers)


def _cache_tokens(config: RLConfig) -> int:
    engine = engine_config_of(config)
    return engine.cache_tokens or engine.max_sequences * (engine.max_context or 0)


# Programs -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function with abstract arguments, on the devices that run it.

    Attributes:
        holds: names of `Programs`' residents that are among the arguments.
    """

    step: Step
    mesh: Mesh
    holds: tuple[str, ...]


def programs_of(config: RLConfig, mesh: Mesh, engines: Mesh, work: Work) -> tuple[dict[str, Program], dict[str, int]]:
    """The programs of an iteration by name; and what devices hold all the time, by name, in bytes of a device."""
    optimizers = make_optimizers(config)
    functions = Programs(config, optimizers)
    with jax.set_mesh(mesh):
        state = on_mesh(abstract_state(config, optimizers), mesh)
        reference = on_mesh(abstract_model(config.model, config.numerics), mesh) if config.loss.kl else None
        layout = NamedSharding(mesh, spec("batch"))
        row = make_batch([[]], RowBudget.of(config.batch, config.images, config.numerics.compute_dtype))
        batch = {
            name: jax.ShapeDtypeStruct((config.batch.rows, *array.shape[1:]), array.dtype, sharding=layout)
            for name, array in row.items()
        }
    model, critic, opt_state, critic_opt_state = state.model, state.critic, state.opt_state, state.critic_opt_state
    shared = critic if config.has_critic and config.critic.trunk == "shared" else None
    total, is_first = (model, shared), {"is_first": not config.needs_scores}
    made = {
        "scoring": (functions.scores, (model, reference, critic, batch), "policy", "reference", "critic"),
        "policy": (functions.policy, (total, model, shared, batch), "policy", *["critic"] * (shared is not None)),
        "policy step": (functions.apply_policy, (model, opt_state, model), "policy", "policy's optimizer"),
    }
    if config.has_critic:
        made["critic"] = functions.critic, (critic, critic, batch), "critic"
        made["critic step"] = functions.apply_critic, (critic, critic_opt_state, critic), "critic", "critic's optimizer"
    found = {}
    for name, (function, arguments, *holds) in made.items():
        static = is_first if name == "policy" else {}
        if name in work.calls:
            found[name] = Program(Step(function, arguments, arguments, (), (), static), mesh, tuple(holds))
    [part, *_] = data_parts(engines)
    step, pool, features = _decoding(config, part, work)
    found["decoding"] = Program(step, part, ("engine weights", CACHE))
    residents = {
        "policy": model,
        "policy's optimizer": opt_state,
        "critic": critic,
        "critic's optimizer": critic_opt_state,
        "reference": reference,
        "engine weights": step.arguments[0],
        "image features": features,
        CACHE: pool,
    }
    return found, {name: num_bytes(tree) for name, tree in residents.items() if tree is not None}


def _decoding(config: RLConfig, mesh: Mesh, work: Work) -> tuple[Step, Any, Any]:
    """An engine's program, its cache, and its store of image features."""
    numerics = dataclasses.replace(config.numerics, param_dtype=config.numerics.compute_dtype)
    engine, decoder = engine_config_of(config), config.model.decoder
    with jax.set_mesh(mesh):
        model = on_mesh(abstract_model(config.model, numerics), mesh)
        model = on_mesh(jax.eval_shape(partial(serving_model, weights=None), model), mesh)
        pages, dtype = -(-_cache_tokens(config) // engine.page_size), jnp.dtype(numerics.compute_dtype)
        shape = jax.eval_shape(lambda: make_pool(decoder, pages, engine.page_size, dtype, target_platform()))
        layout = NamedSharding(mesh, spec())
    pool_S2KTW = jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=pool_layout(mesh))
    empty = Batch.empty(work.at_once, 1, -(-work.cached // engine.page_size), 0)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout), (empty.tables, empty.rows))
    static = {"steps": engine.decode_steps, "num_top": 0}
    arguments = model, pool_S2KTW, *batch
    features_RD = jax.ShapeDtypeStruct((engine.feature_cache_tokens, decoder.width), dtype, sharding=layout)
    return Step(programs.decode, arguments, arguments, (), (), static), pool_S2KTW, features_RD


# The plan -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Phase:
    """A program's share of an iteration.

    Attributes:
        beside: GiB of a device that are held all the time and are no arguments of the program, by name.
        estimate: of one call; None if the program does not fit even alone.
    """

    name: str
    step: CompiledStep
    calls: int
    beside: dict[str, float]
    estimate: Estimate | None

    @property
    def own_gib(self) -> float | None:
        """Of the program with its arguments, those it does not use included; None if the compiler does not say."""
        step = self.step
        if step.shortage is None:
            return (step.total_bytes + max(step.parameter_bytes - step.argument_bytes, 0)) / GIB
        return step.shortage.needed_gib

    @property
    def hbm_gib(self) -> float | None:
        return None if self.own_gib is None else self.own_gib + sum(self.beside.values())

    @property
    def seconds(self) -> float | None:
        """Of all calls."""
        return None if self.estimate is None else self.calls * self.estimate.seconds


@dataclasses.dataclass(frozen=True)
class IterationPlan:
    config: RLConfig
    topology: Topology
    work: Work
    held: dict[str, float]  # GiB of a device all the time, by name
    cache_tokens: int  # of an engine
    phases: tuple[Phase, ...]

    def phase_fits(self, phase: Phase, *, without_cache: bool = False) -> bool:
        """Together with all that is held; `without_cache`: but the engines' caches."""
        if phase.step.shortage is not None or phase.hbm_gib is None:
            return False
        spared = phase.beside.get(CACHE, 0.0) if without_cache else 0.0
        return phase.hbm_gib - spared <= self.limit_gib

    @property
    def fits(self) -> bool:
        return all(map(self.phase_fits, self.phases))

    @property
    def fits_without_cache(self) -> bool:
        """Whether every phase fits if the engines drop their caches while the trainer works."""
        return all(self.phase_fits(phase, without_cache=True) for phase in self.phases)

    @property
    def limit_gib(self) -> float:
        return self.topology.facts.hbm_limit_gib

    def seconds_of(self, part: str) -> float | None:
        """Of a part of the iteration (PARTS); None if a program of it does not fit."""
        seconds = [phase.seconds for phase in self.phases if phase.name in PARTS[part]]
        return None if None in seconds else math.fsum(s for s in seconds if s is not None)

    @property
    def seconds(self) -> float | None:
        parts = [self.seconds_of(part) for part in PARTS]
        return None if None in parts else math.fsum(s for s in parts if s is not None)


def plan_iteration(
    config: RLConfig,
    topology: Topology,
    *,
    answer_tokens: int | None = None,
    compile_program: Callable[[str, Program], CompiledStep] | None = None,
) -> IterationPlan:
    """Compile every program of an iteration with the chip's flags, and price it.

    Args:
        answer_tokens: length of every answer, for the price; None: the longest, so that the price is an upper bound.
        compile_program: compiles a program, given with its name, in place of `steps.compiled`.

    Raises:
        ConfigError: the configuration cannot run on this topology, regardless of memory.
    """
    devices, options = topology.devices(), compiler_options(topology.facts.chip)
    mesh = make_mesh(config.mesh, devices)
    check_batch(config.batch, mesh)
    engines = engines_mesh(devices, config.rollout.tensor)
    work = work_of(config, mesh, engines, answer_tokens)
    made, held = programs_of(config, mesh, engines, work)
    # The decoder's attention is two kernels: over an answer itself (half of the pairs) and over its prompt (all pairs).
    share = work.pairs / (1.5 * config.batch.tokens**2)
    rate = packed_rate(config, share, work.answer_tokens)
    phases = []
    for name in (name for names in PARTS.values() for name in names if name in made):
        program, found = made[name], None
        if compile_program is None:
            step = compiled(program.step, program.mesh, topology, options)
        else:
            step = compile_program(name, program)
        if step.fits:
            network = Network(topology, list(program.mesh.devices.flat))
            found = estimate(hlo.read(step.text), network, attention_rate=rate)
        beside = {other: size / GIB for other, size in held.items() if other not in program.holds}
        phases.append(Phase(name, step, work.calls[name], beside, found))
    in_gib = {name: size / GIB for name, size in held.items()}
    return IterationPlan(config, topology, work, in_gib, _cache_tokens(config), tuple(phases))
