"""The inference engine: continuous batching over a paged key-value cache.

    engine = Engine(model, processor, EngineConfig(max_sequences=16))
    for completions in engine.generate([processor.process_prompt(messages)], SamplingParams(n=4)):
        print(completions[0].text)

Requests come and go between steps. A step admits the sequences that fit, computes chunks of prompts, and decodes one
or a few tokens of every other sequence. `stepjax.inference.async_engine` runs the steps in its own thread.

A token depends only on the weights, the request's prompt and seed, the sample's number and the position. A request
yields the same text alone or batched, preempted or not, except where the order of floating-point sums breaks a near-tie
between logits.
"""

import dataclasses
import functools
import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Tokens
from typing import Protocol

from jax.sharding import Mesh

from stepjax.errors import BusyError, ContextLengthError, RequestError
from stepjax.inference import programs
from stepjax.inference.config import EngineConfig
from stepjax.inference.feature_store import FeatureStore
from stepjax.inference.output import advance, completions, make_delta
from stepjax.inference.pages import Pages
from stepjax.inference.request import Completion, Delta, EngineStats, SamplingParams
from stepjax.inference.runner import Runner
from stepjax.inference.scheduler import Scheduler
from stepjax.inference.sequence import Prompt, Sequence, SequenceError, failing_alone
from stepjax.models.qwen3 import Qwen3
from stepjax.models.step_vl import StepVL
from stepjax.processing.tokens import Example, text_example

_log = logging.getLogger("stepjax.inference")


class TextDecoder(Protocol):
    """What the engine needs from a processor."""

    @property
    def stop_ids(self) -> tuple[int, ...]: ...

    def decode(self, ids: Tokens[int], /) -> str: ...


