"""Search for the layout of a step: mesh x accumulation (and with it rows a device) x rematerialisation policy.

The global batch, the model and the data stay the recipe's. Arithmetic drops what cannot fit and orders the rest, the
likeliest to be fast first; then the compiler is asked, one candidate after the other, while the time budget lasts.
"""

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stepjax.config import MeshConfig, PretrainConfig, RematPolicy
from stepjax.config_file import differences
from stepjax.errors import ConfigError
from stepjax.models.flops import training_flops
from stepjax.planning.memory import predict
from stepjax.planning.plan import Plan, make_plan
from stepjax.planning.recipe import write_recipe
from stepjax.planning.report import policies, to_json
from stepjax.planning.topologies import Topology
from stepjax.sharding import MESH_AXES

# In the order of what they keep.
_POLICIES: tuple[RematPolicy, ...] = ("full", "attention", "qkv", "dots", "none")
# Forward work that the backward pass does again, as a share of the forward pass, and what XLA reaches of the peak.
_RECOMPUTED: dict[RematPolicy, float] = {"none": 0.0, "dots": 0.1, "qkv": 0.6, "attention": 0.8, "full": 1.0}
_REACHED = 0.6


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
            f"{', '.join(axes) or 'one device'}; {self.rows_per_device:g} rows a device x "
            f"{self.config.batch.accumulation}; remat {policies(self.config.numerics)}"
        )


@dataclasses.dataclass(frozen=True)
class Search:
    """What was found."""

    plans: tuple[Plan, ...]  # compiled, in the order of trial
    dropped: tuple[tuple[str, str], ...]  # candidate and reason: never compiled
    refused: tuple[tuple[str, str], ...]  # compiled, and refused for other reasons than memory
    untried: int  # for which there was no time
    seconds: float

    @property
    def best(self) -> Plan | None:
        """The fastest that fits."""
        fitting = [plan for plan in self.plans if plan.fits]
        return max(fitting, key=lambda plan: plan.tokens_per_second or 0.0, default=None)

    @property
    def frontier(self) -> list[Plan]:
        """Plans that no other beats in both tokens per second and memory, the fastest first."""
        fitting = sorted((p for p in self.plans if p.fits), key=lambda p: (-(p.tokens_per_second or 0.0), p.hbm_gib))
        kept: list[Plan] = []
        for plan in fitting:
            if not kept or plan.hbm_gib < kept[-1].hbm_gib:
                kept.append(plan)
        return kept


def candidates(config: PretrainConfig, topology: Topology) -> tuple[list[Candidate], list[tuple[str, str]]]:
    """What is worth compiling, the likeliest to be fast first; and what is not, with the reason.

    Raises:
        ConfigError: nothing divides: no mesh takes the recipe's rows.
    """
    found, dropped = [], []
    devices, limit = topology.num_devices, topology.facts.hbm_limit_gib
    for mesh in _meshes(config, topology):
        slices, data, fsdp, _, _ = mesh.shape(devices)
        groups = slices * data * fsdp
        for accumulation in _divisors(config.batch.rows):
            rows = config.batch.rows // accumulation
            if rows % groups:
                continue
            for policy, of_encoder in itertools.product(_POLICIES, repeat=2):
                other = dataclasses.replace(
                    config,
                    mesh=mesh,
                    batch=dataclasses.replace(config.batch, accumulation=accumulation),
                    numerics=dataclasses.replace(config.numerics, remat=policy, encoder_remat=of_encoder),
                )
                memory = predict(other, devices)
                candidate = Candidate(other, rows / groups, memory.total, _seconds(other, topology, memory.parameters))
                # Temporaries are the least certain of the parts: only what is too much without them is dropped.
                certain = memory.total - memory.temporaries
                if certain > limit:
                    dropped.append((str(candidate), f"needs at least {certain:.1f} GiB of {limit:.1f}, by arithmetic"))
                else:
                    found.append(candidate)
    if not found and not dropped:
        raise ConfigError(
            f"batch.rows={config.batch.rows}: no mesh of {devices} devices takes them in equal parts; choose a "
            f"multiple or a divisor of the devices"
        )
    # What probably fits comes before what perhaps fits.
    return sorted(found, key=lambda c: (c.predicted_gib > limit, c.predicted_seconds)), dropped


