"""User errors. Each names the offending thing and its value, and says what to change.

All are `ValueError`s, so that callers may catch either; the command line prints the message without a traceback.
Broken invariants of our own code are plain `assert`s instead. At the end: the checks that all configurations share.
"""


class StepjaxError(ValueError):
    """Something the user gave us cannot be used; the message says what to change."""


class ConfigError(StepjaxError):
    """A configuration value, or a combination of them, is not usable."""


class ImageError(StepjaxError):
    """An image cannot be read, or cannot be cut into views."""


class ImageSizeError(ImageError):
    """An image is larger than is allowed, or takes more work than is."""


class TokenError(StepjaxError):
    """A tokenizer, a chat conversation or a token sequence is not usable."""


class LimitError(StepjaxError):
    """Work on data from outside takes more time or memory than it is given."""


class RecordError(StepjaxError):
    """A training record is malformed, or does not fit the batch."""


class CheckpointError(StepjaxError):
    """A checkpoint is missing, incomplete, or belongs to another model."""


class TrainingDivergedError(StepjaxError):
    """The loss or the gradients stopped being finite."""


class RequestError(StepjaxError):
    """A request for generation cannot be served as it is."""


class ContextLengthError(RequestError):
    """A prompt, or a prompt with its answer, is longer than the context.

    Attributes:
        excess: by how many tokens, as far as they are counted.
    """

    def __init__(self, message: str, *, excess: int):
        super().__init__(message)
        self.excess = excess


class BusyError(RequestError):
    """Too many requests are waiting; the same one may succeed later."""


def require(section: str, config: object, **checks: tuple[bool, str]) -> None:
    """Raises ConfigError for the first field whose check fails.

    Args:
        section: of the configuration, for the name of the field; "" at the top.
        checks: whether a field is as it must be, and what to change otherwise.
    """
    for name, (is_met, remedy) in checks.items():
        if not is_met:
            raise ConfigError(f"{section and section + '.'}{name}={getattr(config, name)!r}: {remedy}")


def require_positive(section: str, config: object, *names: str) -> None:
    """Raises ConfigError for the first field that is not positive, NaN among them."""
    require(section, config, **{name: (getattr(config, name) > 0, "must be positive") for name in names})


def require_not_negative(section: str, config: object, *names: str) -> None:
    """Raises ConfigError for the first field that is negative or NaN."""
    require(section, config, **{name: (getattr(config, name) >= 0, "must not be negative") for name in names})
