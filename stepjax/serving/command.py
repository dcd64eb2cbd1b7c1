"""`stepjax serve` and `stepjax pacore serve`: their options, and a server's life from loading to the last answer."""

import asyncio
import dataclasses
import logging
import os
from pathlib import Path
from typing import Annotated

import tyro

from stepjax.errors import ConfigError
from stepjax.interop.engines import EngineArguments, load_engines
from stepjax.pacore.config import PacoreConfig, num_calls, show
from stepjax.pacore.template import Template
from stepjax.rollouts.endpoint import EndpointConfig, EndpointSampler
from stepjax.serving.settings import LOOPBACK, PACORE, ServerSettings

KEY_VARIABLE = "STEPJAX_API_KEY"

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serve:
    """Answer OpenAI's chat and completion requests, and show a page to chat in a browser."""

    # A Hugging Face directory, a converted checkpoint, or a run.
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    server: Annotated[ServerSettings, tyro.conf.arg(name="")] = ServerSettings()
    warm_up: bool = True  # compile before listening, not while the first requests wait
    local: Annotated[EngineArguments, tyro.conf.arg(name="")] = EngineArguments()
    pacore: PacoreConfig = PACORE  # for requests with PaCoRe, as far as they do not say otherwise

    def run(self) -> int:
        """Serves until a signal; returns the exit status: 0 stopped in order, 70 the engine failed."""
        self.local.check()
        settings = _prepared(self.server, self.pacore, model_name=Path(self.model).expanduser().absolute().name)
        from stepjax.inference.replicas import AsyncReplicas
        from stepjax.serving.app import make_app
        from stepjax.serving.server import bind, serve

        async def main() -> int:
            async with AsyncReplicas(engines) as running:
                return await serve(make_app(running, processor, settings, self.pacore), bound)

        with bind(settings.host, settings.port) as bound:  # first, since loading takes minutes
            engines, processor = load_engines(self.model, self.local)
            if self.warm_up:
                count = sum(engine.warm_up(progress=lambda what: _log.info("compiling %s", what)) for engine in engines)
                _log.info("%d programs are compiled", count)
            return asyncio.run(main())


@dataclasses.dataclass(frozen=True, kw_only=True)
class PacoreServe:
    """Answer OpenAI's chat requests with PaCoRe over another server, and show its rounds in a browser.

    The other server's key, if it wants one, is taken from the environment: STEPJAX_UPSTREAM_API_KEY or OPENAI_API_KEY.
    """

    upstream: EndpointConfig
    pacore: Annotated[PacoreConfig, tyro.conf.arg(name="")] = PACORE  # each request may say otherwise
    server: Annotated[ServerSettings, tyro.conf.arg(name="")] = ServerSettings()

    def run(self) -> int:
        """Serves until a signal; returns the exit status, 0."""
        settings = _prepared(self.server, self.pacore, model_name=None)
        from stepjax.serving.app import make_upstream_app
        from stepjax.serving.server import bind, serve

        async def main() -> int:
            return await serve(make_upstream_app(EndpointSampler(self.upstream), settings, self.pacore), bound)

        for name in ("httpx", "httpx2"):
            logging.getLogger(name).setLevel(logging.WARNING)  # a line for each call
        with bind(settings.host, settings.port) as bound:
            return asyncio.run(main())


def _prepared(server: ServerSettings, pacore: PacoreConfig, *, model_name: str | None) -> ServerSettings:
    """The settings in full; starts the log. Raises ConfigError if an option cannot work or a library is missing."""
    calls, most = num_calls(pacore.schedule), server.limits.pacore_calls
    if calls > most:
        raise ConfigError(f"--schedule {show(pacore.schedule)}: takes more calls than --limits.pacore-calls {most}")
    Template(pacore)  # fails now, not for the first client
    settings = server.completed(environment=os.environ.get(KEY_VARIABLE), model_name=model_name)
    try:
        import prometheus_client  # noqa: F401

        from stepjax.serving.server import start_log
    except ImportError as error:
        raise ConfigError(f"serving needs {error.name}: pip install 'stepjax[serve]'") from error
    start_log()
    if not settings.api_keys and settings.host not in LOOPBACK:
        _log.warning("no API key: whoever reaches %s can use the model", settings.host)
    return settings
