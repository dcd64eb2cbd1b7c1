"""Refusals that all configurations share: a value that cannot work is named, with what would."""

from stepjax.errors import ConfigError


def require(condition: bool, name: str, value: object, remedy: str) -> None:
    """Raises ConfigError where the condition does not hold."""
    if not condition:
        raise ConfigError(f"{name}={value!r}: {remedy}")


def require_positive(section: str, config: object, *names: str) -> None:
    """Raises ConfigError where a field is not positive; names it as the section's."""
    for name in names:
        require(getattr(config, name) > 0, f"{section}.{name}", getattr(config, name), "must be positive")
