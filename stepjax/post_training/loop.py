"""The run of `stepjax rl`, top to bottom: set up, resume; then sample, score, update and save in each iteration."""

import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from stepjax.config_file import to_json
from stepjax.data.packing import RowBudget
from stepjax.errors import CheckpointError, TrainingDivergedError
from stepjax.interop import init_from
from stepjax.models.step_vl import StepVL, num_parameters
from stepjax.post_training import advantages as to_advantages
from stepjax.post_training.config import RLConfig, UpdateConfig
from stepjax.post_training.episodes import Answer, Episode, Row, make_batch, pack_rows, read_back, rows_of_process
from stepjax.post_training.report import draw_curves, format_row, iteration_row, write_page
from stepjax.post_training.sampling import Collected, Collector
from stepjax.post_training.step import Programs, RLState, abstract_state, make_optimizers, new_state
from stepjax.processing.processor import Processor
from stepjax.progress import progress
from stepjax.sharding import check_batch, make_mesh
from stepjax.training.checkpoint import Checkpointer
from stepjax.training.host import compiler_options
from stepjax.training.interruption import StopRequest, Watchdog
from stepjax.training.loop import Outcome, make_processor, restore_or_init, to_devices
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
from stepjax.training.trackers import make_trackers

_log = logging.getLogger(__name__)


def reinforce(config: RLConfig, *, on_evaluation: Callable[[StepVL, Processor, int], None] | None = None) -> Outcome:
    """Trains until the last iteration or a signal; resumes from the last checkpoint if there is one.

    Prompts, sampling seeds and data order derive from the seed, and a checkpoint holds everything else, so a run that
    was killed and resumed has the same prompts, answers and parameters as an uninterrupted one.

    Args:
        on_evaluation: called every `evaluation.every` iterations with the model, its processor and the iteration.

    Raises:
        ConfigError, RecordError: the configuration or the data cannot be used.
        CheckpointError: the directory holds a run with another configuration, or a source of `init_from` does not fit.
        TrainingDivergedError: a loss or gradient is no longer finite; nothing is saved after the last good iteration.
        StepjaxError: rewards are missing for too many answers.
    """
    # Set up. User errors surface before anything is written.
    processor = make_processor(config)
    directory, local = run_directory(config), local_directory(config)
    mesh = make_mesh(config.mesh)
    check_batch(config.batch, mesh)
    rows_of_process(config.batch, mesh, jax.process_index())
    config.prompts_of_process(jax.process_count())
    optimizers = make_optimizers(config)
    if not (directory / "checkpoints").exists():
        init_from.plan_start(config)
    collector = Collector(config, processor, mesh)
    is_first = jax.process_index() == 0
    say = _log.info if is_first else _log.debug

    with contextlib.ExitStack() as stack:
        stack.enter_context(owned(local))
        stack.enter_context(jax.set_mesh(mesh))
        checkpointer = Checkpointer(directory / "checkpoints", keep=config.checkpoint.keep, config=to_json(config))
        stack.enter_context(explaining_disk_errors(checkpointer.directory))
        stack.callback(checkpointer.close)
        start = checkpointer.latest_step()
        make = partial(new_state, config=config, optimizers=optimizers)
        state, data_state, starts = restore_or_init(
            config, checkpointer, abstract_state(config, optimizers), make, mesh, start
        )
        reference = None
        if config.loss.kl:
            reference = init_from.initial_model(config, mesh)[0]
        if is_remote(config) and is_first:
            fetch(directory, local)
        trackers = make_trackers(config.logging, local, to_json(config), start)
        for tracker in trackers:
            stack.callback(tracker.close)
        say(
            f"{config.name}: {num_parameters(state.model):,} parameters, {config.iterations} iterations of "
            f"{config.rollout.prompts} prompts x {config.rollout.samples} answers on {mesh.size} "
            f"{jax.devices()[0].device_kind} device(s) and {len(collector.engines)} engine(s), in {directory}"
        )
        for line in init_from.describe(starts, config):
            say(line)
        if starts and is_first:
            (directory / INIT_FROM).write_text(json.dumps({each.part: each.to_json() for each in starts}, indent=1))
        if start is not None:
            say(f"resumed after iteration {start} from {checkpointer.directory}")
        trainer = Trainer(config, mesh, Programs(config, optimizers, compiler_options()), reference)
        answers = AnswerQueue(config, collector, directory, data_state)
        stack.callback(answers.close)
        stop = stack.enter_context(StopRequest())
        watchdog = stack.enter_context(Watchdog(config.heartbeat))
        shown = is_first and sys.stderr.isatty()
        first = start or 0
        bar = progress(config.iterations, unit="iteration", description=config.name, done=first, shown=shown)
        stack.enter_context(bar)

        step, stopped_by = first, None
        while step < config.iterations and stopped_by is None:
            began = time.monotonic()
            watchdog.at("data", step + 1)
            collected = answers.next(state.model, is_last=step + 1 == config.iterations)
            watchdog.at("step", step + 1)
            state, metrics = trainer.train(state, collected, step)
            step += 1
            bar.update()
            row = iteration_row(config, collected, metrics, seconds=time.monotonic() - began)
            if not all(math.isfinite(row[name]) for name in ("loss", "grad_norm") if name in row):
                raise TrainingDivergedError(
                    f"the loss or the gradient norm is not finite in iteration {step}; nothing was saved since. Start "
                    "a run with another --name and a lower policy.learning_rate, or look at this iteration's answers"
                )
            for tracker in trackers:
                tracker.log(step, row)
            if is_first:
                write_page(local, config, step, collected)
            stopped_by = stop.after(step, agree_every=1)
            if step % config.logging.every == 0 or step == config.iterations:
                say(format_row(step, config.iterations, row))
            last = step == config.iterations
            if last or step % config.checkpoint.every == 0 or stopped_by is not None:
                watchdog.at("saving", step + 1)
                checkpointer.save(step, state, answers.state(step))
                if is_remote(config) and is_first:
                    publish(directory, local)
            every = config.evaluation.every
            if on_evaluation is not None and every and step % every == 0 and not last and stopped_by is None:
                watchdog.at("evaluating", step + 1)
                on_evaluation(state.model, processor, step)
        checkpointer.wait()
        if is_first:
            draw_curves(local)
        stopped_by = stopped_by or stop.received
        if stopped_by is not None:
            say(f"{stopped_by.name}: saved iteration {step} in {directory}. Rerun the same command to resume.")
        return Outcome(state.model, processor, step, stopped_by.name if stopped_by else None, local)


