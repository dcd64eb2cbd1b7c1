"""`stepjax pacore cache`: trajectories for the prompts of a recipe, with their rewards, in a file.

The episode of PaCoRe's training is one synthesis, so its messages are drawn beforehand, once (section 2.2). The same
command over a cache tells how often a model's syntheses are right, which is the second filter (appendix C).
"""

import asyncio
import base64
import dataclasses
import io
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from stepjax.data.synthesis import messages_of
from stepjax.errors import CheckpointError, ConfigError
from stepjax.figures import human_number
from stepjax.post_training.config import RLConfig
from stepjax.rollouts.endpoint import EndpointConfig

_KEPT = ("id", "task", "verifier", "answer", "ground_truth", "tools")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PacoreCache:
    """Draw answers to a recipe's prompts and keep them with their rewards: what PaCoRe trains on.

    The recipe is one of reinforcement learning; `init_from` names the model. Writes one record a line: the prompt, and
    `responses`, rollouts with their `reward`. After an interruption, rerun the same command to go on.

    With a cache as the recipe's source, the answers are syntheses of its messages. A problem whose syntheses pass the
    filter is kept with the messages it had, and with `synthesis_accuracy`.

    Answers that were cut off within their reasoning have no message. Problems with too few messages are left out.
    """

    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]  # such as configs/digits/rlvr.py
    config: Annotated[RLConfig, tyro.conf.arg(name="")]
    cache: Path  # the file to write
    problems: int = 1000  # prompts to answer
    above: float = -1.0  # keep problems whose mean reward is above this ...
    below: float = 2.0  # ... and below this; 0 and 1 keep those that some but not all answers solve
    messages: int = 2  # keep problems with at least so many; not below `references` of the recipe that trains on them
    upstream: EndpointConfig = EndpointConfig()  # an OpenAI-compatible endpoint instead of `init_from`

    def run(self) -> int:
        """Returns 0.

        Raises:
            StepjaxError: the recipe, the data, the model or the file cannot be used, or too many rewards are missing.
        """
        from stepjax.training.host import prepare

        for name, least in (("problems", 1), ("messages", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"--{name} {getattr(self, name)}: must be at least {least}")
        prepare(self.config, self.config.batch.micro_rows)
        found = draw(self)
        short = f" ({human_number(n)} had too few messages)" if (n := found["short of messages"]) else ""
        print(
            f"{found['kept']} of {found['answered']} problems kept in {self.cache}{short}; mean reward "
            f"{found['reward'] / max(1, found['answers']):.3f} of {human_number(found['answers'])} answers"
        )
        return 0


def draw(command: PacoreCache) -> dict[str, Any]:
    """Draws what is missing, and returns the figures of the whole cache.

    Raises:
        StepjaxError: see `PacoreCache.run`.
    """
    import jax

    from stepjax.interop import init_from
    from stepjax.post_training.sampling import Collector
    from stepjax.progress import progress
    from stepjax.sharding import make_mesh
    from stepjax.training.loop import make_processor

    rollout = dataclasses.replace(command.config.rollout, keep_mixed=False)  # `above` and `below` filter
    config = dataclasses.replace(command.config, rollout=rollout)
    if jax.process_count() > 1:
        raise ConfigError("stepjax pacore cache runs in one process; serve the model and use --upstream.url on a pod")
    state = _State(command, config)
    if state.fields["answered"] >= command.problems:
        return state.fields
    mesh = make_mesh(config.mesh)
    processor = make_processor(config)
    endpoint = None if command.upstream.url is None else _Endpoint(config, command.upstream)
    collector = Collector(config, processor, mesh, endpoint)
    try:
        if endpoint is None:
            collector.engines.take(init_from.initial_model(config, mesh)[0])
        done = state.fields["answered"]
        with jax.set_mesh(mesh), progress(command.problems, unit="problem", description="cache", done=done) as bar:
            while (done := state.fields["answered"]) < command.problems:
                made = collector.collect(state.fields["cursor"])
                wanted = made.episodes[: command.problems - done]
                # With more --problems later, the prompts that are left over now come next.
                cursor = made.cursor if len(wanted) == len(made.episodes) else wanted[-1].index + 1
                state.add(wanted, cursor, command)
                bar.update(state.fields["answered"] - done, f"{state.fields['kept']} kept")
    finally:
        collector.close()
    return state.fields


class _Endpoint:
    """Samples from a server, in the place of `Engines`."""

    def __init__(self, config: RLConfig, endpoint: EndpointConfig):
        self._config, self._endpoint = config, endpoint

    async def sample(self, episodes: Sequence[Any], on_answers: Callable[[Any, list[Any]], None]) -> None:
        """Calls that fail are tried again; those that still fail are left out."""
        from stepjax.inference.request import SamplingParams
        from stepjax.pacore.calls import Calls
        from stepjax.pacore.config import PacoreConfig
        from stepjax.pacore.records import ignore
        from stepjax.rollouts.endpoint import EndpointSampler

        rollout = self._config.rollout
        config = PacoreConfig(sampling=SamplingParams(temperature=rollout.temperature, max_tokens=rollout.max_tokens))
        slots = asyncio.Semaphore(rollout.max_sequences)

        async def answer(sampler: EndpointSampler, episode: Any) -> None:
            address = (self._config.seed, "cache", episode.index)
            calls = Calls(sampler, config, address, begin=time.monotonic(), notify=ignore)

            async def one(prompt: Any, number: int) -> Any:
                async with slots:
                    return await calls.call(prompt, (0, number), insists=False, tells_pieces=False)

            messages = [_with_data_uris(message) for message in _asked(episode.record)]
            tools = episode.record.get("tools") or ()
            async with sampler.prompt(messages, tools, answer_tokens=rollout.max_tokens) as prompt:
                made = await asyncio.gather(*(one(prompt, number) for number in range(rollout.samples)))
            on_answers(episode, [each.rollout for each in made if each.status == "ok"])

        async with EndpointSampler(self._endpoint) as sampler:
            await asyncio.gather(*(answer(sampler, episode) for episode in episodes))


class _State:
    """The cache's file and, beside it, how much of it is whole."""

    def __init__(self, command: PacoreCache, config: RLConfig):
        """
        Raises:
            CheckpointError: the file was written with other settings.
        """
        from stepjax.config_file import to_json

        self._path, self._state = command.cache, command.cache.with_name(command.cache.name + ".state")
        # The command's own options, and what the answers depend on.
        fields = to_json(config)
        settings = {
            name: fields[name] for name in ("model", "init_from", "tokenizer", "images", "data", "reward", "seed")
        }
        settings |= {
            "rollout": {
                name: fields["rollout"][name] for name in ("samples", "temperature", "max_tokens", "max_prompt_tokens")
            }
        }
        settings |= {"above": command.above, "below": command.below, "messages": command.messages}
        settings |= {"upstream": command.upstream.model}
        self.fields = {"cursor": 0, "answered": 0, "kept": 0, "answers": 0, "reward": 0.0, "bytes": 0}
        self.fields["short of messages"] = 0
        self.fields["settings"] = settings
        if not self._state.exists():
            if self._path.exists():
                raise CheckpointError(f"{self._path} exists, but not {self._state}: name another --cache, or remove it")
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.touch()
            return
        try:
            saved = json.loads(self._state.read_text())
            differing = [name for name in settings if saved["settings"][name] != settings[name]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self._state} cannot be read: {error}; remove it and the cache") from error
        if differing:
            raise CheckpointError(
                f"{self._path} was drawn with another {' and '.join(differing)}: restore it, or name another --cache"
            )
        self.fields = saved
        os.truncate(self._path, saved["bytes"])  # what was written after the state was saved

    def add(self, episodes: Sequence[Any], cursor: int, command: PacoreCache) -> None:
        fields = self.fields
        with open(self._path, "ab") as file:
            for episode in episodes:
                rewards = [each.scored.value for each in episode.answers if each.scored.value is not None]
                fields["answered"] += 1
                fields["answers"] += len(rewards)
                fields["reward"] += sum(rewards)
                if not rewards or not command.above < sum(rewards) / len(rewards) < command.below:
                    continue
                line = _line(episode, sum(rewards) / len(rewards))
                if len(messages_of(line)) < command.messages:
                    fields["short of messages"] += 1
                    continue
                fields["kept"] += 1
                file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            fields["bytes"] = file.tell()
        fields["cursor"] = cursor
        temporary = self._state.with_name(self._state.name + ".new")
        temporary.write_text(json.dumps(fields))
        os.replace(temporary, self._state)


def _line(episode: Any, accuracy: float) -> dict[str, Any]:
    record = episode.record
    if "cached" in record:  # syntheses: the problem stays as it is
        return {**record["cached"], "synthesis_accuracy": accuracy}
    responses = [
        {**answer.rollout.without_tokens().to_json(), "reward": answer.scored.value} for answer in episode.answers
    ]
    kept = {name: record[name] for name in _KEPT if name in record}
    messages = [_with_data_uris(message) for message in _asked(record)]
    return {**kept, "messages": messages, "responses": responses, "accuracy": accuracy}


def _asked(record: dict[str, Any]) -> list[dict[str, Any]]:
    messages = record["messages"]
    return messages[:-1] if messages[-1].get("role") == "assistant" else messages


def _with_data_uris(message: dict[str, Any]) -> dict[str, Any]:
    """The message for JSON: images that are not paths or URIs become PNG files in data URIs."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": [_item(item) for item in content]}


def _item(item: Any) -> Any:
    from PIL import Image

    image = item.get("image") if isinstance(item, dict) else None
    if image is None or isinstance(image, str):
        return item
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        image = buffer.getvalue()
    return {**item, "image": "data:image/png;base64," + base64.b64encode(image).decode()}
