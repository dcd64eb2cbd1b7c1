"""Search for the layout of a step: mesh x accumulation (and so rows per device) x rematerialisation policies.

Global batch, model and data stay as in the recipe. Arithmetic drops what cannot fit and puts the likely fastest first.
Then we compile one candidate after another within the time budget.
"""

import dataclasses
import itertools
import math
import os
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stepjax.config import MeshConfig, PretrainConfig, RematPolicy
from stepjax.config_file import flat, load_recipe
from stepjax.errors import ConfigError
from stepjax.models.flops import decoder_flops
from stepjax.planning.plan import StepPlan, make_plan
from stepjax.planning.report import policies, to_json
from stepjax.planning.topologies import Topology
from stepjax.sharding import MESH_AXES
from stepjax.training.footprint import GIB, predict_memory, step_flops

# Share of the forward pass recomputed in the backward pass, ordered by how much the policies keep.
_RECOMPUTED: dict[RematPolicy, float] = {"full": 1.0, "attention": 0.8, "qkv": 0.6, "dots": 0.1, "none": 0.0}
_REACHED = 0.6  # share of the peak that XLA reaches


@dataclasses.dataclass(frozen=True)
class Candidate:
    config: PretrainConfig
    rows_per_device: float  # of a micro-batch
    predicted_gib: float
    predicted_seconds: float

    def __str__(self) -> str:
        mesh = self.config.mesh
        axes = [f"{name} {getattr(mesh, name)}" for name in MESH_AXES if getattr(mesh, name) > 1]
        return (
            f"{', '.join(axes) or 'one device'}; {self.rows_per_device:g} rows per device x "
            f"{self.config.batch.accumulation}; remat {policies(self.config.numerics)}"
        )

    def needs_as_much_as(self, other: "Candidate") -> bool:
        """Whether it differs from `other` only by more rows or kept activations per device."""
        kept = list(_RECOMPUTED).index
        mine, its = self.config.numerics, other.config.numerics
        return (
            self.config.mesh == other.config.mesh
            and self.rows_per_device >= other.rows_per_device
            and kept(mine.remat) >= kept(its.remat)
            and kept(mine.policy_of_encoder) >= kept(its.policy_of_encoder)
        )


@dataclasses.dataclass(frozen=True)
class Search:
    """The result of a search."""

    plans: tuple[StepPlan, ...]  # compiled, in order of trial
    dropped: tuple[tuple[str, str], ...]  # candidate and reason: never compiled
    refused: tuple[tuple[str, str], ...]  # candidate and reason: failed to compile, but not because of memory
    untried: int  # for lack of time
    seconds: float

    @property
    def best(self) -> StepPlan | None:
        """The fastest plan that fits."""
        return next(iter(self.frontier), None)

    @property
    def frontier(self) -> list[StepPlan]:
        """The Pareto frontier of tokens per second and memory, fastest first."""
        fitting = sorted((p for p in self.plans if p.fits), key=lambda p: (-(p.tokens_per_second or 0.0), p.hbm_gib))
        kept: list[StepPlan] = []
        for plan in fitting:
            if not kept or plan.hbm_gib < kept[-1].hbm_gib:
                kept.append(plan)
        return kept

    def to_json(self) -> dict[str, Any]:
        def reasons(pairs: tuple[tuple[str, str], ...]) -> list[dict[str, str]]:
            return [{"candidate": candidate, "reason": reason} for candidate, reason in pairs]

        return {
            "best": None if self.best is None else to_json(self.best),
            "frontier": [to_json(plan) for plan in self.frontier],
            "tried": [to_json(plan) for plan in self.plans],
            "dropped": reasons(self.dropped),
            "refused": reasons(self.refused),
            "untried": self.untried,
            "search_seconds": self.seconds,
        }

    def to_text(self, preset: PretrainConfig) -> str:
        """A summary; layouts are shown as overrides of `preset`."""

        def layout(plan: StepPlan) -> str:
            return shlex.join(overrides(plan.config, preset)) or "as the recipe"

        lines = [
            f"{len(self.plans)} compiled in {self.seconds / 60:.1f} min, {len(self.dropped)} dropped by arithmetic, "
            f"{len(self.refused)} refused, {self.untried} not tried for lack of time"
        ]
        if self.best is None:
            lines.append("no compiled layout fits; allow more time, more devices, or smaller rows")
        else:
            lines.append("frontier: more tokens/s take more memory")
            lines += [f"  {outcome(plan)}  {layout(plan)}" for plan in self.frontier]
            lines.append(f"best: {layout(self.best)}")
        return "\n".join(lines)


