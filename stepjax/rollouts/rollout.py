"""The rollout: one sample of a model. Inference produces it, PaCoRe compacts it, rewards score it, RL trains on it, the
server answers with it, viewers show it, and files store it in one JSON form.

    {"version": 1, "content": "7", "reasoning": "3 + 4", "finish_reason": "stop", "num_tokens": 12, "seed": 5, ...}
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import pydantic

from stepjax.errors import RecordError

VERSION = 1

# No coercion: the string "5" is not a seed. Only JSON lists become tuples.
Text = Annotated[str, pydantic.Strict()]
Int = Annotated[int, pydantic.Strict()]
Count = Annotated[int, pydantic.Strict(), pydantic.Field(ge=0)]
Number = Annotated[float, pydantic.Strict(), pydantic.AllowInfNan(False)]

T = TypeVar("T")


def validated(adapter: pydantic.TypeAdapter[T], fields: Mapping[str, Any], what: str) -> T:
    """A record from its fields.

    Raises:
        RecordError: names a field that is missing, unknown or of the wrong type.
    """
    try:
        return adapter.validate_python(fields)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise RecordError(f"{what} field {where}={first['input']!r:.100}: {first['msg']}") from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollout:
    """
    Attributes:
        content: the answer, without the reasoning; empty if the reasoning was cut off.
        tool_calls: in OpenAI's form.
        finish_reason: "stop", "length" or "tool_calls".
        stop_reason: the request's stop string or id that ended it, if any.
        mean_logprob: of the sampled tokens under the model, if log-probabilities were requested.
        start: seconds on the sampling caller's clock (PaCoRe: since the problem began).
        seconds: from the call to the end; includes queueing in a local engine.
        num_prompt_tokens, num_cached_tokens: tokens of the prompt, and how many of them were cached.
        num_tokens: sampled, without the token that ended it.
        text: the raw output, markup included. This field and those below are empty unless requested (see
            `without_tokens`); an endpoint never fills them.
        prompt_ids, token_ids: ids of the prompt, and as sampled. A rollout that a stop token ended includes that token;
            one that was cut off has none.
        logprobs: of `token_ids` under the model, before temperature and filters.
        sampling_logprobs: under the distribution that they were sampled from; 0 at temperature 0.
        top_logprobs: for each token the most likely ones as `(id, log-probability)`, best first.
    """

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")

    content: Text = ""
    reasoning: Text | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    finish_reason: Text = "stop"
    stop_reason: Text | Int | None = None
    seed: Int = 0
    mean_logprob: Number | None = None
    start: Number = 0.0
    seconds: Number = 0.0
    num_prompt_tokens: Count = 0
    num_cached_tokens: Count = 0
    num_tokens: Count = 0
    text: Text = ""
    prompt_ids: tuple[Int, ...] = ()
    token_ids: tuple[Int, ...] = ()
    logprobs: tuple[Number, ...] = ()
    sampling_logprobs: tuple[Number, ...] = ()
    top_logprobs: tuple[tuple[tuple[Int, Number], ...], ...] = ()

    @property
    def has_answer(self) -> bool:
        """Whether there is more than reasoning and white space."""
        return bool(self.content.strip() or self.tool_calls)

    def without_tokens(self) -> "Rollout":
        """Drops the fields that only training needs; they take many times the memory of the rest."""
        bare = dict.fromkeys(("prompt_ids", "token_ids", "logprobs", "sampling_logprobs", "top_logprobs"), ())
        return dataclasses.replace(self, text="", **bare)

    def to_json(self) -> dict[str, Any]:
        """The JSON form; fields with their default value are omitted."""
        fields = dataclasses.fields(self)
        given = {each.name: getattr(self, each.name) for each in fields if getattr(self, each.name) != each.default}
        return {"version": VERSION, **given}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Rollout":
        """The inverse of `to_json`, also after a round trip through text.

        Raises:
            RecordError: a field is unknown or of the wrong type, or the version differs.
        """
        version = fields.get("version")
        if version != VERSION:
            raise RecordError(f"rollout version={version!r:.100}: this stepjax reads version {VERSION}")
        return validated(_ROLLOUT, {name: value for name, value in fields.items() if name != "version"}, "rollout")


_ROLLOUT = pydantic.TypeAdapter(Rollout)
