"""`stepjax pacore serve`: PaCoRe in front of any server that speaks OpenAI's chat completions."""

import asyncio
import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

from stepjax.errors import ConfigError
from stepjax.pacore.config import Limits as RoundLimits
from stepjax.pacore.config import PacoreConfig
from stepjax.pacore.http_sampler import Endpoint, HttpSampler
from stepjax.pacore.schedule import num_calls, parse_schedule
from stepjax.pacore.template import Template
from stepjax.serving.command import KEY_VARIABLE, LOOPBACK, api_keys, check_address, check_installed, warn_if_open
from stepjax.serving.settings import Limits, ServerSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class PacoreServeArguments:
    """Answer OpenAI's chat requests with PaCoRe over another server, and show its rounds in a browser.

    The other server's key, if it wants one, is taken from the environment: STEPJAX_UPSTREAM_API_KEY or OPENAI_API_KEY.
    """

    upstream: str  # such as http://localhost:8001/v1
    upstream_model: str | None = None  # what it calls the model; by default the first that it lists
    tokenizer: str | None = None  # a tokenizer.json, to count with what references are fitted to
    max_context: int | None = None  # tokens of prompt and answer that the upstream takes; needs --tokenizer
    max_concurrent: int = 256  # calls of the upstream under way
    stream: bool = True  # ask the upstream for streams, which show a dead connection
    send_seed: bool = True
    opens_thought: bool | None = None  # the upstream's template opens <think>, and its content keeps the thought
    silence_seconds: float = 1000.0  # between two parts of an upstream's answer

    # How requests are answered; each may say otherwise.
    schedule: str = "low"  # widths of the rounds before the final call, such as 32,4; or low, medium, high, none
    order: Literal["shuffle", "length"] = "shuffle"  # of references; length is the released code's
    truncated: Literal["drop", "tail"] = "drop"  # a thought that was cut off: dropped, or its end is passed on
    overflow: Literal["shorten", "drop", "fail"] = "shorten"  # references that do not fit the context
    images: Literal["before", "after"] = "before"  # where they stand beside the text of a synthesis
    template: Path | None = None  # a Jinja file in place of the built-in text
    retries: int = 4  # of a call, after its first try
    backoff_seconds: float = 1.0  # before the first retry, doubled for each
    call_seconds: float | None = None  # for one try
    round_seconds: float | None = None  # after which a round goes on without its last calls, if it has the quorum
    quorum: float = 0.5  # share of a round that must have left a message by then
    agreement: float | None = None  # share of a round whose answers agree that ends a request

    host: str = "127.0.0.1"  # 0.0.0.0 lets other machines in; give an API key then
    port: int = 8000
    api_keys: tuple[str, ...] = ()  # any of them opens this server; better in the environment: STEPJAX_API_KEY=KEY,KEY
    model_name: str | None = None  # what requests call the model; by default as the other server
    allow_remote_images: bool = False  # pass URLs of images on; the other server fetches them
    drain_seconds: float = 30.0  # that requests under way are given after SIGTERM
    limits: Limits = Limits()

    def __post_init__(self):
        check_address(self.port, self.drain_seconds)
        if num_calls(parse_schedule(self.schedule)) > self.limits.pacore_calls:
            raise ConfigError(
                f"--schedule {self.schedule}: takes more calls than --limits.pacore-calls {self.limits.pacore_calls}"
            )

    def settings(self, environment: str | None) -> ServerSettings:
        """
        Args:
            environment: API keys, separated by commas.
        """
        keys = api_keys(self.api_keys, environment)
        return ServerSettings(
            model_name=self.model_name,
            api_keys=keys,
            hosts=LOOPBACK if self.host in LOOPBACK and not keys else (),
            limits=self.limits,
            pacore=self.pacore(),
            allow_remote_images=self.allow_remote_images,
        )

    def pacore(self) -> PacoreConfig:
        return PacoreConfig(
            schedule=parse_schedule(self.schedule),
            order=self.order,
            truncated=self.truncated,
            overflow=self.overflow,
            images=self.images,
            template=None if self.template is None else str(self.template),
            limits=RoundLimits(
                retries=self.retries,
                backoff_seconds=self.backoff_seconds,
                call_seconds=self.call_seconds,
                round_seconds=self.round_seconds,
                quorum=self.quorum,
                agreement=self.agreement,
            ),
        )

    def endpoint(self) -> Endpoint:
        return Endpoint(
            url=self.upstream,
            model=self.upstream_model,
            max_concurrent=self.max_concurrent,
            streams=self.stream,
            sends_seed=self.send_seed,
            silence_seconds=self.silence_seconds,
            max_context=self.max_context,
            tokenizer=self.tokenizer,
            opens_thought=self.opens_thought,
        )


def run(arguments: Sequence[str]) -> int:
    """Serves until a signal; returns the exit status: 0 stopped in order, 130 interrupted before it listened.

    Raises:
        StepjaxError: an argument is not usable.
    """
    args = tyro.cli(PacoreServeArguments, args=list(arguments), prog="stepjax pacore serve")
    settings, endpoint = args.settings(os.environ.get(KEY_VARIABLE)), args.endpoint()
    check_installed()
    Template(settings.pacore)  # whatever is wrong with it is told now, not to the first client
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each call
    warn_if_open("stepjax pacore serve", args.host, settings)

    from stepjax.serving.server import bind, serve
    from stepjax.serving.upstream import make_upstream_app

    async def main() -> None:
        upstream = HttpSampler(endpoint)
        await serve(make_upstream_app(upstream, settings), bound, drain_seconds=args.drain_seconds)

    try:
        with bind(args.host, args.port) as bound:
            asyncio.run(main())
    except KeyboardInterrupt:
        return 130
    return 0
