"""A plan as text and as JSON, and advice for a step that does not fit."""

import dataclasses
import math
import os
from collections.abc import Iterator
from typing import Any

from stepjax.config import NumericsConfig, PretrainConfig
from stepjax.figures import human_number
from stepjax.planning.estimate import EXPOSED_COLLECTIVES, PARTS, Estimate
from stepjax.planning.hlo import Operation
from stepjax.planning.plan import StepPlan
from stepjax.planning.steps import rows_at_once
from stepjax.training.footprint import parameter_count, predict_memory

_REFERENCE_TOKENS = 1.2e12  # STEP3-VL-10B's pretraining
_DAY = 86_400
_DIRECTIONS = ("forward", "recomputed", "backward")
_RESTS_ON = {
    "cycles": "the compiler's cycles",
    "attention kernel": "attention kernels' static schedules",
    "kernel": "what other kernels state",
    "bytes": "bytes moved",
    "collective": "bytes on the wires",
    "copy": "waits for copies",
    "sparsecore": "waits for the SparseCore",
}


def to_json(plan: StepPlan) -> dict[str, Any]:
    """Every figure of a plan; sizes in GiB per device, times in seconds. Unknown values are null."""
    config, topology, step, rate = plan.config, plan.topology, plan.step, plan.tokens_per_second
    fields: dict[str, Any] = {
        "name": config.name,
        "step": plan.kind,
        "topology": topology.name,
        "slices": topology.slices,
        "chips": topology.chips,
        "devices": topology.num_devices,
        "mesh": plan.mesh,
        "remat": config.numerics.remat,
        "encoder_remat": config.numerics.policy_of_encoder,
        "batch": dataclasses.asdict(config.batch),
        "parameters": parameter_count(config.model),
        "fits": plan.fits,
        "hbm_gib": round(plan.hbm_gib, 3),
        "hbm_limit_gib": plan.limit_gib,
        "hbm_gib_by_kind": {name: round(value, 3) for name, value in dataclasses.asdict(plan.memory).items()},
        "hbm_source": "compiler" if plan.fits else "compiler's refusal, kinds by arithmetic",
        "model_flops_per_step": plan.flops,
        "peak_flops_per_device": topology.facts.peak_flops,
        "estimated_step_seconds": None if plan.estimate is None else plan.estimate.seconds,
        "estimated_mfu": plan.mfu,
        "tokens_per_step": plan.tokens_per_step,
        "tokens_per_second": rate,
        "tokens_per_second_per_chip": None if rate is None else rate / topology.chips,
        "images_per_second": plan.images_per_second,
        "days_for_1_2t_tokens": _REFERENCE_TOKENS / rate / _DAY if rate and plan.kind == "train" else None,
        "compile_seconds": round(step.seconds, 3),
        "host_memory_gib": round(step.host_gib, 3),
    }
    if plan.estimate is not None:
        return fields | {
            "seconds_by_part": _by_part(plan.estimate),
            "seconds_by_source_of_estimate": {key[0]: s for key, s in plan.estimate.seconds_by("kind").items()},
            "collectives": _collectives(plan.estimate),
            "largest_costs": _largest_costs(plan.estimate),
            "not_understood": dict(plan.estimate.unknown),
        }
    assert step.shortage is not None
    if plan.kind == "train":
        fields["advice"] = advice(config, topology.num_devices, plan.limit_gib, step.shortage.needed_gib)
    return fields | {"message": step.shortage.message}


def to_text(plan: StepPlan) -> str:
    """One page."""
    topology, slices = plan.topology, plan.topology.slices
    axes = " x ".join(f"{name} {size}" for name, size in plan.mesh.items() if size > 1) or "one device"
    mark = "" if plan.fits else f"  DOES NOT FIT: {plan.hbm_gib - plan.limit_gib:.1f} GiB too much"
    lines = [
        f"{plan.config.name} on {topology.name}{f', {slices} slices' if slices > 1 else ''}: "
        f"{topology.chips} chips, {topology.num_devices} devices",
        f"  {plan.kind}; mesh {axes}; {_shape(plan)}",
        "",
        f"parameters   {parameter_count(plan.config.model):,}",
        f"model FLOPs  {plan.flops:.3g} per step with all slots full",
        "",
        f"HBM          {plan.hbm_gib:.2f} GiB of {plan.limit_gib:.2f} on each device{mark}",
    ]
    if not plan.fits:
        known = "by arithmetic" if plan.kind == "train" else "the arguments"
        lines.append(f"  {known}, because the compiler gives only the total:")
    lines += [f"  {name:<12} {value:8.2f}" for name, value in dataclasses.asdict(plan.memory).items()]
    lines += ["", *(_shortage_lines(plan) if plan.estimate is None else _time_lines(plan, plan.estimate)), ""]
    lines.append(f"compiled in {plan.step.seconds:.0f} s, with at most {plan.step.host_gib:.1f} GiB of host memory")
    return "\n".join(lines)


