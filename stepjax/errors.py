"""User errors. Each names the offending field and its value, and says what to change.

All are `ValueError`s, so callers may catch either. The command line prints the message without a traceback. Invariants
of our own code are plain `assert`s instead. The last functions are the checks that all configurations share.
"""

from collections.abc import Sequence


class StepjaxError(ValueError):
    """Unusable user input; the message says what to change."""


class ConfigError(StepjaxError):
    """A configuration value, or a combination of values, is not usable."""


class ImageError(StepjaxError):
    """An image cannot be read, or cannot be cut into views."""


class ImageSizeError(ImageError):
    """An image is larger, or takes more work, than allowed."""


class TokenError(StepjaxError):
    """A tokenizer, a chat conversation or a token sequence is not usable."""


class LimitError(StepjaxError):
    """Work on external data exceeds its time or memory limit."""


class RecordError(StepjaxError):
    """A training record is malformed, or does not fit the batch."""


class CheckpointError(StepjaxError):
    """A checkpoint is missing, incomplete, or belongs to another model."""


class TrainingDivergedError(StepjaxError):
    """The loss or the gradients stopped being finite."""


class RequestError(StepjaxError):
    """A generation request cannot be served."""


class ContextLengthError(RequestError):
    """A prompt, or a prompt with its answer, is longer than the context.

    Attributes:
        excess: tokens over the limit, as far as they were counted.
    """

    def __init__(self, message: str, *, excess: int):
        super().__init__(message)
        self.excess = excess


class BusyError(RequestError):
    """Too many requests are waiting; retry later."""


class BitstreamError(StepjaxError):
    """Coded features cannot be read. The subclasses say why, and so whether sending them again may help."""


class CorruptStreamError(BitstreamError):
    """Coded features are truncated or damaged: send them again.

    Attributes:
        tiles: the damaged ones, where the damage is within tiles.
    """

    def __init__(self, message: str, *, tiles: Sequence[int] = ()):
        super().__init__(message)
        self.tiles = tuple(tiles)


class StreamLimitError(BitstreamError):
    """Coded features would be larger than the receiver allows."""


class UnknownModelError(BitstreamError):
    """Coded features were made with another entropy model, or another version of the format.

    Attributes:
        accepted: the identities, in hexadecimal, of the models that the receiver has.
    """

    def __init__(self, message: str, *, accepted: Sequence[str] = ()):
        super().__init__(message)
        self.accepted = tuple(accepted)


class AnswerError(StepjaxError):
    """A server has not answered a device.

    Attributes:
        attempts: what was tried (`stepjax.tofc.client.Attempt`), in order.
    """

    def __init__(self, message: str, attempts: Sequence[object] = ()):
        super().__init__(message)
        self.attempts = tuple(attempts)


class RefusedError(AnswerError):
    """The server refuses the question, or every form of its image."""


class UnreachableError(AnswerError):
    """The server does not answer, is too busy, or fails; it may answer later."""


def require(section: str, config: object, **checks: tuple[bool, str]) -> None:
    """Raises ConfigError for the first field whose check fails.

    Args:
        section: prefix of the field's name in the message; "" at the top level.
        checks: for each field, whether it is valid, and what to change if not.
    """
    for name, (is_met, remedy) in checks.items():
        if not is_met:
            raise ConfigError(f"{section and section + '.'}{name}={getattr(config, name)!r}: {remedy}")


def require_positive(section: str, config: object, *names: str) -> None:
    """Raises ConfigError for the first field that is not positive, or NaN."""
    require(section, config, **{name: (getattr(config, name) > 0, "must be positive") for name in names})


def require_not_negative(section: str, config: object, *names: str) -> None:
    """Raises ConfigError for the first field that is negative or NaN."""
    require(section, config, **{name: (getattr(config, name) >= 0, "must not be negative") for name in names})