class Engine:
    """Synchronous and single-threaded: call its methods from one thread.

    Args:
        model: a STEP3-VL, or a text decoder alone.
        processor: decodes tokens and names the stop tokens; for images it needs an `image_config`. None: tokens in,
            tokens out.
        mesh: its tensor axis shards heads and MLPs; the model is moved to it.
        donate: the model is not used afterwards. Except on TPU, the engine lays out the decoder's kernels anew; this
            deletes each of the model's as soon as it is converted, so that memory does not double. Otherwise the model
            remains as it is.

    Raises:
        ConfigError: the configuration or the mesh does not suit the model.
    """

    def __init__(
        self,
        model: StepVL | Qwen3,
        processor: TextDecoder | None = None,
        config: EngineConfig | None = None,
        *,
        mesh: Mesh | None = None,
        donate: bool = False,
    ):
        self.config = config = config or EngineConfig()
        most = programs.decoder_of(model).config.max_positions
        self.max_context = min(config.max_context or most, most)
        self._processor = processor
        self._stop_ids = frozenset() if processor is None else frozenset(processor.stop_ids)
        # Text is decoded a few tokens at a time, often the same ones.
        self._decode = None if processor is None else functools.lru_cache(2**16)(processor.decode)
        images = getattr(processor, "image_config", None) if isinstance(model, StepVL) else None

        pages = -(-(config.cache_tokens or config.max_sequences * self.max_context) // config.page_size)
        self._store = None if images is None else FeatureStore(config.feature_cache_tokens, images)
        self._pages = Pages(pages)
        self._scheduler = Scheduler(config, self._pages, self._store)
        self._runner = Runner(
            model, config, images, max_context=self.max_context, num_pages=pages, mesh=mesh, donate=donate
        )
        self._samples: dict[str, list[Sequence]] = {}  # by id of the active request
        self._totals = dict.fromkeys(("generated", "finished", "cancelled", "encoded", "steps"), 0)
        self._serial = 0
        self._compiled_before = programs.num_compiled()

    # Requests --------------------------------------------------------------------------------------------------------

    def submit(
        self, prompt: Example | Iterable[int], params: SamplingParams | None = None, *, request_id: str | None = None
    ) -> str:
        """Queues a request and returns its id; its deltas come from `step`.

        Raises:
            RequestError: the request can never be served: it is empty, too long for the context or the cache, has
                images that the model or the feature store cannot take, or reuses an active id.
            BusyError: the queue is full.
        """
        params = params or SamplingParams()
        example = prompt if isinstance(prompt, Example) else text_example(prompt)
        self._serial += 1
        request_id = request_id or f"request-{self._serial}"
        if request_id in self._samples:
            raise RequestError(f"request_id={request_id!r} is in use; give each request its own")
        limit = self._limit(example, params)
        waiting = self._scheduler.num_waiting
        if waiting and waiting + params.n > self.config.max_waiting:
            raise BusyError(f"{waiting} of at most {self.config.max_waiting} samples are waiting: try again later")
        seed = int.from_bytes(os.urandom(8), "little") if params.seed is None else params.seed
        shared = Prompt(request_id, example, params, seed, limit, self._runner.images)
        samples = [Sequence(shared, i, self._decode) for i in range(params.n)]
        self._scheduler.add(samples)
        self._samples[request_id] = samples
        return request_id

    def cancel(self, request_id: str) -> list[Delta]:
        """Ends a request and frees its pages at once; does nothing if the request is not active."""
        samples = self._samples.pop(request_id, [])
        for sequence in samples:
            self._scheduler.remove(sequence)
        self._totals["cancelled"] += len(samples)
        return [make_delta(sequence, finish_reason="cancelled") for sequence in samples]

    def generate(
        self,
        prompts: Iterable[Example | Iterable[int]],
        params: SamplingParams | Iterable[SamplingParams] | None = None,
    ) -> list[list[Completion]]:
        """All samples of all prompts, in order. Prompts are consumed as room frees up, so they may be lazy.

        Args:
            params: one per prompt, or one for all. One for all, if it has a seed, gives prompt i seed + i, so that
                equal prompts get different samples.

        Raises:
            RequestError: as `submit`, after cancelling all prompts; or other requests are active.
        """
        if self.has_work:
            raise RequestError(
                f"generate cannot run while {len(self._samples)} other requests are active: use submit and step for "
                "all of them, or finish or cancel those first"
            )
        if not isinstance(params, Iterable):
            params = _numbered(params or SamplingParams())
        deltas: dict[str, list[Delta]] = {}

        def step() -> None:
            for delta in self.step():
                deltas[delta.request_id].append(delta)

        try:
            for prompt, wish in zip(prompts, params, strict=False):
                deltas[self.submit(prompt, wish)] = []
                while self._scheduler.num_waiting > self.config.max_sequences:
                    step()
            while self.has_work:
                step()
        except BaseException:
            for request_id in deltas:
                self.cancel(request_id)
            raise
        return [completions(of_request) for of_request in deltas.values()]

    @property
    def has_work(self) -> bool:
        return bool(self._samples)

    def is_under_way(self, request_id: str) -> bool:
        return request_id in self._samples

    def _limit(self, example: Example, params: SamplingParams) -> int:
        """Maximum length of the request's samples in tokens, including the prompt."""
        name, length = f"prompt {example.name!r}", len(example.tokens)
        if length == 0:
            raise RequestError(f"{name} has no tokens: give it at least one")
        vocab_size = programs.decoder_of(self._runner.model).config.vocab_size
        if not (0 <= int(example.tokens.min()) and int(example.tokens.max()) < vocab_size):
            raise RequestError(f"{name} has token ids outside the vocabulary of {vocab_size}")
        if length + (params.max_tokens or 1) > self.max_context:
            raise ContextLengthError(
                f"{name} has {length} tokens; with max_tokens={params.max_tokens or 1} that is more than the context "
                f"of {self.max_context}: shorten one of them",
                excess=length + (params.max_tokens or 1) - self.max_context,
            )
        capacity = self._pages.count * self.config.page_size
        # The last token is sampled but never fed back. Without a limit, an answer ends with the context or cache.
        limit = min(self.max_context, capacity + 1) if params.max_tokens is None else length + params.max_tokens
        needed = max(limit, length + 1) - 1
        if needed > capacity:
            raise ContextLengthError(
                f"{name} with its answer may need {needed} tokens of cache, which holds {capacity} in all: lower "
                f"max_tokens, or raise engine.cache_tokens",
                excess=needed - capacity,
            )
        unknown = next((token for token in params.stop_ids if token >= vocab_size), None)
        if unknown is not None:
            raise RequestError(f"the stop token {unknown} is outside the vocabulary of {vocab_size}")
        if params.stop and self._processor is None:
            raise RequestError(f"stop={params.stop!r}: the engine has no processor to decode text; give stop_ids")
        if len(example.crops) or len(example.global_views):
            if self._store is None:
                raise RequestError(f"{name} has images; this model reads text only")
            if self._store.size_of(example) > self._store.num_rows:
                raise RequestError(
                    f"{name} has {self._store.size_of(example)} tokens of images; the feature store holds "
                    f"{self._store.num_rows}: raise engine.feature_cache_tokens"
                )
            for kind, views in (("crop", example.crops), ("global", example.global_views)):
                shapes = [shape.shape for each, shape in self._runner.view_shapes.items() if each.endswith(kind)]
                for other in {view.shape for view in views}.difference(shapes):
                    raise RequestError(f"{name} has {kind} views of shape {other}; the model reads {shapes}")
            if example.feature_index[-1] >= 0:
                raise RequestError(f"{name} ends within an image: add text after it")
        return limit

    # Steps -----------------------------------------------------------------------------------------------------------

    def step(self) -> list[Delta]:
        """Admits sequences, computes chunks of prompts, decodes; returns the new deltas.

        A host failure in one sample ends that sample with the finish reason "error", and the step continues without it.
        An exception means that the device failed; the cache cannot be trusted afterwards.
        """
        self._totals["steps"] += 1
        deltas: list[Delta] = []
        while True:
            try:  # retry after a failure; admissions and computed chunks are kept
                self._scheduler.admit()
                self._prefill()
                self._fork()
                sequences = self._scheduler.reserve(self.config.decode_steps)
                drawn = self._runner.decode(sequences) if sequences else None
                break
            except SequenceError as error:
                deltas.append(self._fail(error))
        if drawn is not None:
            deltas += [self._advance(sequence, drawn, row) for row, sequence in enumerate(sequences)]
        return deltas

    def _fork(self) -> None:
        copies = self._scheduler.fork()
        if copies:
            self._runner.copy(copies)

    def _prefill(self) -> None:
        budget: float = self.config.prefill_tokens
        while budget >= 1:
            parts = self._scheduler.next_parts(int(budget), self._runner.prefill_shapes)
            if any(part.sequence.lacks_features for part in parts):
                cost = self._encode()
                if self._scheduler.decoding:  # nobody else waits for the encoder
                    budget -= cost
                continue
            if not parts:
                return
            budget -= self._runner.prefill(parts)
            for part in parts:
                self._scheduler.computed(part.sequence, part.end)

    def _encode(self) -> float:
        """Encodes a batch of views; returns its cost in prompt tokens."""
        assert self._store is not None
        kind, views = self._store.next_batch(self._runner.most_views)
        self._totals["encoded"] += len(views)
        return self._runner.encode(kind, views)

    def _advance(self, sequence: Sequence, drawn: programs.Drawn, row: int) -> Delta:
        try:
            with failing_alone(sequence):
                delta = advance(sequence, drawn, row, self._stop_ids)
            self._totals["generated"] += len(delta.tokens)
            self._scheduler.computed(sequence, sequence.length - 1)
        except SequenceError as error:
            return self._fail(error)
        if delta.finish_reason is not None:
            self._end(sequence)
        return delta

    def _fail(self, error: SequenceError) -> Delta:
        """Ends the sample that failed."""
        _log.error("%s failed", error, exc_info=error.__cause__)
        self._end(error.sequence)
        reason = f"{type(error.__cause__).__name__}: {error.__cause__}"
        return make_delta(error.sequence, finish_reason="error", stop_reason=reason[:1000])

    def _end(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        self._totals["finished"] += 1
        request_id = sequence.prompt.request_id
        self._samples[request_id].remove(sequence)
        if not self._samples[request_id]:
            del self._samples[request_id]

    # Weights, warm-up, figures ---------------------------------------------------------------------------------------

    @property
    def model(self) -> StepVL | Qwen3:
        return self._runner.model

    def update_weights(self, model: StepVL | Qwen3) -> None:
        """Switches to other weights of the same shapes. Caches are dropped: running samples keep their tokens and
        recompute their keys and values.

        Raises:
            RequestError: the structure, a shape or a dtype differs; names the first difference.
        """
        self._runner.set_weights(model)
        for sequence in reversed(list(self._scheduler.running)):
            self._scheduler.preempt(sequence)
        self._pages.forget_all()
        if self._store is not None:
            self._store.forget_all()

    def warm_up(self, *, top_logprobs: bool = True, progress: Callable[[str], None] = lambda what: None) -> int:
        """Compiles every shape that requests can need, so that no request waits for it; returns their number.

        Args:
            top_logprobs: include the shapes for requests with top log-probabilities.
            progress: called with the name of the next program.
        """
        before = programs.num_compiled()
        for what in self._runner.warm_up(top_logprobs):
            progress(what)
        return programs.num_compiled() - before

    def stats(self) -> EngineStats:
        pages, scheduler, totals = self._pages, self._scheduler, self._totals
        return EngineStats(
            running=len(scheduler.running),
            waiting=scheduler.num_waiting,
            pages=pages.count,
            pages_used=pages.count - pages.num_free,
            pages_cached=pages.num_cached,
            prompt_tokens=scheduler.cached_tokens + scheduler.computed_tokens,
            cached_prompt_tokens=scheduler.cached_tokens,
            generated_tokens=totals["generated"],
            finished_samples=totals["finished"],
            cancelled_samples=totals["cancelled"],
            preemptions=scheduler.preemptions,
            images_encoded=totals["encoded"],
            images_cached=0 if self._store is None else self._store.num_found,
            steps=totals["steps"],
            compilations=programs.num_compiled() - self._compiled_before,
        )


def _numbered(params: SamplingParams) -> Iterator[SamplingParams]:
    for i in itertools.count():
        yield params if params.seed is None else dataclasses.replace(params, seed=(params.seed + i) % 2**64)