def outcome(plan: StepPlan) -> str:
    if plan.tokens_per_second is None or plan.mfu is None:
        return f"does not fit, {plan.hbm_gib:.1f} GiB of {plan.limit_gib:.1f}"
    return (
        f"{plan.tokens_per_second / plan.topology.chips:,.0f} tokens/s per chip, MFU {plan.mfu:.1%}, "
        f"{plan.hbm_gib:.1f} GiB of {plan.limit_gib:.1f}"
    )


def search(
    config: PretrainConfig,
    topology: Topology,
    *,
    budget_seconds: float,
    say: Callable[[str], None],
    plan: Callable[[PretrainConfig, Topology], StepPlan] = make_plan,
) -> Search:
    """Compile candidates until the budget is used up; always compile the first.

    Args:
        say: called with a line after every candidate.
        plan: plans a candidate.
    """
    waiting, dropped = candidates(config, topology)
    began = time.monotonic()
    plans: list[StepPlan] = []
    refused: list[tuple[str, str]] = []
    say(f"{len(waiting)} candidates; {len(dropped)} more cannot fit, by arithmetic")
    while waiting:
        spent, tried = time.monotonic() - began, len(plans) + len(refused)
        if tried and spent + spent / tried > budget_seconds:
            break
        candidate = waiting.pop(0)
        try:
            found = plan(candidate.config, topology)
        except ConfigError as error:
            refused.append((str(candidate), str(error)))
            say(f"{candidate}: {error}")
            continue
        plans.append(found)
        say(f"{candidate}: {outcome(found)}")
        if not found.fits:
            dropped += [(str(c), f"needs more than {candidate}") for c in waiting if c.needs_as_much_as(candidate)]
            waiting = [other for other in waiting if not other.needs_as_much_as(candidate)]
    return Search(tuple(plans), tuple(dropped), tuple(refused), len(waiting), time.monotonic() - began)


def candidates(config: PretrainConfig, topology: Topology) -> tuple[list[Candidate], list[tuple[str, str]]]:
    """Candidates worth compiling, likely fastest first, and dropped ones with the reason.

    Raises:
        ConfigError: no mesh divides the recipe's rows.
    """
    found, dropped = [], []
    devices, limit, rows = topology.num_devices, topology.facts.hbm_limit_gib, config.batch.rows
    for mesh in _meshes(config, topology):
        groups = mesh.slice * mesh.data * mesh.fsdp
        for accumulation in (parts for parts in range(1, rows + 1) if rows % (parts * groups) == 0):
            for policy, of_encoder in itertools.product(_RECOMPUTED, repeat=2):
                other = dataclasses.replace(
                    config,
                    mesh=mesh,
                    batch=dataclasses.replace(config.batch, accumulation=accumulation),
                    numerics=dataclasses.replace(config.numerics, remat=policy, encoder_remat=of_encoder),
                )
                memory = predict_memory(other, devices)
                seconds = _predict_seconds(other, topology, memory.parameters)
                candidate = Candidate(other, rows / accumulation / groups, memory.total, seconds)
                # Temporaries are the least certain part: drop only what is too large without them.
                certain = memory.total - memory.temporaries
                if certain > limit:
                    dropped.append((str(candidate), f"needs at least {certain:.1f} GiB of {limit:.1f}, by arithmetic"))
                else:
                    found.append(candidate)
    if not found and not dropped:
        raise ConfigError(
            f"batch.rows={rows}: no mesh of {devices} devices divides them into equal parts; choose a multiple or a "
            f"divisor of the number of devices"
        )
    # Likely fits first.
    return sorted(found, key=lambda c: (c.predicted_gib > limit, c.predicted_seconds)), dropped


