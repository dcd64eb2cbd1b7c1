"""The pretraining run, top to bottom: set up, resume, train, save."""

import contextlib
import dataclasses
import json
import logging
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from stepjax.chips import peak_flops
from stepjax.config import PretrainConfig, RunConfig
from stepjax.config_file import differences, from_json, to_json
from stepjax.data.loader import Loader
from stepjax.data.packing import StreamState
from stepjax.errors import CheckpointError, ConfigError
from stepjax.interop import init_from
from stepjax.interop.adapters import base_digests, check_base
from stepjax.models.step_vl import StepVL, num_parameters
from stepjax.processing.processor import Processor
from stepjax.progress import progress
from stepjax.sharding import check_batch, make_mesh, rows_here, shardings, spec
from stepjax.training.checkpoint import Checkpointer, read_meta
from stepjax.training.host import compiler_options
from stepjax.training.interruption import StopRequest, Watchdog
from stepjax.training.metrics import Meter, Profile, fetch_rows, format_line, interval_means
from stepjax.training.optimizer import learning_rate, make_optimizer
from stepjax.training.run_directory import (
    INIT_FROM,
    explaining_disk_errors,
    fetch,
    is_remote,
    local_directory,
    owned,
    publish,
    run_directory,
)
from stepjax.training.step import (
    TrainState,
    abstract_state,
    abstract_trained,
    calibrated,
    initial_state,
    make_train_step,
    whole_model,
)
from stepjax.training.trackers import make_trackers

_log = logging.getLogger(__name__)

