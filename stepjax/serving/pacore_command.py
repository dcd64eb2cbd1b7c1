"""`stepjax pacore serve`: PaCoRe in front of any server that speaks OpenAI's chat completions."""

import asyncio
import dataclasses
import logging
import os
from collections.abc import Sequence
from typing import Annotated

import tyro

from stepjax.errors import ConfigError
from stepjax.pacore.config import PacoreConfig, num_calls, show
from stepjax.pacore.template import Template
from stepjax.rollouts.endpoint import EndpointConfig, EndpointSampler
from stepjax.serving.command import KEY_VARIABLE, LOOPBACK, api_keys, check_address, check_installed, warn_if_open
from stepjax.serving.logs import start_log
from stepjax.serving.settings import Limits, ServerSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class PacoreServeArguments:
    """Answer OpenAI's chat requests with PaCoRe over another server, and show its rounds in a browser.

    The other server's key, if it wants one, is taken from the environment: STEPJAX_UPSTREAM_API_KEY or OPENAI_API_KEY.
    """

    upstream: EndpointConfig = EndpointConfig()  # the other server
    pacore: Annotated[PacoreConfig, tyro.conf.arg(name="")] = PacoreConfig()  # each request may say otherwise
    host: str = "127.0.0.1"  # 0.0.0.0 lets other machines in; give an API key then
    port: int = 8000
    api_keys: tuple[str, ...] = ()  # any of them opens this server; better in the environment: STEPJAX_API_KEY=KEY,KEY
    model_name: str | None = None  # what requests call the model; by default as the other server
    allow_remote_images: bool = False  # pass URLs of images on; the other server fetches them
    drain_seconds: float = 30.0  # that requests under way are given after SIGTERM
    limits: Limits = Limits()

    def __post_init__(self):
        check_address(self.port, self.drain_seconds)
        if num_calls(self.pacore.schedule) > self.limits.pacore_calls:
            raise ConfigError(
                f"--schedule {show(self.pacore.schedule)}: takes more calls than --limits.pacore-calls "
                f"{self.limits.pacore_calls}"
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
            pacore=self.pacore,
            allow_remote_images=self.allow_remote_images,
        )


def run(arguments: Sequence[str]) -> int:
    """Serves until a signal; returns the exit status: 0 stopped in order, 130 interrupted before it listened.

    Raises:
        StepjaxError: an argument is not usable.
    """
    args = tyro.cli(
        PacoreServeArguments, args=list(arguments), prog="stepjax pacore serve", config=(tyro.conf.AvoidSubcommands,)
    )
    settings, endpoint = args.settings(os.environ.get(KEY_VARIABLE)), args.upstream
    check_installed()
    Template(settings.pacore)  # whatever is wrong with it is told now, not to the first client
    start_log()
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each call
    warn_if_open("stepjax pacore serve", args.host, settings)

    from stepjax.serving.server import bind, serve
    from stepjax.serving.upstream import make_upstream_app

    async def main() -> int:
        upstream = EndpointSampler(endpoint)
        return await serve(make_upstream_app(upstream, settings), bound, drain_seconds=args.drain_seconds)

    try:
        with bind(args.host, args.port) as bound:
            return asyncio.run(main())
    except KeyboardInterrupt:
        return 130
