"""`stepjax serve` and `stepjax pacore serve`: their options, and the server from loading to shutdown."""

import asyncio
import dataclasses
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from stepjax.errors import CheckpointError, ConfigError
from stepjax.interop.engines import EngineArguments, load_engines
from stepjax.pacore.config import PacoreConfig, num_calls, show
from stepjax.processing.synthesis import Template
from stepjax.rollouts.endpoint import EndpointConfig, EndpointSampler
from stepjax.serving.settings import LOOPBACK, PACORE, ServerSettings

if TYPE_CHECKING:  # commands parse their arguments without NumPy
    from stepjax.tofc.tables import Tables

KEY_VARIABLE = "STEPJAX_API_KEY"

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serve:
    """Serve the OpenAI chat and completions API, with a web page to chat in."""

    # A Hugging Face directory, a converted checkpoint or a training run.
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    server: Annotated[ServerSettings, tyro.conf.arg(name="")] = ServerSettings()
    warm_up: bool = True  # compile before listening, so that the first requests do not wait for it
    local: Annotated[EngineArguments, tyro.conf.arg(name="")] = EngineArguments()
    pacore: PacoreConfig = PACORE  # defaults for requests with PaCoRe

    def run(self) -> int:
        """Serves until a signal; returns the exit status: 0 clean shutdown, 70 engine failure."""
        self.local.check()
        settings = _prepared(self.server, self.pacore, model_name=Path(self.model).expanduser().absolute().name)
        from stepjax.inference.replicas import AsyncReplicas
        from stepjax.serving.app import make_app
        from stepjax.serving.server import bind, serve

        async def main() -> int:
            async with AsyncReplicas(engines) as running:
                return await serve(make_app(running, processor, settings, self.pacore, codec), bound)

        with bind(settings.host, settings.port) as bound:  # first: a bad port fails before minutes of loading
            engines, processor = load_engines(self.model, self.local)
            codec = _codec(self.model)
            if self.warm_up:
                count = sum(engine.warm_up(progress=lambda what: _log.info("compiling %s", what)) for engine in engines)
                _log.info("compiled %d programs", count)
            return asyncio.run(main())


@dataclasses.dataclass(frozen=True, kw_only=True)
class PacoreServe:
    """Serve the OpenAI chat API with PaCoRe over another server, with a web page that shows the rounds.

    The upstream API key comes from the environment: STEPJAX_UPSTREAM_API_KEY or OPENAI_API_KEY.
    """

    upstream: EndpointConfig
    pacore: Annotated[PacoreConfig, tyro.conf.arg(name="")] = PACORE  # defaults for requests
    server: Annotated[ServerSettings, tyro.conf.arg(name="")] = ServerSettings()

    def run(self) -> int:
        """Serves until a signal; returns the exit status, 0."""
        settings = _prepared(self.server, self.pacore, model_name=None)
        from stepjax.serving.app import make_upstream_app
        from stepjax.serving.server import bind, serve

        async def main() -> int:
            return await serve(make_upstream_app(EndpointSampler(self.upstream), settings, self.pacore), bound)

        for name in ("httpx", "httpx2"):
            logging.getLogger(name).setLevel(logging.WARNING)  # INFO logs a line for each call
        with bind(settings.host, settings.port) as bound:
            return asyncio.run(main())


def _codec(path: str) -> "Tables | None":
    """The codec of a run that has one. Without its files the run is served too: they are written when it has ended."""
    from stepjax.interop.codec_files import load_codec
    from stepjax.interop.load import open_checkpoint
    from stepjax.interop.orbax_directory import OrbaxDirectory

    source = OrbaxDirectory(path) if "://" in path else open_checkpoint(path)
    if not isinstance(source, OrbaxDirectory) or source.run is None or source.run.model.tofc is None:
        return None
    try:
        codec = load_codec(source)
    except CheckpointError as error:
        _log.warning("features of devices are refused: %s", error)
        return None
    _log.info("features of devices are accepted from codec %s", codec.id)
    return codec


def _prepared(server: ServerSettings, pacore: PacoreConfig, *, model_name: str | None) -> ServerSettings:
    """Completes the settings and starts the log. Raises ConfigError: an option is invalid or a library is missing."""
    calls, most = num_calls(pacore.schedule), server.limits.pacore_calls
    if calls > most:
        raise ConfigError(f"--schedule {show(pacore.schedule)}: needs more calls than --limits.pacore-calls {most}")
    Template(pacore.template, pacore.images)  # fails now rather than on the first request
    settings = server.completed(environment=os.environ.get(KEY_VARIABLE), model_name=model_name)
    try:
        import prometheus_client  # noqa: F401

        from stepjax.serving.server import start_log
    except ImportError as error:
        raise ConfigError(f"serving needs {error.name}: pip install 'stepjax[serve]'") from error
    start_log()
    if not settings.api_keys and settings.host not in LOOPBACK:
        _log.warning("no API key: anyone who can reach %s can use the model", settings.host)
    return settings
