"""The answers of an iteration: prompts from the data, rollouts from engines on the trainer's devices, rewards.

Each process takes every P-th prompt of an endless shuffled stream (P processes) and samples with engines on its own
devices. Prompt i, its seed and the engine that answers it depend on i alone, so a run that is killed and resumed
samples the same answers.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from stepjax.config import MeshConfig
from stepjax.data.packing import MAX_SKIPPED, RowBudget
from stepjax.data.records import Records, open_source
from stepjax.errors import CheckpointError, ConfigError, RecordError
from stepjax.inference import programs
from stepjax.inference.async_engine import AsyncEngine
from stepjax.inference.config import EngineConfig
from stepjax.inference.engine import Engine
from stepjax.inference.output import completions
from stepjax.inference.request import Completion, Delta, SamplingParams
from stepjax.interop.load import load
from stepjax.interop.text_processor import AnyProcessor
from stepjax.models.step_vl import StepVL
from stepjax.post_training.advantages import is_mixed
from stepjax.post_training.config import RLConfig
from stepjax.post_training.episodes import Answer, Episode
from stepjax.processing.processor import Processor
from stepjax.rewards.config import JudgeConfig
from stepjax.rewards.scorer import Group, Scored, Scorer
from stepjax.rollouts.engine import EngineSampler, rollout_of
from stepjax.rollouts.rollout import Rollout
from stepjax.sharding import data_parts, engines_mesh, make_mesh, shardings

# Prompts -------------------------------------------------------------------------------------------------------------


class Prompts:
    """The endless stream of prompts, with random access: prompt i depends only on (sources, seed, i)."""

    def __init__(self, config: RLConfig, processor: Processor):
        """
        Raises:
            ConfigError: there are no sources.
            RecordError: a source cannot be opened.
        """
        if not config.data.sources:
            raise ConfigError("data.sources=(): name at least one source of prompts")
        self._config, self._processor = config, processor
        self._sources: list[Records] = [open_source(source, config.seed) for source in config.data.sources]
        datasets = []
        for number, records in enumerate(self._sources):
            dataset = grain.MapDataset.range(len(records)).seed(config.seed + number).shuffle().repeat()
            datasets.append(dataset.map(lambda place, number=number: (number, int(place))))
        self._places: Any = grain.MapDataset.mix(datasets, [source.weight for source in config.data.sources])
        budget = RowBudget.of(config.batch, config.images)
        self._views = budget.global_views, budget.crops

    def files(self) -> dict[str, Any]:
        """What a checkpoint keeps of the data, to notice that it has changed."""
        sources = self._config.data.sources
        return {source.name: records.files() for source, records in zip(sources, self._sources, strict=True)}

    def __getitem__(self, index: int) -> Episode | str:
        """Prompt `index`, without answers; or, if it cannot be used, the reason.

        Raises:
            RecordError: the record is malformed, unless `data.bad_records` is "skip".
        """
        number, place = self._places[index]
        name = f"{self._config.data.sources[number].name}/{place}"
        try:
            record = self._sources[number][place]
            messages = record.get("messages")
            if not isinstance(messages, list) or not messages:
                raise RecordError(f"record {record['id']!r} has no messages: a prompt for sampling is a conversation")
            if messages[-1].get("role") == "assistant":
                messages = messages[:-1]
            prompt = self._processor.process_prompt(messages, tools=record.get("tools"), name=record["id"])
        except RecordError as error:
            if self._config.data.bad_records == "skip":
                return str(error)
            raise RecordError(
                f"{error} (prompt {name}; data.bad_records=skip skips and counts such records)"
            ) from error
        length, most = len(prompt.tokens), self._config.max_prompt_tokens
        if length > most:
            return f"record {record['id']}: its prompt has {length} tokens; at most {most} leave room for an answer"
        views = prompt.num_views
        if views[0] > self._views[0] or views[1] > self._views[1]:
            return f"record {record['id']}: its images have {views} global views and crops; a row holds {self._views}"
        return Episode(index, number, record, prompt, [])


def seed_of(config: RLConfig, index: int) -> int:
    """The sampling seed of a prompt's answers."""
    key = f"{config.seed}/rollout/{index}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