def policies(numerics: NumericsConfig) -> str:
    """The rematerialisation policies of decoder and encoder; one if they are equal."""
    own = numerics.policy_of_encoder
    return numerics.remat if own == numerics.remat else f"{numerics.remat}, encoder {own}"


def _shape(plan: StepPlan) -> str:
    batch, rows, mesh = plan.config.batch, rows_at_once(plan.kind, plan.config), plan.mesh
    per_device = batch.rows / batch.accumulation / math.prod(list(mesh.values())[:3])
    if plan.kind == "decode":
        return f"{rows:,} sequences with caches of {batch.tokens:,} tokens, {per_device:g} per group of devices"
    shape = f"{rows:,} rows of {batch.tokens:,} tokens, {batch.global_views} global views and {batch.crops} crops"
    if plan.kind != "train":
        return f"{shape}, {per_device:g} per group of devices"
    parts = f"in {batch.accumulation} part(s) of {per_device:g} rows per device"
    return f"{shape}, {parts}; remat {policies(plan.config.numerics)}"


def _time_lines(plan: StepPlan, estimate: Estimate) -> Iterator[str]:
    tokens, images, mfu, seconds = plan.tokens_per_second, plan.images_per_second, plan.mfu, estimate.seconds
    assert tokens is not None and mfu is not None
    unit, short, scale = ("seconds", "s", 1.0) if seconds >= 1 else ("milliseconds", "ms", 1e3)
    yield f"step         {scale * seconds:.3f} {short} by the compiler's estimate, MFU {mfu:.1%}"
    a_chip = human_number(tokens / plan.topology.chips)
    yield f"             {human_number(tokens)} tokens/s ({a_chip} per chip), {human_number(tokens * _DAY)} per day"
    if images is not None:
        yield f"             {human_number(images)} images/s, {human_number(images * _DAY)} per day"
    if plan.kind == "train":
        yield f"             {_REFERENCE_TOKENS / tokens / _DAY:,.1f} days for 1.2T tokens"
    yield from ("", f"  {unit:<43} {'forward':>9} {'recomp.':>9} {'backward':>9} {'all':>9}")
    for part, row in _by_part(estimate).items():
        if total := sum(row.values()):
            cells = "".join(f" {scale * row[direction]:9.4f}" for direction in _DIRECTIONS)
            yield f"  {part:<43}{cells} {scale * total:9.4f}"
    yield from ("", "  collectives                 times     group   GB sent    on wire   exposed")
    for name, row in _collectives(estimate).items():
        yield (
            f"  {name:<22} {row['times']:>10,} {row['largest_group']:>9,} {row['wire_gb']:9.2f} "
            f"{scale * row['seconds']:9.4f} {scale * row['exposed_seconds']:9.4f}"
        )
    yield from ("", "  largest costs")
    for row in _largest_costs(estimate):
        yield f"  {scale * row['seconds']:9.4f}  {row['part']:<20.20} {row['what']:<28.28} {row['source']}"
    by_kind = {key[0]: spent for key, spent in estimate.seconds_by("kind").items()}
    shares = [f"{_RESTS_ON[kind]} {spent / seconds:.1%}" for kind, spent in by_kind.items() if spent]
    yield from ("", f"rests on: {', '.join(shares)}")
    for what, count in estimate.unknown.items():
        yield f"NOT UNDERSTOOD, {count} times: {what}"
    yield "not included: stalls inside operations, stragglers, host input, checkpoints"


def _by_part(estimate: Estimate) -> dict[str, dict[str, float]]:
    found = estimate.seconds_by("part", "direction")
    return {
        part: {direction: found.get((part, direction), 0.0) for direction in _DIRECTIONS}
        for part in PARTS
        if any((part, direction) in found for direction in _DIRECTIONS) or part == EXPOSED_COLLECTIVES
    }


def _collectives(estimate: Estimate) -> dict[str, dict[str, float]]:
    rows: dict[str, dict[str, float]] = {}
    for traffic in estimate.traffic:
        row = rows.setdefault(
            traffic.kind, {"times": 0, "largest_group": 0, "wire_gb": 0.0, "seconds": 0.0, "exposed_seconds": 0.0}
        )
        row["times"] += traffic.times
        row["largest_group"] = max(row["largest_group"], traffic.group)
        row["wire_gb"] += traffic.wire_bytes / 1e9
        row["seconds"] += traffic.seconds
        row["exposed_seconds"] += traffic.exposed
    return dict(sorted(rows.items(), key=lambda entry: -entry[1]["seconds"]))


