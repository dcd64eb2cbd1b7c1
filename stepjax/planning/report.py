"""A plan in words and in JSON."""

import dataclasses
from typing import Any

from stepjax.config import NumericsConfig
from stepjax.figures import human_number
from stepjax.planning.memory import advice
from stepjax.planning.parts import COLLECTIVES, PARTS
from stepjax.planning.plan import REFERENCE_TOKENS, Plan
from stepjax.planning.work import rows_at_once

_DIRECTIONS = ("forward", "recomputed", "backward")


def to_json(plan: Plan) -> dict[str, Any]:
    """Every figure of a plan; sizes in GiB of one device, times in seconds. What is unknown is null."""
    facts, config, step = plan.topology.facts, plan.config, plan.step
    fields: dict[str, Any] = {
        "name": config.name,
        "step": plan.kind,
        "topology": plan.topology.name,
        "slices": plan.topology.slices,
        "chips": plan.topology.chips,
        "devices": plan.topology.num_devices,
        "mesh": plan.mesh,
        "remat": config.numerics.remat,
        "encoder_remat": config.numerics.policy_of_encoder,
        "batch": dataclasses.asdict(config.batch),
        "parameters": plan.parameters,
        "fits": plan.fits,
        "hbm_gib": _rounded(plan.hbm_gib),
        "hbm_limit_gib": plan.limit_gib,
        "hbm_gib_by_kind": {name: _rounded(value) for name, value in dataclasses.asdict(plan.memory).items()},
        "hbm_source": "compiler" if plan.fits else "compiler's refusal, kinds by arithmetic",
        "model_flops_per_step": plan.flops,
        "peak_flops_per_device": facts.peak_flops,
        "estimated_step_seconds": None,
        "estimated_mfu": None,
        "tokens_per_step": plan.tokens_per_step,
        "tokens_per_second": None,
        "tokens_per_second_per_chip": None,
        "images_per_second": None,
        "days_for_1_2t_tokens": None,
        "compile_seconds": _rounded(step.seconds),
        "host_memory_gib": _rounded(step.host_gib),
    }
    if plan.estimate is None:
        assert step.shortage is not None
        needed = step.shortage.needed_gib
        if plan.kind == "train":
            fields["advice"] = advice(config, plan.topology.num_devices, plan.limit_gib, needed)
        fields["message"] = step.shortage.message
        return fields
    rate = plan.tokens_per_step / plan.estimate.seconds
    return fields | {
        "estimated_step_seconds": plan.estimate.seconds,
        "estimated_mfu": plan.mfu,
        "tokens_per_second": rate,
        "tokens_per_second_per_chip": rate / plan.topology.chips,
        "images_per_second": plan.images_per_second,
        "days_for_1_2t_tokens": REFERENCE_TOKENS / rate / 86_400 if plan.kind == "train" else None,
        "seconds_by_part": _by_part(plan),
        "seconds_by_source_of_estimate": {k[0]: s for k, s in plan.estimate.seconds_by("kind").items()},
        "collectives": _collectives(plan),
        "largest_costs": [dataclasses.asdict(item) for item in plan.largest_costs()],
        "not_understood": dict(plan.estimate.unknown),
    }


def policies(numerics: NumericsConfig) -> str:
    """The rematerialisation policies of the two towers, in a word where they are the same."""
    own = numerics.policy_of_encoder
    return numerics.remat if own == numerics.remat else f"{numerics.remat}, of the encoder {own}"


def to_text(plan: Plan) -> str:
    """One page."""
    config, topology, batch = plan.config, plan.topology, plan.config.batch
    axes = " x ".join(f"{name} {size}" for name, size in plan.mesh.items() if size > 1) or "one device"
    per_device = batch.rows / batch.accumulation / _row_groups(plan)
    lines = [
        f"{config.name} on {topology.name}{f', {topology.slices} slices' if topology.slices > 1 else ''}: "
        f"{topology.chips} chips, {topology.num_devices} devices",
        f"  {plan.kind}; mesh {axes}; {_shape(plan, per_device)}",
        "",
        f"parameters   {plan.parameters:,}",
        f"model FLOPs  {plan.flops:.3g} a step with all slots full",
        "",
        *_memory_lines(plan),
        "",
    ]
    lines += _time_lines(plan) if plan.estimate is not None else _shortage_lines(plan)
    lines.append(f"compiled in {plan.step.seconds:.0f} s, with {plan.step.host_gib:.1f} GiB of host memory at most")
    return "\n".join(lines)


def _shape(plan: Plan, per_device: float) -> str:
    batch, rows = plan.config.batch, rows_at_once(plan.kind, plan.config)
    if plan.kind == "decode":
        return f"{rows:,} sequences with caches of {batch.tokens:,} tokens, {per_device:g} a group of devices"
    shape = f"{rows:,} rows of {batch.tokens:,} tokens, {batch.global_views} global views and {batch.crops} crops"
    if plan.kind != "train":
        return f"{shape}, {per_device:g} a group of devices"
    parts = f"in {batch.accumulation} part(s) of {per_device:g} rows a device"
    return f"{shape}, {parts}; remat {policies(plan.config.numerics)}"


