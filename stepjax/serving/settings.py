"""What a server allows, and for how long."""

import dataclasses

from stepjax.errors import ConfigError
from stepjax.pacore.config import PacoreConfig

MiB = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds on requests. What is over one is refused by name, before it costs memory or time.

    Raises:
        ConfigError: a limit is not positive.
    """

    requests: int = 256  # under way at a time; more are answered with status 429
    connections: int = 1024  # open at a time; of more, the one that has been without a request for longest is closed
    head_seconds: float = 20.0  # for a connection to bring a request's head, from its opening or its last answer
    samples: int = 64  # prompts times n of one request
    pacore_calls: int = 64  # of one request that is answered with PaCoRe, the final one included
    body_bytes: int = 32 * MiB
    body_values: int = 262_144  # JSON values of a body, such as the ids of a prompt of tokens
    body_seconds: float = 60.0  # for a body to arrive
    text_bytes: int = 4 * MiB  # of a prompt, before it is tokenized
    prompt_tokens: int | None = None  # None: what the context holds
    images: int = 16  # of one request
    image_bytes: int = 16 * MiB  # of one image file
    image_pixels: int = 33_554_432  # of one image
    view_bytes: int = 4096 * MiB  # views of all requests under way; more wait for their turn
    write_seconds: float = 60.0  # that a client may take to read what is ready; then its request is cancelled

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and not value > 0:
                raise ConfigError(f"limits.{field.name}={value!r}: must be positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """How an app answers.

    Raises:
        ConfigError: a value cannot work.
    """

    model_name: str | None  # None: the upstream's own, where there is one
    api_keys: tuple[str, ...] = dataclasses.field(default=(), repr=False)  # any of them opens the server; none: anybody
    hosts: tuple[str, ...] = ()  # names in the header `Host` that are answered to; none: all
    limits: Limits = Limits()
    pacore: PacoreConfig = PacoreConfig()  # of what requests leave open
    allow_remote_images: bool = False  # fetch images from public addresses
    fetch_seconds: float = 10.0  # for one remote image, redirects included
    workers: int = 2  # threads that read images and make prompts

    def __post_init__(self):
        if self.model_name == "":
            raise ConfigError(f"model_name={self.model_name!r}: must not be empty")
        if not all(key.strip() and key.isascii() for key in self.api_keys):
            raise ConfigError("an API key is empty or not ASCII: give a long random one")
        for name in ("fetch_seconds", "workers"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)!r}: must be positive")