def search(
    config: PretrainConfig,
    topology: Topology,
    *,
    budget_seconds: float,
    say: Callable[[str], None],
    plan: Callable[[PretrainConfig, Topology], Plan] = make_plan,
) -> Search:
    """Compile candidates until the budget is used up; the first is compiled in any case.

    Args:
        say: told of every candidate as it is done.
        plan: makes the plan of a candidate.
    """
    waiting, dropped = candidates(config, topology)
    began = time.monotonic()
    plans: list[Plan] = []
    refused: list[tuple[str, str]] = []
    lengths: list[float] = []
    say(f"{len(waiting)} candidates; {len(dropped)} more cannot fit, by arithmetic")
    while waiting:
        spent = time.monotonic() - began
        if lengths and spent + sum(lengths) / len(lengths) > budget_seconds:
            break
        candidate = waiting.pop(0)
        start = time.monotonic()
        try:
            found = plan(candidate.config, topology)
        except ConfigError as error:
            refused.append((str(candidate), str(error)))
            say(f"{candidate}: {error}")
        else:
            plans.append(found)
            say(f"{candidate}: {_outcome(found)}")
            if not found.fits:
                kept = [other for other in waiting if not _needs_more(other, candidate)]
                dropped += [(str(o), f"needs more than {candidate}") for o in waiting if _needs_more(o, candidate)]
                waiting = kept
        lengths.append(time.monotonic() - start)
    return Search(tuple(plans), tuple(dropped), tuple(refused), len(waiting), time.monotonic() - began)


def search_and_print(
    config: PretrainConfig,
    topology: Topology,
    recipe: Path,
    *,
    budget_minutes: float,
    write: Path | None,
    as_json: bool,
) -> int:
    """Search, print, and write the best; exit status 0 if anything fits."""
    say = (lambda line: None) if as_json else (lambda line: print(line, flush=True))
    found = search(config, topology, budget_seconds=60 * budget_minutes, say=say)
    best = found.best
    if as_json:
        fields: dict[str, Any] = {
            "best": None if best is None else to_json(best),
            "frontier": [to_json(plan) for plan in found.frontier],
            "tried": [to_json(plan) for plan in found.plans],
            "dropped": [{"candidate": name, "reason": reason} for name, reason in found.dropped],
            "refused": [{"candidate": name, "reason": reason} for name, reason in found.refused],
            "untried": found.untried,
            "search_seconds": found.seconds,
        }
        print(json.dumps(fields, indent=1))
    else:
        print("\n".join(_summary(found, config)))
    if best is None:
        return 1
    if write is not None:
        write_recipe(write, recipe, best.config, _headline(best))
        say(f"\nwritten to {write}; train it with: stepjax pretrain {write}")
    return 0


def _summary(found: Search, config: PretrainConfig) -> Iterator[str]:
    yield ""
    yield (
        f"{len(found.plans)} compiled in {found.seconds / 60:.1f} min, {len(found.dropped)} dropped by arithmetic, "
        f"{len(found.refused)} refused, {found.untried} left untried for want of time"
    )
    if found.best is None:
        yield "nothing that was compiled fits; give more time, more devices, or a smaller row"
        return
    yield "frontier: more tokens a second need more memory"
    for plan in found.frontier:
        yield f"  {_outcome(plan)}  {'; '.join(differences(plan.config, config)) or 'as the recipe'}"
    yield f"best: {'; '.join(differences(found.best.config, config)) or 'as the recipe'}"


def _outcome(plan: Plan) -> str:
    if not plan.fits:
        return f"does not fit, {plan.hbm_gib:.1f} GiB of {plan.limit_gib:.1f}"
    assert plan.tokens_per_second is not None and plan.mfu is not None
    return (
        f"{plan.tokens_per_second / plan.topology.chips:,.0f} tokens/s a chip, MFU {plan.mfu:.1%}, "
        f"{plan.hbm_gib:.1f} GiB of {plan.limit_gib:.1f}"
    )