# Engines -------------------------------------------------------------------------------------------------------------


def engine_config_of(config: RLConfig) -> EngineConfig:
    rollout = config.rollout
    return EngineConfig(
        max_sequences=rollout.max_sequences,
        smallest_batch=min(rollout.max_sequences, max(1, rollout.samples)),
        max_context=min(config.batch.tokens, config.model.decoder.max_positions),
        page_size=rollout.page_size,
        cache_tokens=rollout.cache_tokens,
        prefill_tokens=rollout.prefill_tokens,
        decode_steps=rollout.decode_steps,
        max_waiting=2**31,
    )


class Engines:
    """An engine for every `rollout.tensor` devices of this process, with weights handed over from the trainer."""

    def __init__(self, config: RLConfig, processor: Processor, mesh: Mesh):
        """
        Raises:
            ConfigError: `rollout.tensor` does not divide the devices, or the devices of an engine belong to several
                processes.
        """
        self._config, self._processor = config, processor
        self._mesh = engines_mesh(mesh.devices.flat, config.rollout.tensor)
        own = jax.process_index()
        self._parts = [part for part in data_parts(self._mesh) if part.devices.flat[0].process_index == own]
        self._engines: list[Engine] = []

    def __len__(self) -> int:
        return len(self._parts)

    def take(self, model: StepVL) -> None:
        """Gives the engines a copy of these weights, in the compute dtype; drops what they had cached."""
        dtype = self._config.numerics.compute_dtype
        copies = _copied(model, dtype=dtype)
        whole = jax.device_put(copies, shardings(copies, self._mesh))
        parts = [_part_of(whole, part) for part in self._parts]
        if self._engines:
            for engine, part in zip(self._engines, parts, strict=True):
                engine.update_weights(part)
            return
        engine_config = engine_config_of(self._config)
        for part, mesh in zip(parts, self._parts, strict=True):
            self._engines.append(Engine(part, self._processor, engine_config, mesh=mesh))

    async def sample(self, episodes: Sequence[Episode], on_answers: Callable[[Episode, list[Rollout]], None]) -> None:
        """Samples the answers to all prompts; tells those of a prompt, in this thread, when it has all.

        Raises:
            RequestError: a prompt cannot be served.
        """
        loop = asyncio.get_running_loop()

        def drive(engine: Engine, own: Sequence[Episode]) -> None:
            waiting = {}
            deltas: dict[str, list[Delta]] = {}
            try:
                for episode in own:
                    request = engine.submit(episode.prompt, self._params(episode.index))
                    waiting[request], deltas[request] = episode, []
                while engine.has_work:
                    for delta in engine.step():
                        deltas[delta.request_id].append(delta)
                    for request in [request for request in waiting if not engine.is_under_way(request)]:
                        episode = waiting.pop(request)
                        rollouts = self._rollouts(episode, completions(deltas.pop(request)))
                        loop.call_soon_threadsafe(on_answers, episode, rollouts)
            except BaseException:
                for request in waiting:
                    engine.cancel(request)
                raise

        # Which engine answers a prompt must not depend on how fast they are.
        shares = [episodes[place :: len(self._engines)] for place in range(len(self._engines))]
        await asyncio.gather(*(asyncio.to_thread(drive, *each) for each in zip(self._engines, shares, strict=True)))
        await asyncio.sleep(0)  # for the last call

    def _params(self, index: int) -> SamplingParams:
        rollout = self._config.rollout
        return SamplingParams(
            temperature=rollout.temperature,
            n=rollout.samples,
            max_tokens=rollout.max_tokens,
            seed=seed_of(self._config, index),
            logprobs=0,
        )

    def _rollouts(self, episode: Episode, made: list[Completion]) -> list[Rollout]:
        prompt_ids = episode.prompt.tokens.tolist()
        return [rollout_of(each, prompt_ids, self._processor) for each in made]


