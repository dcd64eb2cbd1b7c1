"""From a request to the configuration of its rounds."""

import dataclasses
import secrets

from stepjax.errors import ConfigError
from stepjax.pacore.config import PacoreConfig, Schedule, check_schedule, num_calls, parse_schedule, show
from stepjax.serving.errors import ApiError
from stepjax.serving.model_names import Choice
from stepjax.serving.schemas import ChatRequest, PacoreOptions
from stepjax.serving.settings import ServerSettings

_SEED_BITS = 53  # that JSON numbers hold exactly everywhere


def pacore_config(
    request: ChatRequest, chosen: Choice, settings: ServerSettings, *, max_context: int | None
) -> PacoreConfig:
    """
    Args:
        max_context: of the model, where it is known.

    Raises:
        ApiError: 400, a value is out of range, or goes with PaCoRe not at all.
    """
    options, base = request.pacore or PacoreOptions(), settings.pacore
    schedule = _schedule(options, chosen, base.schedule)
    if num_calls(schedule) > settings.limits.pacore_calls:
        message = (
            f"schedule {show(schedule)[:100]} takes {num_calls(schedule)} calls, more than the limit of "
            f"{settings.limits.pacore_calls} for a request"
        )
        raise ApiError(400, message, param="pacore.schedule", code="invalid_value")
    if request.n != 1:
        message = f"n={request.n}: PaCoRe gives one answer; the schedule says how many trajectories it is made of"
        raise ApiError(400, message, param="n", code="invalid_value")
    if request.logprobs:
        message = "logprobs are of one sample, and PaCoRe draws many: leave them out"
        raise ApiError(400, message, param="logprobs", code="unsupported_parameter")
    seed = secrets.randbits(_SEED_BITS) if request.seed is None else request.seed
    # Rounds later than the first need room for more than a word.
    answer_tokens = base.answer_tokens if max_context is None else max(1, min(base.answer_tokens, max_context // 4))
    try:
        return dataclasses.replace(
            base,
            **_given(options, ("order", "overflow", "truncated", "images")),
            schedule=schedule,
            sampling=dataclasses.replace(request.params(), seed=seed),
            answer_tokens=answer_tokens,
            limits=dataclasses.replace(
                base.limits,
                **_given(options, ("quorum", "round_seconds", "call_seconds", "retries", "agreement")),
            ),
        )
    except ConfigError as error:
        raise _refused(error, str(error).partition("=")[0]) from None


def _schedule(options: PacoreOptions, chosen: Choice, default: Schedule) -> Schedule:
    if options.schedule is None:
        return default if chosen.schedule is None else chosen.schedule
    try:
        given = options.schedule
        schedule = parse_schedule(given) if isinstance(given, str) else check_schedule(tuple(given))
    except ConfigError as error:
        raise _refused(error, "schedule") from None
    if chosen.schedule not in (None, schedule):
        message = f"pacore.schedule and the model {chosen.name!r} differ: give one of them"
        raise ApiError(400, message, param="pacore.schedule", code="invalid_value")
    return schedule


def _given(options: PacoreOptions, names: tuple[str, ...]) -> dict[str, object]:
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def _refused(error: ConfigError, name: str) -> ApiError:
    param = f"pacore.{name}" if name in PacoreOptions.model_fields else None
    return ApiError(400, str(error)[:500], param=param, code="invalid_value")
