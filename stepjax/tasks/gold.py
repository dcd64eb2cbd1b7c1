"""The right answers that a record holds, and whether a text is one of them."""

import functools
import logging
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from stepjax.errors import RecordError
from stepjax.tasks.extraction import answer_text, last_boxed
from stepjax.tasks.same_answer import same

_log = logging.getLogger(__name__)


def answers(record: Mapping[str, Any], *, takes_numbers: bool = False) -> tuple[str, ...]:
    """The right answers: `answer` (a text, a list of texts, or a dict with `text`), else the last assistant turn.

    Args:
        takes_numbers: numbers are as good as texts.

    Raises:
        RecordError: the record has neither.
    """
    answer = record.get("answer")
    if answer is None and is_question(record):
        answer = record["messages"][-1].get("content")
        if isinstance(answer, list):  # of text items, unless it is malformed
            answer = "".join(str(item.get("text", "")) for item in answer if isinstance(item, dict))
        answer = answer if answer is None else answer_text(str(answer))
    texts = [answer.get("text")] if isinstance(answer, dict) else answer if isinstance(answer, list) else [answer]
    if takes_numbers:
        texts = [str(text) if type(text) in (int, float) else text for text in texts]
    right = tuple(text.strip() for text in texts if isinstance(text, str))
    if not right or len(right) < len(texts):
        refuse(record, "give a text or a list of texts, or omit it if the last assistant turn is the answer", answer)
    return right


def shown(record: Mapping[str, Any]) -> str:
    """The right answers for people."""
    try:
        return " or ".join(answers(record, takes_numbers=True))
    except RecordError:
        return str(record.get("answer"))  # such as a box


def is_question(record: Mapping[str, Any]) -> bool:
    """Whether the record is a conversation that ends with an assistant turn: the answer wanted from the model."""
    messages = record.get("messages")
    return isinstance(messages, list) and bool(messages) and messages[-1].get("role") == "assistant"


def same_as_any(answer: str, truths: Iterable[str]) -> bool | None:
    """Whether an extracted answer is one of the truths, which may be boxed; None if undecided, which is logged once.

    Raises:
        ConfigError: math-verify is not installed.
    """
    is_known = True
    for truth in truths:
        boxed = last_boxed(truth)
        verdict = same(truth.rpartition("####")[2] if boxed is None else boxed, answer)
        if verdict:
            return True
        if verdict is None:
            is_known = False
            _tell(truth[:200])
    return False if is_known else None


@functools.lru_cache(maxsize=1024)
def _tell(truth: str) -> None:
    """Logs each truth once."""
    _log.warning(
        "ground_truth %r: cannot be parsed, or comparing an answer with it took too long; such answers count as "
        "neither right nor wrong",
        truth,
    )


def refuse(record: Mapping[str, Any], remedy: str, answer: Any = None) -> NoReturn:
    """
    Args:
        answer: what was read as the answer; None: the record's `answer`.

    Raises:
        RecordError: always; it names the record and its answer.
    """
    answer = record.get("answer") if answer is None else answer
    raise RecordError(f"record {record.get('id')!r} has answer={answer!r:.200}: {remedy}")
