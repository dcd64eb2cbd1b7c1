"""Arguments that the commands share: how rounds go, and the endpoint that answers."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from stepjax.pacore.config import Limits, PacoreConfig
from stepjax.pacore.schedule import parse_schedule
from stepjax.rollouts.endpoint import EndpointConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundArguments:
    """How a problem is gone about."""

    schedule: str = "low"  # widths of the rounds before the final call, such as 32,4; or low, medium, high, none
    order: Literal["shuffle", "length"] = "shuffle"  # of references; length is the released code's
    truncated: Literal["drop", "tail"] = "drop"  # a thought that was cut off: dropped, or its end is passed on
    tail_tokens: int = 1000
    overflow: Literal["shorten", "drop", "fail"] = "shorten"  # references that do not fit the context
    answer_tokens: int = 1024  # that prompts leave room for where the answer has no limit
    images: Literal["before", "after"] = "before"  # where they stand beside the text of a synthesis
    template: Path | None = None  # a Jinja file in place of the built-in text
    fallback: bool = True  # when the final call gives nothing, the answer that most messages agree on stands in
    retries: int = 4  # of a call, after its first try
    backoff_seconds: float = 1.0  # before the first retry, doubled for each
    call_seconds: float | None = None  # for one try
    round_seconds: float | None = None  # after which a round goes on without its last calls, if it has the quorum
    quorum: float = 0.5  # share of a round that must have left a message by then
    agreement: float | None = None  # share of a round whose answers agree that ends a problem

    def config(self, **others: Any) -> PacoreConfig:
        """
        Args:
            others: fields that are not among these.

        Raises:
            ConfigError: a value is out of range.
        """
        given = dataclasses.asdict(self)
        limits = Limits(**{name: given.pop(name) for name in _LIMITS})
        schedule, template = parse_schedule(given.pop("schedule")), given.pop("template")
        template = None if template is None else str(template)
        return PacoreConfig(**given, **others, schedule=schedule, template=template, limits=limits)


_LIMITS = ("retries", "backoff_seconds", "call_seconds", "round_seconds", "quorum", "agreement")


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpstreamArguments:
    """Of an endpoint that answers."""

    upstream_model: str | None = None  # what it calls the model; by default the first that it lists
    tokenizer: str | None = None  # a tokenizer.json, to count with what references are fitted to
    max_context: int | None = None  # tokens of prompt and answer that the upstream takes; needs --tokenizer
    max_concurrent: int = 256  # calls of the upstream under way
    stream: bool = True  # ask the upstream for streams, which show a dead connection
    send_seed: bool = True
    opens_thought: bool | None = None  # the upstream's template opens <think>, and its content keeps the thought
    silence_seconds: float = 1000.0  # between two parts of an upstream's answer
    answer_seconds: float = 6 * 3600.0  # for a whole answer of the upstream
    max_response_bytes: int = 128 << 20  # of a whole answer of the upstream, with all that is around its text

    def endpoint(self, url: str, **others: Any) -> EndpointConfig:
        """
        Raises:
            ConfigError: a value cannot work.
        """
        return EndpointConfig(
            url=url,
            model=self.upstream_model,
            tokenizer=self.tokenizer,
            max_context=self.max_context,
            max_concurrent=self.max_concurrent,
            streams=self.stream,
            sends_seed=self.send_seed,
            opens_thought=self.opens_thought,
            silence_seconds=self.silence_seconds,
            answer_seconds=self.answer_seconds,
            max_response_bytes=self.max_response_bytes,
            **others,
        )