def _meshes(config: PretrainConfig, topology: Topology) -> Iterator[MeshConfig]:
    """Meshes that divide the model and the rows; fsdp always takes all remaining devices."""
    decoder, vision, tokens = config.model.decoder, config.model.vision, config.batch.tokens
    over_tensor = math.gcd(decoder.num_heads, decoder.num_kv_heads, decoder.mlp_dim, decoder.vocab_size)
    over_tensor = math.gcd(over_tensor, vision.num_heads, vision.mlp_dim)
    over_fsdp = math.gcd(decoder.width, vision.width)
    for tensor, context, data in itertools.product((1, 2, 4, 8), (1, 2, 4), (1, 2, 4)):
        fsdp, rest = divmod(topology.num_devices // topology.slices, tensor * context * data)
        if fsdp and not (rest or over_tensor % tensor or over_fsdp % fsdp or tokens % (2 * context)):
            yield dataclasses.replace(
                config.mesh, slice=topology.slices, data=data, fsdp=fsdp, context=context, tensor=tensor
            )


def _predict_seconds(config: PretrainConfig, topology: Topology, parameters_gib: float) -> float:
    """A guess to order the trials: FLOPs at a share of the peak, plus weights and activations over the network."""
    facts, batch, images = topology.facts, config.batch, config.images
    decoder, vision, numerics = config.model.decoder, config.model.vision, config.numerics
    slices, data, fsdp, context, tensor = config.mesh.shape(topology.num_devices)
    text = 3 * decoder_flops(decoder, config.tokens_per_step, batch.rows * batch.attention_pairs)
    flops = text * (1 + _RECOMPUTED[numerics.remat] / 3)
    flops += (step_flops(config) - text) * (1 + _RECOMPUTED[numerics.policy_of_encoder] / 3)
    wires = facts.link_bandwidth / facts.devices_per_chip * 2 * len(topology.shape)
    weights = 2 * parameters_gib * GIB / 4 * fsdp  # bfloat16, of one tensor shard
    gathered = 3 * weights * batch.accumulation * (fsdp > 1)
    patches = batch.global_views * images.global_grid**2 + batch.crops * images.crop_grid**2
    activations = batch.tokens * decoder.width * decoder.num_layers + patches * vision.width * vision.num_layers
    activations *= batch.rows / (slices * data * fsdp) / context
    exchanged = 6 * 2 * 2 * activations * (tensor > 1)  # two all-reduces per layer and pass, bfloat16
    across = weights / fsdp * 2 / facts.dcn_bandwidth * (slices > 1)
    return flops / (facts.peak_flops * topology.num_devices * _REACHED) + (gathered + exchanged) / wires + across


# The best as a recipe -------------------------------------------------------------------------------------------------


def overrides(config: PretrainConfig, preset: PretrainConfig) -> list[str]:
    """The command-line arguments that turn `preset` into `config`."""
    old, arguments = flat(preset), []
    for name, value in flat(config).items():
        if value != old.get(name) and isinstance(value, bool):
            section, _, field = name.rpartition(".")
            arguments.append("--" + ".".join(filter(None, (section, field if value else f"no-{field}"))))
        elif value != old.get(name):
            items = value if isinstance(value, tuple) else (value,)
            items = itertools.chain.from_iterable(item if isinstance(item, tuple) else (item,) for item in items)
            arguments += [f"--{name}", *map(str, items)]
    return arguments


def write_recipe(path: Path, original: Path, config: PretrainConfig, headline: str) -> None:
    """Write a recipe that loads `original` and overrides it to give `config`.

    Raises:
        ConfigError: `original` is not a recipe.
    """
    relative = os.path.relpath(original.absolute(), path.absolute().parent)
    title = f"{original.name}, laid out by `stepjax plan --search`."
    path.write_text(f"""\
{f"{title} {headline}"!r}

from pathlib import Path

from stepjax.config_file import load_recipe, override

base = load_recipe(Path(__file__).parent / {relative!r})
config = override(base, {overrides(config, load_recipe(original))!r}, prog=__file__)
""")
    assert load_recipe(path) == config, f"{path} does not reproduce the configuration"