def _largest_costs(estimate: Estimate, count: int = 10) -> list[dict[str, Any]]:
    """The costs by source line and part, largest first, each with its main JAX primitive or collective."""
    lines: dict[tuple[str, str, str], dict[str, float]] = {}
    for cost in estimate.costs:
        operation = cost.operation
        what = operation.opcode.removesuffix("-done") if cost.kind == "collective" else cost.scope.rpartition("/")[2]
        seconds = lines.setdefault((_place(operation), cost.part, cost.kind), {})
        seconds[what or operation.opcode] = seconds.get(what or operation.opcode, 0.0) + cost.seconds
    rows = []
    for (source, part, kind), seconds in sorted(lines.items(), key=lambda line: -sum(line[1].values()))[:count]:
        what = max(seconds, key=lambda name: seconds[name])
        rows.append({"source": source, "part": part, "kind": kind, "what": what, "seconds": sum(seconds.values())})
    return rows


def _place(operation: Operation) -> str:
    """ "stepjax/models/qwen3.py:84", or the compiler's name without a source line."""
    if operation.source is None:
        return f"({operation.name})"
    file, line = operation.source
    relative = os.path.relpath(file)
    return f"{file if relative.startswith('..') else relative}:{line}"


def _shortage_lines(plan: StepPlan) -> list[str]:
    assert plan.step.shortage is not None
    if plan.kind != "train":
        return ["what would help: more devices, a larger mesh.tensor, fewer rows at a time, or shorter rows"]
    found = advice(plan.config, plan.topology.num_devices, plan.limit_gib, plan.step.shortage.needed_gib)
    found = found or ["nothing that divides this batch; use more devices, or fewer tokens or views per row"]
    return ["what would help, by arithmetic (plan again to be sure):", *(f"  {line}" for line in found)]


def advice(config: PretrainConfig, num_devices: int, limit_gib: float, needed_gib: float | None) -> list[str]:
    """Changes that would save device memory, each with the amount by arithmetic.

    The smallest sufficient change comes first. Of the insufficient ones, lists only the three that save most.
    """
    now = predict_memory(config, num_devices).total
    enough, short = [], []
    for label, other in _alternatives(config, num_devices):
        saved = now - predict_memory(other, num_devices).total
        left = max(needed_gib or 0.0, now) - saved
        if left < 0.9 * limit_gib:
            enough.append((saved, f"{label}: about {saved:.1f} GiB less, fits"))
        elif left <= limit_gib:
            short.append((left, f"{label}: about {saved:.1f} GiB less, barely fits"))
        elif saved > 0.01 * now:
            short.append((left, f"{label}: about {saved:.1f} GiB less, still {left - limit_gib:.1f} GiB too much"))
    return [line for _, line in sorted(enough) + sorted(short)[:3]]


def _alternatives(config: PretrainConfig, num_devices: int) -> Iterator[tuple[str, PretrainConfig]]:
    """Alternative configurations, labelled with their overrides."""

    def changed(section: str, why: str, **values: Any) -> tuple[str, PretrainConfig]:
        overrides = " ".join(f"--{section}.{name} {value}" for name, value in values.items())
        other = dataclasses.replace(getattr(config, section), **values)
        return f"{overrides} ({why})" if why else overrides, dataclasses.replace(config, **{section: other})

    batch, numerics = config.batch, config.numerics
    slices, data, fsdp, _, _ = config.mesh.shape(num_devices)
    groups = slices * data * fsdp
    for factor in (2, 4, 8, 16, 32, 64):
        parts = batch.accumulation * factor
        if batch.rows % (parts * groups) == 0:
            yield changed("batch", f"the same step in {parts} parts", accumulation=parts)
    for factor in (2, 4, 8, 16):
        rows = batch.rows // factor
        if rows and rows % (batch.accumulation * groups) == 0:
            yield changed("batch", "a smaller global batch with fewer pixels", rows=rows)
    for field in ("encoder_remat", "remat"):
        if getattr(numerics, field) not in ("full", None):
            yield changed("numerics", "", **{field: "full"})
    if numerics.attention == "xla":
        yield changed("numerics", "a kernel that does not store the scores", attention="auto")
    if data > 1:
        yield changed("mesh", "no copies of the parameters", data=1, fsdp=-1)
    if batch.crops > 1:
        yield changed("batch", "half the crop slots of a row", crops=math.ceil(batch.crops / 2))