class AnswerQueue:
    """The answers of each iteration: sampled when they are asked for or, one step off, during the iteration before."""

    def __init__(self, config: RLConfig, collector: Collector, directory: Any, state: dict[str, Any] | None):
        """
        Args:
            directory: of the run; answers that wait for their iteration when a checkpoint is saved go into waiting/.
            state: what `state` returned, from a checkpoint.

        Raises:
            CheckpointError: the data files have changed since, or the waiting answers are gone.
        """
        self._collector, self._one_step_off = collector, config.rollout.one_step_off
        self._waiting, self._checkpoints = directory / "waiting", directory / "checkpoints"
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="sampling")
        self._next: concurrent.futures.Future[Collected] | None = None
        self._cursor = 0  # after the iterations trained on
        if state is None:
            return
        if state["files"] != collector.prompts.files() and config.data.changed_files == "error":
            raise CheckpointError(
                "the data files of data.sources have changed since the checkpoint was saved: restore them, give the "
                "new run another --name, or pass --data.changed-files accept to go on with other prompts"
            )
        self._cursor = state["cursors"][jax.process_index()]
        if state["waiting"] is not None:
            path = self._path(state["waiting"])
            if not path.exists():
                raise CheckpointError(f"{path} is missing: it holds the answers that the next iteration trains on")
            self._next = concurrent.futures.Future()
            self._next.set_result(collector.from_json(json.loads(path.read_text())))

    def close(self) -> None:
        self._thread.submit(self._collector.close)
        self._thread.shutdown(wait=True)

    def next(self, model: StepVL, *, is_last: bool) -> Collected:
        """The answers to train on now; one step off, `model` answers the following ones."""
        if self._next is None:
            self._start(model, self._cursor)
        assert self._next is not None
        made = self._next.result()
        self._cursor, self._next = made.cursor, None
        if self._one_step_off and not is_last:
            self._start(model, made.cursor)
        return made

    def _start(self, model: StepVL, cursor: int) -> None:
        self._collector.engines.take(model)
        self._next = self._thread.submit(self._collector.collect, cursor)

    def state(self, step: int) -> dict[str, Any]:
        """State to checkpoint; first writes the answers that wait for the next iteration."""
        if self._next is not None:
            path = self._path(step)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self._collector.to_json(self._next.result())))
            kept = {each.name for each in self._checkpoints.iterdir()}
            for old in path.parent.iterdir():
                if old != path and old.name.split("-")[0] not in kept:
                    old.unlink(missing_ok=True)
        cursors = multihost_utils.process_allgather(np.array(self._cursor)).reshape(-1)
        return {
            "cursors": [int(cursor) for cursor in cursors],
            "files": self._collector.prompts.files(),
            "waiting": None if self._next is None else step,
        }

    def _path(self, step: int) -> Any:
        return self._waiting / f"{step}-{jax.process_index()}.json"


