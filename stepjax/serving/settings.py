"""The server's settings and limits. `--help` shows the field comments."""

import dataclasses

from stepjax.errors import ConfigError, require_positive
from stepjax.inference.request import SamplingParams
from stepjax.pacore.config import PacoreConfig

MiB = 2**20
LOOPBACK = ("localhost", "127.0.0.1", "::1", "[::1]")
PACORE = PacoreConfig(sampling=SamplingParams())  # a seed is drawn for each request


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits on requests. The error names the limit, and a request is refused before it costs memory or time."""

    requests: int = 256  # in progress at a time; more get status 429
    connections: int = 1024  # open at a time; beyond that, the one idle longest is closed
    head_seconds: float = 20.0  # for a request head to arrive, from the connection's opening or its last answer
    samples: int = 64  # prompts times n, per request
    pacore_calls: int = 64  # per request with PaCoRe, the final call included
    body_bytes: int = 32 * MiB
    body_values: int = 262_144  # JSON values in a body, e.g. prompt token ids
    body_seconds: float = 60.0  # for a body to arrive
    text_bytes: int = 4 * MiB  # of a prompt, before it is tokenized
    prompt_tokens: int | None = None  # None: the model's context
    images: int = 16  # per request
    image_bytes: int = 16 * MiB  # per image file
    image_pixels: int = 33_554_432  # per image
    stream_bytes: int = MiB  # per image that a device has coded
    stream_cache_bytes: int = 64 * MiB  # decoded streams that are kept
    view_bytes: int = 4096 * MiB  # image views of all requests in progress; more wait for their turn
    write_seconds: float = 60.0  # for a client to read what is ready; then its request is cancelled

    def __post_init__(self):
        names = (field.name for field in dataclasses.fields(self))
        require_positive("limits", self, *(name for name in names if getattr(self, name) is not None))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Raises ConfigError: a value is invalid."""

    host: str = "127.0.0.1"  # 0.0.0.0 admits other machines; set an API key then
    port: int = 8000  # 0: any free port
    # Any one of them is accepted; better set in the environment: STEPJAX_API_KEY=KEY,KEY
    api_keys: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    hosts: tuple[str, ...] = ()  # accepted `Host` headers; default: any, or loopback only without an API key
    model_name: str | None = None  # the model's name in requests; default: its directory's name, or the upstream's
    allow_remote_images: bool = False  # fetch images from public addresses (or let the upstream do it)
    fetch_seconds: float = 10.0  # per remote image, redirects included
    drain_seconds: float = 30.0  # for requests in progress to finish after SIGTERM
    workers: int = 2  # threads that read images and make prompts
    limits: Limits = Limits()

    def __post_init__(self):
        if not 0 <= self.port < 65536:
            raise ConfigError(f"--port {self.port}: must be from 0 (any) to 65535")
        if not self.drain_seconds >= 0:
            raise ConfigError(f"--drain-seconds {self.drain_seconds}: must not be negative")
        if self.model_name == "":
            raise ConfigError(f"model_name={self.model_name!r}: must not be empty")
        if not all(key.strip() and key.isascii() for key in self.api_keys):
            raise ConfigError("an API key is empty or not ASCII: give a long random one")
        require_positive("", self, "fetch_seconds", "workers")

    def completed(self, *, environment: str | None, model_name: str | None = None) -> "ServerSettings":
        """Fills in the environment's API keys and the defaults.

        Args:
            environment: API keys, separated by commas.
            model_name: the default.
        """
        more = tuple(key.strip() for key in (environment or "").split(",") if key.strip())
        made = dataclasses.replace(self, api_keys=(*self.api_keys, *more), model_name=self.model_name or model_name)
        is_local = made.host in LOOPBACK and not made.api_keys
        return dataclasses.replace(made, hosts=made.hosts or (LOOPBACK if is_local else ()))