@partial(jax.jit, static_argnames="dtype")
def _copied(model: StepVL, dtype: str) -> StepVL:
    # A true copy: JAX would pass an unchanged argument on, and the trainer donates its arrays.
    return jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), model)


def _part_of(model: StepVL, part: Mesh) -> StepVL:
    """A model on one part of the mesh, from its shards there; copies nothing."""

    def local(array: jax.Array) -> jax.Array:
        assert isinstance(array.sharding, NamedSharding)
        layout = NamedSharding(part, array.sharding.spec)
        shards = {shard.device: shard.data for shard in array.addressable_shards}
        places = layout.addressable_devices_indices_map(array.shape)
        return jax.make_array_from_single_device_arrays(array.shape, layout, [shards[device] for device in places])

    return jax.tree.map(local, model)


def _judge_engine(judge: JudgeConfig, path: str, mesh: Mesh) -> tuple[AsyncEngine, AnyProcessor]:
    """The judge that a run or checkpoint holds, on the first device of this process.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    own = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    one = make_mesh(MeshConfig(), own[:1])
    model, processor = load(path, mesh=one)
    context = programs.decoder_of(model).config.max_positions
    sequences = min(judge.max_concurrent, 64)
    sizes = EngineConfig(
        max_sequences=sequences, smallest_batch=sequences, max_waiting=2**31, cache_tokens=max(context, sequences * 512)
    )
    return AsyncEngine(Engine(model, processor, sizes, mesh=one, donate=True)), processor


# An iteration --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Collected:
    """The answers that an iteration trains on, and figures of all that were sampled for it.

    Attributes:
        cursor: this process's place among the prompts after the iteration.
        skipped: why prompts were not sampled.
        dropped: prompts that the filter left out.
        sampled: per source: answers, answers with a reward, the sum of these rewards, and answers cut off.
    """

    episodes: list[Episode]
    cursor: int
    skipped: list[str]
    dropped: int
    rounds: int
    sampled: np.ndarray
    tokens: int
    seconds: float


class Collector:
    """Samples and scores answers. Its methods may run in a thread of their own, one at a time."""

    def __init__(self, config: RLConfig, processor: Processor, mesh: Mesh, engines: Any = None):
        """
        Args:
            engines: what samples, with the method `Engines.sample`; by default engines on the mesh's devices.

        Raises:
            ConfigError: there are no sources, or the devices cannot be divided among engines.
            RecordError: a source cannot be opened.
        """
        self._config = config
        self.prompts = Prompts(config, processor)
        self.engines: Any = Engines(config, processor, mesh) if engines is None else engines
        self._runner = asyncio.Runner()
        self._open, self._is_open = contextlib.AsyncExitStack(), False
        judge_run = config.reward.judge.run
        self._judge = None if judge_run is None else _judge_engine(config.reward.judge, judge_run, mesh)
        sampler = None if self._judge is None else EngineSampler(*self._judge)
        self._scorer = Scorer(config.reward, judge=sampler)

    def close(self) -> None:
        with self._runner:
            self._runner.run(self._open.aclose())

    def collect(self, cursor: int) -> Collected:
        """The answers of this process's share of an iteration.

        Raises:
            RecordError: a record is malformed, or too many in succession cannot be used.
            StepjaxError: rewards are missing for too many answers.
        """
        if not self._is_open:
            self._runner.run(self._enter())
        return self._runner.run(self._collect(cursor))

    async def _enter(self) -> None:
        if self._judge is not None:
            await self._open.enter_async_context(self._judge[0])
        await self._open.enter_async_context(self._scorer)
        self._is_open = True

    async def _collect(self, cursor: int) -> Collected:
        began, rollout = time.monotonic(), self._config.rollout
        wanted = self._config.prompts_of_process(jax.process_count())
        made = Collected([], cursor, [], 0, 0, np.zeros((len(self._config.data.sources), 4)), 0, 0.0)
        while len(made.episodes) < wanted and made.rounds < (rollout.max_rounds if rollout.keep_mixed else 1):
            made.rounds += 1
            for episode in await self._answered(self._next_prompts(made, wanted - len(made.episodes))):
                rewards = [answer.scored.value for answer in episode.answers]
                known = [reward for reward in rewards if reward is not None]
                cut = sum(answer.is_truncated for answer in episode.answers)
                made.sampled[episode.source] += len(rewards), len(known), sum(known), cut
                made.tokens += sum(len(answer.mask_L) for answer in episode.answers)
                if rollout.keep_mixed and not is_mixed(rewards):
                    made.dropped += 1
                else:
                    made.episodes.append(episode)
        made.seconds = time.monotonic() - began
        return made

    def _next_prompts(self, made: Collected, count: int) -> list[Episode]:
        found: list[Episode] = []
        in_succession = 0
        while len(found) < count:
            episode = self.prompts[made.cursor * jax.process_count() + jax.process_index()]
            made.cursor += 1
            if isinstance(episode, Episode):
                found.append(episode)
                in_succession = 0
                continue
            made.skipped.append(episode)
            in_succession += 1
            if in_succession == MAX_SKIPPED:
                raise RecordError(f"{MAX_SKIPPED} prompts in succession cannot be used; the last: {episode}")
        return found

    async def _answered(self, episodes: list[Episode]) -> list[Episode]:
        """The episodes with their answers; those of one prompt are scored while others are still sampled."""
        tasks: list[asyncio.Task] = []

        async def score(episode: Episode, rollouts: list[Rollout]) -> None:
            usable = [rollout for rollout in rollouts if rollout.finish_reason in ("stop", "length")]
            [scored] = await self._scorer.score([Group(episode.record, usable)])
            episode.answers = [Answer.of(*each) for each in zip(usable, scored, strict=True)]

        await self.engines.sample(episodes, lambda *answered: tasks.append(asyncio.ensure_future(score(*answered))))
        await asyncio.gather(*tasks)
        return episodes

    # Answers that wait for their iteration are saved beside the checkpoint: the weights that made them are gone.

    def to_json(self, made: Collected) -> dict[str, Any]:
        episodes = [
            {
                "index": episode.index,
                "answers": [
                    {"rollout": answer.rollout.to_json(), "scored": dataclasses.asdict(answer.scored)}
                    for answer in episode.answers
                ],
            }
            for episode in made.episodes
        ]
        return {**vars(made), "episodes": episodes, "sampled": made.sampled.tolist()}

    def from_json(self, fields: dict[str, Any]) -> Collected:
        """
        Raises:
            CheckpointError: a prompt has changed since.
            RecordError: a rollout is malformed.
        """
        episodes = []
        for each in fields["episodes"]:
            episode = self.prompts[each["index"]]
            if not isinstance(episode, Episode):
                raise CheckpointError(f"a prompt of the saved answers can no longer be used: {episode}")
            for answer in each["answers"]:
                rollout = Rollout.from_json(answer["rollout"])
                if rollout.prompt_ids != tuple(episode.prompt.tokens.tolist()):
                    raise CheckpointError(
                        f"record {episode.record['id']} has changed since its answers were saved: restore the data, or "
                        "start a new run under another name"
                    )
                scored = answer["scored"] | {"notes": tuple(answer["scored"]["notes"])}
                episode.answers.append(Answer.of(rollout, Scored(**scored)))
            episodes.append(episode)
        return Collected(**{**fields, "episodes": episodes, "sampled": np.array(fields["sampled"])})