class Trainer:
    """The updates of an iteration."""

    def __init__(self, config: RLConfig, mesh: Mesh, programs: Programs, reference: StepVL | None):
        self._config, self._mesh, self._programs, self._reference = config, mesh, programs, reference
        self._budget = RowBudget.of(config.batch, config.images, config.numerics.compute_dtype)
        self._rows = rows_of_process(config.batch, mesh, jax.process_index())  # of a call

    def train(self, state: RLState, collected: Collected, step: int) -> tuple[RLState, dict[str, Any]]:
        """The state after the iteration, and what `iteration_row` reports of it."""
        config, began = self._config, time.monotonic()
        episodes = self._trained(collected.episodes)
        metrics: dict[str, Any] = {"episodes": episodes}
        if not _total(sum(len(episode.answers) for episode in episodes)):
            _log.warning(f"iteration {step + 1} has no answer to train on; the parameters stay as they are")
            return dataclasses.replace(state, step=state.step + 1), metrics
        if self._config.needs_scores:
            self._score(state, episodes)
        metrics["score_seconds"] = time.monotonic() - began
        self._set_advantages(episodes)
        trains_policy = not config.has_critic or step >= config.critic.warmup_iterations
        if config.has_critic and config.critic.trunk == "own":
            state = self._update_critic(state, episodes, metrics)
        if trains_policy:
            state = self._update_policy(state, episodes, metrics)
        metrics["update_seconds"] = time.monotonic() - began - metrics["score_seconds"]
        return dataclasses.replace(state, step=state.step + 1), metrics

    def _trained(self, episodes: Sequence[Episode]) -> list[Episode]:
        """The episodes without answers that have no reward, no tokens, or were cut off if those are not trained on."""
        drops_cut = self._config.advantages.overlong == "mask"

        def keeps(answer: Answer) -> bool:
            return (
                answer.scored.value is not None and len(answer.mask_L) > 0 and not (drops_cut and answer.is_truncated)
            )

        kept = [dataclasses.replace(each, answers=[a for a in each.answers if keeps(a)]) for each in episodes]
        return [episode for episode in kept if episode.answers]

    def _score(self, state: RLState, episodes: list[Episode]) -> None:
        for rows, batch in self._calls(episodes):
            found = self._programs.scores(state.model, self._reference, state.critic, batch)
            for field, values_BT in found.items():
                read_back(rows, field, _local(values_BT))

    def _set_advantages(self, episodes: list[Episode]) -> None:
        config, limit = self._config.advantages, self._config.rollout.max_tokens
        for episode in episodes:
            rewards = [
                float(answer.scored.value or 0) + to_advantages.overlong_penalty(len(answer.mask_L), limit, config)
                for answer in episode.answers
            ]
            if config.estimator == "gae":
                for answer, reward in zip(episode.answers, rewards, strict=True):
                    found = to_advantages.gae(
                        reward, answer.values_L, answer.mask_L, gamma=config.gamma, lam=config.lam
                    )
                    answer.advantages_L, answer.returns_L = found
            else:
                for answer, advantage in zip(
                    episode.answers, to_advantages.group_advantages(rewards, config), strict=True
                ):
                    answer.advantages_L = np.where(answer.mask_L, advantage, 0.0)
        if config.whiten:
            answers = _answers(episodes)
            totals = _total(to_advantages.moments([a.advantages_L for a in answers], [a.mask_L for a in answers]))
            for answer in answers:
                answer.advantages_L = to_advantages.whitened(
                    answer.advantages_L, answer.mask_L, totals, config.least_std
                )

    def _update_policy(self, state: RLState, episodes: list[Episode], metrics: dict[str, Any]) -> RLState:
        config, programs = self._config, self._programs
        shared = state.critic if config.has_critic and config.critic.trunk == "shared" else None
        for part in self._parts(episodes, config.policy, config.loss.aggregation):
            total = programs.zeros((state.model, shared))
            for rows, batch in self._calls(part):
                total, (sums, log_probs_BT) = programs.policy(
                    total, state.model, shared, batch, is_first=not self._config.needs_scores
                )
                _collect_sums(metrics, sums)
                if not config.needs_scores:
                    read_back(rows, "old_L", _local(log_probs_BT))
            model, opt_state, *norms = programs.apply_policy(state.model, state.opt_state, total[0])
            state = dataclasses.replace(state, model=model, opt_state=opt_state)
            if shared is not None:
                shared, critic_opt_state, *_ = programs.apply_critic(shared, state.critic_opt_state, total[1])
                state = dataclasses.replace(state, critic=shared, critic_opt_state=critic_opt_state)
            metrics.setdefault("norms", []).append(norms)
        return state

    def _update_critic(self, state: RLState, episodes: list[Episode], metrics: dict[str, Any]) -> RLState:
        for part in self._parts(episodes, self._config.critic.update, "token"):
            total = self._programs.zeros(state.critic)
            for _, batch in self._calls(part):
                total, sums = self._programs.critic(total, state.critic, batch)
                _collect_sums(metrics, sums)
            critic, opt_state, *_ = self._programs.apply_critic(state.critic, state.critic_opt_state, total)
            state = dataclasses.replace(state, critic=critic, critic_opt_state=opt_state)
        return state

    def _parts(self, episodes: list[Episode], update: UpdateConfig, aggregation: Any) -> Iterator[list[Episode]]:
        """The episodes of each optimiser step, with the weights of their tokens."""
        for _ in range(update.passes):
            for place in range(update.minibatches):
                part = episodes[place :: update.minibatches]
                answers = _answers(part)
                tokens, count = _total(np.array([sum(a.mask_L.sum() for a in answers), len(answers)], np.float64))
                for answer in answers:
                    answer.weights_L = to_advantages.token_weights(
                        answer.mask_L,
                        aggregation,
                        tokens=tokens,
                        answers=count,
                        longest=self._config.rollout.max_tokens,
                    )
                yield part

    def _calls(self, episodes: list[Episode]) -> Iterator[tuple[list[Row], dict[str, jax.Array]]]:
        """The rows of each call of the trainer, and their arrays on the devices. All processes make as many calls."""
        rows = pack_rows(episodes, self._budget)
        count = math.ceil(len(rows) / self._rows)
        if jax.process_count() > 1:
            count = int(np.max(multihost_utils.process_allgather(np.array(count))))
        for place in range(count):
            own = rows[place * self._rows : (place + 1) * self._rows]
            padded: list[Row] = [*own, *([] for _ in range(self._rows - len(own)))]
            yield own, to_devices(make_batch(padded, self._budget), self._mesh)


def _answers(episodes: Sequence[Episode]) -> list[Answer]:
    return [answer for episode in episodes for answer in episode.answers]


def _total(value: Any) -> Any:
    """The sum over all processes."""
    if jax.process_count() == 1:
        return value
    return np.sum(multihost_utils.process_allgather(np.asarray(value)), axis=0)


def _local(values_BT: jax.Array) -> np.ndarray:
    """The rows of this process, in order."""
    if values_BT.is_fully_addressable:
        return np.asarray(values_BT)
    shards = {shard.index[0].start or 0: shard.data for shard in values_BT.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def _collect_sums(metrics: dict[str, Any], sums: dict[str, jax.Array]) -> None:
    for name, value in sums.items():
        metrics.setdefault("sums", {}).setdefault(name, []).append(value)