State = TypeVar("State")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a run."""

    model: StepVL
    processor: Processor
    step: int
    stopped_by: str | None  # name of the signal that ended the run early
    directory: Path  # on this machine


def make_processor(config: RunConfig) -> Processor:
    """The processor of a run.

    Raises:
        ConfigError: the tokenizer has more ids than the model has embeddings.
    """
    processor = Processor.from_config(config.images, config.tokenizer)
    size, vocab_size = processor.tokenizer.vocab_size, config.model.decoder.vocab_size
    if size > vocab_size:
        raise ConfigError(
            f"model.decoder.vocab_size={vocab_size}: the tokenizer has {size} ids; raise it to at least that"
        )
    return processor


def pretrain(
    config: PretrainConfig,
    *,
    on_evaluation: Callable[[StepVL, Processor, int], None] | None = None,
) -> Outcome:
    """Trains until the schedule ends or a signal asks to stop; resumes from the last checkpoint if there is one.

    Every step is a pure function of the state and the batch, keys derive from the seed, and the data position is saved
    with the state, so a run that was killed and resumed has the same losses as an uninterrupted one.

    Args:
        on_evaluation: called every `evaluation.every` steps with the model, its processor and the step.

    Raises:
        ConfigError, RecordError: the configuration or the data cannot be used.
        CheckpointError: the directory holds a run with another configuration, or a source of `init_from` does not fit.
        TrainingDivergedError: the loss or gradients are no longer finite; nothing is saved after the last good check.
    """
    began = time.monotonic()
    # Set up. User errors surface before anything is written.
    processor = make_processor(config)
    directory, local = run_directory(config), local_directory(config)
    mesh = make_mesh(config.mesh)
    schedule = learning_rate(config.schedule, config.tokens_per_step)
    optimizer = make_optimizer(config.optimizer, schedule, abstract_trained(config))
    check_batch(config.batch, mesh)
    if not (directory / "checkpoints").exists():
        init_from.plan_start(config)
    train_step = make_train_step(config, optimizer, schedule)
    train_step = jax.jit(train_step, donate_argnums=0, compiler_options=compiler_options())
    is_first = jax.process_index() == 0
    say = _log.info if is_first else _log.debug

    with contextlib.ExitStack() as stack:
        stack.enter_context(owned(local))  # before touching any of its files
        stack.enter_context(jax.set_mesh(mesh))
        checkpointer = Checkpointer(directory / "checkpoints", keep=config.checkpoint.keep, config=to_json(config))
        stack.enter_context(explaining_disk_errors(checkpointer.directory))
        stack.callback(checkpointer.close)

        # Resume from the last checkpoint, or start from random parameters or from `init_from`.
        start = checkpointer.latest_step()
        abstract, make = abstract_state(config, optimizer), partial(initial_state, config=config, optimizer=optimizer)
        abstract = abstract if start is None else dataclasses.replace(abstract, base=None)  # it is not saved
        state, data_state, starts = restore_or_init(config, checkpointer, abstract, make, mesh, start)
        state, of_base = _with_base(state, config, mesh, checkpointer.directory)
        own_rows = rows_here(mesh, config.batch.rows)
        loader = Loader(
            config.data,
            config.batch,
            config.images,
            processor,
            seed=config.seed,
            pixel_dtype=config.numerics.compute_dtype,
            rows=own_rows,
            state=data_state,
        )
        if is_remote(config) and is_first:
            fetch(directory, local)
        trackers = make_trackers(config.logging, local, to_json(config), start)
        for tracker in trackers:
            stack.callback(tracker.close)

        adapters = "" if state.base is None else f" on {num_parameters(state.base):,} frozen ones"
        say(
            f"{config.name}: {num_parameters(state.model):,} parameters{adapters}, {config.num_steps} steps of "
            f"{config.tokens_per_step:,} tokens on {mesh.size} {jax.devices()[0].device_kind} device(s), in {directory}"
        )
        for line in init_from.describe(starts, config):
            say(line)
        if starts and is_first:
            origins = {start.part: start.to_json() for start in starts}
            (directory / INIT_FROM).write_text(json.dumps(origins, indent=1))
        if start is not None:
            say(f"resumed at step {start} from {checkpointer.directory}")
        first_step = start or 0
        if first_step >= config.num_steps:
            say("the schedule has already ended; nothing to train")
            return Outcome(whole_model(state, config), processor, first_step, None, local)

        must_calibrate = start is None and config.model.tofc is not None
        must_calibrate &= not any(each.part == "tofc" and each.stored for each in starts)

        # Train. From here on the transfer guard forbids implicit transfers: a hidden sync would stall the device.
        meter = Meter(config, peak_flops(jax.devices()[0]), mesh.size, share=len(own_rows) / config.batch.rows)
        batches = iter(loader)
        stack.callback(batches.close)
        stop = StopRequest()
        watchdog = stack.enter_context(Watchdog(config.heartbeat))
        profile = stack.enter_context(Profile(config.logging.profile, local / "profile"))
        is_shown = is_first and sys.stderr.isatty()  # without a terminal the log lines are enough
        bar = progress(config.num_steps, unit="step", description=config.name, done=first_step, shown=is_shown)
        stack.enter_context(bar)
        stack.enter_context(jax.transfer_guard("disallow"))
        step, pending, saved_at, stopped_by = first_step, [], time.monotonic(), None
        while step < config.num_steps and stopped_by is None:
            profile.before(step + 1)
            watchdog.at("data", step + 1)
            batch = meter.wait_for(batches, pending[-1][1] if pending else None)
            watchdog.at("step", step + 1)
            arrays = to_devices(batch.arrays, mesh)
            if must_calibrate and step == 0:
                state = _calibrated(state, arrays, config)
            state, metrics = train_step(state, arrays)
            step += 1
            bar.update()
            profile.after(step, state)
            pending.append((step, metrics, batch.skipped))
            for skipped in batch.skipped:  # each process reports its own
                _log.info(f"skipped {skipped.name}: {skipped.reason}")
            if step == first_step + 1:
                # Exclude compilation from the rates. From now on a signal has a step to save.
                jax.block_until_ready(metrics)
                stack.enter_context(stop)
                say(f"first step done {time.monotonic() - began:.0f} s after the start, including compilation")
                meter.reset()

            # Read once per step: a signal that arrives during the code below takes effect after the next step.
            stopped_by = stop.after(step, agree_every=config.logging.every)
            last = step == config.num_steps
            save = last or step % config.checkpoint.every == 0 or stopped_by is not None
            if save or step % config.logging.every == 0:
                rows, pending = fetch_rows(config, pending), []
                speed = meter.summary()
                for row_step, row in rows:
                    logged = row if row_step < step else row | {f"speed/{key}": value for key, value in speed.items()}
                    for tracker in trackers:
                        tracker.log(row_step, logged)
                if last or step % config.logging.every == 0:
                    shown = {**rows[-1][1], **interval_means(rows), **speed}
                    shown["seconds_since_checkpoint"] = time.monotonic() - saved_at
                    _log.info(format_line(step, config.num_steps, shown))
            if save:
                watchdog.at("saving", step + 1)
                with jax.transfer_guard("allow"):  # saving copies the state to the host on purpose
                    data_state = loader.state(_all_streams(own_rows, batch.states))
                    checkpointer.save(step, dataclasses.replace(state, base=None), data_state, about=of_base)
                if is_remote(config) and is_first:
                    publish(directory, local)
                saved_at = time.monotonic()
            every = config.evaluation.every
            if on_evaluation is not None and every and step % every == 0 and not last and stopped_by is None:
                watchdog.at("evaluating", step + 1)
                with jax.transfer_guard("allow"), meter.paused():
                    on_evaluation(whole_model(state, config), processor, step)
        checkpointer.wait()
        stopped_by = stopped_by or stop.received  # one may have arrived during the last save
        if stopped_by is not None:
            say(f"{stopped_by.name}: saved step {step} in {checkpointer.directory}. Rerun the same command to resume.")
        with jax.transfer_guard("allow"):
            model = whole_model(state, config)
        return Outcome(model, processor, step, stopped_by.name if stopped_by else None, local)


def restore_or_init(
    config: RunConfig,
    checkpointer: Checkpointer,
    abstract: State,
    make: Callable[[StepVL], State],
    mesh: Mesh,
    start: int | None,
) -> tuple[State, dict[str, Any] | None, list[init_from.PartStart]]:
    """The state, the data position, and the sources of a new run's parameters.

    A resumed run does not look at those sources: they may be gone.

    Args:
        abstract: the state, with shapes in place of arrays.
        make: the state of a new run with this model, which it may donate.
        start: the step to restore; None for a new run.
    """
    layout = shardings(abstract, mesh)
    if start is None:
        model, starts = init_from.initial_model(config, mesh)
        # Donate the model, so that no device holds it twice.
        return jax.jit(make, out_shardings=layout, donate_argnums=0)(model), None, starts
    like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, layout)
    check_same_run(from_json(read_meta(checkpointer.directory)["config"]), config)
    state, data_state, _ = checkpointer.restore(like, start)
    return state, data_state, []


def _with_base(
    state: TrainState, config: RunConfig, mesh: Mesh, checkpoints: epath.Path
) -> tuple[TrainState, dict[str, Any]]:
    """The state with the frozen model of its adapters, if it trains those, and what checkpoints say of that model."""
    if config.adapters is None:
        return state, {}
    if state.base is not None:
        return state, base_digests(state.base)
    base, _ = init_from.initial_model(config, mesh)
    return dataclasses.replace(state, base=base), check_base(base, config, read_meta(checkpoints))


def _calibrated(state: TrainState, arrays: dict[str, jax.Array], config: PretrainConfig) -> TrainState:
    """The state with its codec fitted to the first batch; the caller gives the state away.

    Raises:
        ConfigError: the batch has no image.
    """
    layout = jax.tree.map(lambda x: x.sharding, state), None
    fit = jax.jit(partial(calibrated, config=config), donate_argnums=0, out_shardings=layout)
    state, count = fit(state, arrays)
    if not jax.device_get(count):
        raise ConfigError(
            f"batch.rows={config.batch.rows}: the first batch has no image to fit the codec to; raise it, or the "
            "weights of sources with images"
        )
    return state


# What may change on resume: the directory, the output, the sharding, and when to save.
_MAY_CHANGE = ("name", "out", "logging", "checkpoint", "mesh", "evaluation", "heartbeat")
_MAY_CHANGE += ("data.num_workers", "data.prefetch", "data.bad_records", "data.changed_files")


def check_same_run(saved: RunConfig, current: RunConfig) -> None:
    changes = differences(current, saved)
    decisive = [line for line in changes if not line.startswith(tuple(f"{s}{p}" for s in _MAY_CHANGE for p in ".:"))]
    if decisive:
        raise CheckpointError(
            f"this directory holds a run with another configuration: {'; '.join(decisive)}. Restore the old values, or "
            f"give the new run another --name"
        )


def to_devices(arrays: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """A host batch on the devices, sharded over the data axes; each process supplies its own rows."""

    def put(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(NamedSharding(mesh, spec("batch")), x)

    with jax.transfer_guard("allow"):  # with several processes JAX counts this as an implicit transfer
        return {name: put(x) for name, x in arrays.items()}


def _all_streams(rows: list[int], states: tuple[StreamState, ...]) -> list[StreamState]:
    """The stream positions of all processes, in row order."""
    if jax.process_count() == 1:
        return list(states)
    text = np.frombuffer(json.dumps(dict(zip(rows, states, strict=True))).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(text.size))
    texts = multihost_utils.process_allgather(np.pad(text, (0, int(np.max(sizes)) - text.size)))
    parts = [json.loads(bytes(row[:size])) for row, size in zip(texts, sizes, strict=True)]
    streams = {int(row): state for part in parts for row, state in part.items()}
    return [streams[row] for row in sorted(streams)]