def _memory_lines(plan: Plan) -> list[str]:
    mark = "" if plan.fits else f"  DOES NOT FIT: {plan.hbm_gib - plan.limit_gib:.1f} GiB too much"
    lines = [f"HBM          {plan.hbm_gib:.2f} GiB of {plan.limit_gib:.2f} on each device{mark}"]
    if not plan.fits:
        known = "by arithmetic" if plan.kind == "train" else "the arguments"
        lines.append(f"  {known}, since the compiler tells only the sum:")
    lines += [f"  {name:<12} {value:8.2f}" for name, value in dataclasses.asdict(plan.memory).items()]
    return lines


def _shortage_lines(plan: Plan) -> list[str]:
    shortage = plan.step.shortage
    assert shortage is not None
    if plan.kind != "train":
        return ["what would help: more devices, a larger mesh.tensor, fewer rows at a time or shorter ones", ""]
    lines = ["what would help, by arithmetic (plan again to be sure):"]
    found = advice(plan.config, plan.topology.num_devices, plan.limit_gib, shortage.needed_gib)
    if found:
        return [*lines, *(f"  {line}" for line in found), ""]
    return [*lines, "  nothing that this batch divides into: more devices, or fewer tokens or views a row", ""]


def _time_lines(plan: Plan) -> list[str]:
    estimate = plan.estimate
    assert estimate is not None and plan.mfu is not None
    assert plan.tokens_per_second is not None
    tokens, images, day = plan.tokens_per_second, plan.images_per_second, 86_400
    unit, scale = ("seconds", 1.0) if estimate.seconds >= 1 else ("milliseconds", 1e3)
    lines = [
        f"step         {_time(estimate.seconds)} by the compiler's estimate, MFU {plan.mfu:.1%}",
        f"             {human_number(tokens)} tokens/s ({human_number(tokens / plan.topology.chips)} a chip), "
        f"{human_number(tokens * day)} a day",
        *(
            []
            if images is None
            else [f"             {human_number(images)} images/s, {human_number(images * day)} a day"]
        ),
        *(
            [f"             {REFERENCE_TOKENS / tokens / day:,.1f} days for 1.2T tokens"]
            if plan.kind == "train"
            else []
        ),
        "",
        f"  {unit:<43} {'forward':>9} {'recomp.':>9} {'backward':>9} {'all':>9}",
    ]
    by = _by_part(plan)
    for part in PARTS:
        row = by.get(part)
        if row and sum(row.values()):
            cells = "".join(f" {scale * row.get(direction, 0):9.4f}" for direction in _DIRECTIONS)
            lines.append(f"  {part:<43}{cells} {scale * sum(row.values()):9.4f}")
    lines += ["", "  collectives                 times     group   GB sent    on wire   exposed"]
    for name, row in _collectives(plan).items():
        lines.append(
            f"  {name:<22} {row['times']:>10,} {row['largest_group']:>9,} {row['wire_gb']:9.2f} "
            f"{scale * row['seconds']:9.4f} {scale * row['exposed_seconds']:9.4f}"
        )
    lines += ["", "  largest costs"]
    for item in plan.largest_costs():
        lines.append(f"  {scale * item.seconds:9.4f}  {item.part:<20.20} {item.what:<28.28} {item.source}")
    lines += ["", *_trust_lines(plan)]
    return lines


def _trust_lines(plan: Plan) -> list[str]:
    estimate = plan.estimate
    assert estimate is not None
    by = {key[0]: seconds for key, seconds in estimate.seconds_by("kind").items()}
    names = {
        "cycles": "the compiler's cycles",
        "attention kernel": "attention kernels' static schedules",
        "kernel": "what other kernels state",
        "bytes": "bytes moved",
        "collective": "bytes on the wires",
        "copy": "waits for copies",
        "sparsecore": "waits for the SparseCore",
    }
    shares = [f"{names[kind]} {seconds / estimate.seconds:.1%}" for kind, seconds in by.items() if seconds]
    lines = [f"rests on: {', '.join(shares)}"]
    lines += [f"NOT UNDERSTOOD, {count} times: {what}" for what, count in estimate.unknown.items()]
    return [*lines, "does not see: stalls inside operations, stragglers, the host's input, checkpoints", ""]


def _by_part(plan: Plan) -> dict[str, dict[str, float]]:
    assert plan.estimate is not None
    found = plan.estimate.seconds_by("part", "direction")
    return {
        part: {direction: found.get((part, direction), 0.0) for direction in _DIRECTIONS}
        for part in PARTS
        if any((part, direction) in found for direction in _DIRECTIONS) or part == COLLECTIVES
    }


def _collectives(plan: Plan) -> dict[str, dict[str, float]]:
    assert plan.estimate is not None
    rows: dict[str, dict[str, float]] = {}
    for traffic in plan.estimate.traffic:
        row = rows.setdefault(
            traffic.kind, {"times": 0, "largest_group": 0, "wire_gb": 0.0, "seconds": 0.0, "exposed_seconds": 0.0}
        )
        row["times"] += traffic.times
        row["largest_group"] = max(row["largest_group"], traffic.group)
        row["wire_gb"] += traffic.wire_bytes / 1e9
        row["seconds"] += traffic.seconds
        row["exposed_seconds"] += traffic.exposed
    return dict(sorted(rows.items(), key=lambda entry: -entry[1]["seconds"]))


def _row_groups(plan: Plan) -> int:
    slices, data, fsdp, _, _ = plan.config.mesh.shape(plan.topology.num_devices)
    return slices * data * fsdp


def _time(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 1 else f"{1e3 * seconds:.3f} ms"


def _rounded(value: float) -> float:
    return round(value, 3)
