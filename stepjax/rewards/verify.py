"""Which verifier a record has, and whether a text is right.

A record names its verifier in `verifier`; else its `task` does, if a verifier has that name; else the text must equal
the answer.
"""

from stepjax.errors import RecordError
from stepjax.rewards import code, verifiers  # noqa: F401 (they register functions)
from stepjax.rewards.registry import REWARDS, Record, Reward
from stepjax.tasks import extraction

_VERIFIES = ("verifier", "sandbox")


def verifier_of(record: Record) -> Reward:
    """
    Raises:
        RecordError: the record names none that exists.
    """
    name = record.get("verifier")
    if name is None:
        task = record.get("task")
        found = REWARDS.get(task) if isinstance(task, str) else None
        return found if found is not None and found.kind in _VERIFIES else REWARDS["text"]
    found = REWARDS.get(name) if isinstance(name, str) else None
    if found is None or found.kind not in _VERIFIES:
        names = ", ".join(sorted(each.name for each in REWARDS.values() if each.kind in _VERIFIES))
        raise RecordError(f"record {record.get('id')!r} has verifier={name!r:.100}: choose from {names}")
    return found


def is_right(record: Record, text: str) -> bool:
    """Whether the text answers the record. What cannot be decided is not right.

    Raises:
        RecordError: the record has no usable answer, or names an unknown verifier.
    """
    verifier = verifier_of(record)
    value = verifier.function(record, extraction.answer_text(text))
    return value is not None and value >= verifier.right
