"""`stepjax serve`: its arguments, and the server's life from loading to the last answer."""

import asyncio
import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from stepjax.errors import ConfigError
from stepjax.interop.engines import EngineArguments, load_engines
from stepjax.serving.logs import start_log
from stepjax.serving.settings import Limits, ServerSettings

KEY_VARIABLE = "STEPJAX_API_KEY"
_log = logging.getLogger("stepjax.serving")
LOOPBACK = ("localhost", "127.0.0.1", "::1", "[::1]")


@dataclasses.dataclass(frozen=True)
class ServeArguments:
    """Answer OpenAI's chat and completion requests, and show a page to chat in a browser."""

    # A Hugging Face directory, a converted checkpoint, or a run.
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    host: str = "127.0.0.1"  # 0.0.0.0 lets other machines in; give an API key then
    port: int = 8000
    api_keys: tuple[str, ...] = ()  # any of them opens the server; better in the environment: STEPJAX_API_KEY=KEY,KEY
    model_name: str | None = None  # what requests call the model; by default the directory's name
    warm_up: bool = True  # compile before listening, not while the first requests wait
    allow_remote_images: bool = False  # fetch images from public addresses of the Internet
    drain_seconds: float = 30.0  # that requests under way are given after SIGTERM
    workers: int = 2  # threads that read images and make prompts
    local: Annotated[EngineArguments, tyro.conf.arg(name="")] = EngineArguments()
    limits: Limits = Limits()

    def __post_init__(self):
        check_address(self.port, self.drain_seconds)
        self.local.check()

    def settings(self, environment: str | None) -> ServerSettings:
        """
        Args:
            environment: API keys, separated by commas.
        """
        keys = api_keys(self.api_keys, environment)
        return ServerSettings(
            model_name=self.model_name or Path(self.model).expanduser().absolute().name,
            api_keys=keys,
            hosts=LOOPBACK if self.host in LOOPBACK and not keys else (),
            limits=self.limits,
            allow_remote_images=self.allow_remote_images,
            workers=self.workers,
        )


def check_address(port: int, drain_seconds: float) -> None:
    """
    Raises:
        ConfigError: one of them cannot work.
    """
    if not 0 <= port < 65536:
        raise ConfigError(f"--port {port}: must be from 0 (any) to 65535")
    if not drain_seconds >= 0:
        raise ConfigError(f"--drain-seconds {drain_seconds}: must not be negative")


def api_keys(given: tuple[str, ...], environment: str | None) -> tuple[str, ...]:
    """Those of the command line, and those of the environment, separated by commas."""
    return (*given, *(key.strip() for key in (environment or "").split(",") if key.strip()))


def check_installed() -> None:
    """
    Raises:
        ConfigError: what a server needs is not installed.
    """
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"serving needs {error.name}: pip install 'stepjax[serve]'") from error


def warn_if_open(program: str, host: str, settings: ServerSettings) -> None:
    if not settings.api_keys and host not in LOOPBACK:
        print(f"{program}: no API key: whoever reaches {host} can use the model", file=sys.stderr)


def run(arguments: Sequence[str]) -> int:
    """Serves until a signal; returns the exit status: 0 stopped in order, 70 the engine failed, 130 interrupted before
    it listened.

    Raises:
        StepjaxError: the model cannot be loaded, or an argument is not usable.
    """
    args = tyro.cli(ServeArguments, args=list(arguments), prog="stepjax serve")
    settings = args.settings(os.environ.get(KEY_VARIABLE))
    check_installed()
    start_log()
    warn_if_open("stepjax serve", args.host, settings)
    try:
        return _load_and_serve(args, settings)
    except KeyboardInterrupt:  # while the model was being loaded
        return 130


def _load_and_serve(args: ServeArguments, settings: ServerSettings) -> int:
    from stepjax.inference.replicas import AsyncReplicas
    from stepjax.serving.app import make_app
    from stepjax.serving.server import bind, serve

    async def main() -> int:
        async with AsyncReplicas(engines) as running:
            return await serve(make_app(running, processor, settings), bound, drain_seconds=args.drain_seconds)

    with bind(args.host, args.port) as bound:  # first, since loading takes minutes
        engines, processor = load_engines(args.model, args.local)
        if args.warm_up:
            count = sum(engine.warm_up(progress=lambda what: _log.info("compiling %s", what)) for engine in engines)
            _log.info("%d programs are compiled", count)
        return asyncio.run(main())