def _headline(plan: Plan) -> str:
    return f"{plan.topology.name}, {plan.topology.slices} slice(s): {_outcome(plan)}, by the compiler's estimate"


# Candidates -----------------------------------------------------------------------------------------------------------


def _meshes(config: PretrainConfig, topology: Topology) -> Iterator[MeshConfig]:
    """Meshes that the model and the rows divide over; parameters always over all devices that are left."""
    decoder, vision = config.model.decoder, config.model.vision
    within = topology.num_devices // topology.slices
    cut = (decoder.num_heads, decoder.num_kv_heads, decoder.mlp_dim, decoder.vocab_size)
    cut += (vision.num_heads, vision.mlp_dim)
    width = math.gcd(decoder.width, vision.width)
    for tensor in _powers(8):
        for context in _powers(4):
            for data in _powers(4):
                parts, rest = divmod(within, tensor * context * data)
                if rest or parts < 1 or any(size % tensor for size in cut):
                    continue
                if config.batch.tokens % (2 * context) or width % parts:
                    continue
                yield dataclasses.replace(
                    config.mesh, slice=topology.slices, data=data, fsdp=parts, context=context, tensor=tensor
                )


def _powers(largest: int) -> list[int]:
    return [2**i for i in range(largest.bit_length())]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _needs_more(other: Candidate, failed: Candidate) -> bool:
    """Whether a candidate differs from one that did not fit only in needing more."""
    (policy, of_encoder), (failed_policy, failed_of_encoder) = (
        (_POLICIES.index(numerics.remat), _POLICIES.index(numerics.policy_of_encoder))
        for numerics in (other.config.numerics, failed.config.numerics)
    )
    return (
        other.config.mesh == failed.config.mesh
        and other.rows_per_device >= failed.rows_per_device
        and policy >= failed_policy
        and of_encoder >= failed_of_encoder
    )


def _seconds(config: PretrainConfig, topology: Topology, parameters_gib: float) -> float:
    """A guess for the order of trial: products at a share of the peak, and weights and activations over the wires."""
    facts, devices, batch = topology.facts, topology.num_devices, config.batch
    slices, data, fsdp, context, tensor = config.mesh.shape(devices)
    text, images = (
        training_flops(
            config.model,
            tokens=tokens,
            attention_pairs=tokens * (batch.example_tokens or batch.tokens) / 2,
            global_views=views * batch.global_views,
            crops=views * batch.crops,
            global_grid=config.images.global_grid,
            crop_grid=config.images.crop_grid,
        )
        for tokens, views in ((batch.rows * batch.tokens, 0), (0, batch.rows))
    )
    flops = text * (1 + _RECOMPUTED[config.numerics.remat] / 3)
    flops += images * (1 + _RECOMPUTED[config.numerics.policy_of_encoder] / 3)
    compute = flops / (facts.peak_flops * devices * _REACHED)
    wires = facts.link_bandwidth / facts.devices_per_chip * 2 * len(topology.shape)
    weights = 2 * parameters_gib * 2**30 / 4 * fsdp  # bfloat16, of a tensor part
    gathered = 3 * weights * batch.accumulation * (fsdp > 1)
    rows = batch.rows / (slices * data * fsdp)
    decoder, vision = config.model.decoder, config.model.vision
    patches = batch.global_views * config.images.global_grid**2 + batch.crops * config.images.crop_grid**2
    activations = (
        rows
        / context
        * (batch.tokens * decoder.width * decoder.num_layers + patches * vision.width * vision.num_layers)
    )
    exchanged = 6 * 2 * 2 * activations * (tensor > 1)  # two all-reduces a layer and pass, bfloat16
    across = weights / fsdp * 2 / facts.dcn_bandwidth * (slices > 1)
    return compute + (gathered + exchanged) / wires + across
