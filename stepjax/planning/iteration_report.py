"""The plan of an iteration as text and as JSON."""

import math
from collections.abc import Iterator
from typing import Any

from stepjax.planning.iteration import CACHE, PARTS, IterationPlan, Phase
from stepjax.sharding import MESH_AXES

_HOUR, _DAY = 3600, 86_400


def to_json(plan: IterationPlan) -> dict[str, Any]:
    """Every figure of a plan; sizes in GiB per device, times in seconds. Unknown values are null."""
    config, topology, seconds = plan.config, plan.topology, plan.seconds
    return {
        "name": config.name,
        "topology": topology.name,
        "slices": topology.slices,
        "chips": topology.chips,
        "devices": topology.num_devices,
        "mesh": _mesh(plan),
        "prompts": config.rollout.prompts,
        "samples": config.rollout.samples,
        "answer_tokens": plan.work.answer_tokens,
        "prompt_tokens": config.max_prompt_tokens,
        "sequences_at_once": plan.work.at_once,
        "fits": plan.fits,
        "fits_without_engine_cache": plan.fits_without_cache,
        "hbm_limit_gib": plan.limit_gib,
        "held_gib": {name: round(size, 3) for name, size in plan.held.items()},
        "programs": {phase.name: _phase(plan, phase) for phase in plan.phases},
        "iteration_seconds": seconds,
        "seconds_by_part": {part: plan.seconds_of(part) for part in PARTS},
        "iterations_per_hour": None if seconds is None else _HOUR / seconds,
        "days": None if seconds is None else config.iterations * seconds / _DAY,
        "compile_seconds": round(sum(phase.step.seconds for phase in plan.phases), 3),
    }


def _phase(plan: IterationPlan, phase: Phase) -> dict[str, Any]:
    hbm, estimate = phase.hbm_gib, phase.estimate
    return {
        "fits": plan.phase_fits(phase),
        "hbm_gib": None if hbm is None else round(hbm, 3),
        "own_gib": None if phase.own_gib is None else round(phase.own_gib, 3),
        "calls": phase.calls,
        "seconds_per_call": None if estimate is None else estimate.seconds,
        "seconds": phase.seconds,
        "not_understood": {} if estimate is None else dict(estimate.unknown),
    }


def _mesh(plan: IterationPlan) -> dict[str, int]:
    return dict(zip(MESH_AXES, plan.config.mesh.shape(plan.topology.num_devices), strict=True))


def to_text(plan: IterationPlan) -> str:
    """One page."""
    config, topology, work, rollout = plan.config, plan.topology, plan.work, plan.config.rollout
    axes = " x ".join(f"{name} {size}" for name, size in _mesh(plan).items() if size > 1) or "one device"
    slices = f", {topology.slices} slices" if topology.slices > 1 else ""
    lines = [
        f"{config.name} on {topology.name}{slices}: {topology.chips} chips, {topology.num_devices} devices",
        f"  iteration: {rollout.prompts:,} prompts x {rollout.samples} answers, of {config.max_prompt_tokens:,} and "
        f"{work.answer_tokens:,} tokens",
        f"  trainer: mesh {axes}; {config.batch.rows:,} rows of {config.batch.tokens:,} tokens a call; "
        f"remat {config.numerics.remat}",
        f"  {topology.num_devices // rollout.tensor} engines of {rollout.tensor} device(s), {work.at_once:,} sequences "
        f"at once in each, with {work.cached:,} tokens in the middle of their answers",
        "",
        f"HBM held all the time, {sum(plan.held.values()):.2f} GiB of {plan.limit_gib:.2f} on each device",
        *(f"  {name:<20}{size:8.2f}" for name, size in plan.held.items()),
        "",
        f"  {'program':<14}{'GiB':>9}{'with all':>10}{'calls':>10}{'s a call':>11}{'s':>11}",
        *(_line(plan, phase) for phase in plan.phases),
        "",
        *_shortage_lines(plan),
        *_time_lines(plan),
    ]
    for phase in plan.phases:
        for what, count in phase.estimate.unknown.items() if phase.estimate else ():
            lines.append(f"NOT UNDERSTOOD in {phase.name}, {count} times: {what}")
    compiled = sum(phase.step.seconds for phase in plan.phases)
    host = max((phase.step.host_gib for phase in plan.phases), default=0.0)
    lines += [
        "not included: prefill, image encoding, rewards, handing over weights, host input, checkpoints, and that an",
        "engine has fewer and fewer sequences at the end",
        "",
        f"compiled in {compiled:.0f} s, with at most {host:.1f} GiB of host memory",
    ]
    return "\n".join(lines)


def _line(plan: IterationPlan, phase: Phase) -> str:
    def cell(value: float | None, width: int, digits: int) -> str:
        return f"{'?':>{width}}" if value is None else f"{value:>{width},.{digits}f}"

    mark = "" if plan.phase_fits(phase) else "  DOES NOT FIT"
    a_call = None if phase.estimate is None else phase.estimate.seconds
    return (
        f"  {phase.name:<14}{cell(phase.own_gib, 9, 2)}{cell(phase.hbm_gib, 10, 2)}{phase.calls:>10,}"
        f"{cell(a_call, 11, 4)}{cell(phase.seconds, 11, 1)}{mark}"
    )


def _time_lines(plan: IterationPlan) -> Iterator[str]:
    seconds = plan.seconds
    if seconds is None:
        return
    parts = {part: plan.seconds_of(part) or 0.0 for part in PARTS}
    shares = ", ".join(f"{part} {spent:,.0f} s ({spent / seconds:.0%})" for part, spent in parts.items())
    config = plan.config
    bound = "; at most, as all answers are the longest" if plan.work.answer_tokens == config.rollout.max_tokens else ""
    yield f"iteration    {seconds:,.0f} s by the compiler's estimate: {shares}{bound}"
    days = config.iterations * seconds / _DAY
    yield f"             {_HOUR / seconds:.2f} iterations an hour; {config.iterations:,} take {days:,.1f} days"


def _shortage_lines(plan: IterationPlan) -> Iterator[str]:
    if plan.fits:
        return
    cache, tokens = plan.held[CACHE], plan.cache_tokens
    if plan.fits_without_cache:
        yield f"every program fits if the engines drop their caches ({cache:.1f} GiB) while the trainer works"
    needed = [phase.hbm_gib for phase in plan.phases]
    # A smaller cache does not help a program that needs too much without it.
    helps = (
        all(CACHE not in phase.beside or phase.step.shortage is None for phase in plan.phases) and None not in needed
    )
    over = max(gib for gib in (*needed, 0.0) if gib is not None) - plan.limit_gib
    page = plan.config.rollout.page_size
    left = math.floor(tokens * (1 - over / cache) / page) * page
    if helps and left > plan.config.rollout.max_tokens + plan.config.max_prompt_tokens:
        yield f"what would help, by arithmetic: --rollout.cache-tokens {left} (now {tokens})"
    else:
        yield "what would help: shorter or fewer rows, fewer views, a larger rollout.tensor, more devices"
    yield ""
