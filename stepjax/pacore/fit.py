"""References for which a prompt has no room: shortened or dropped, as the configuration says, and counted."""

from collections.abc import Sequence

from stepjax.errors import ContextLengthError
from stepjax.pacore.config import PacoreConfig
from stepjax.pacore.records import Message
from stepjax.pacore.template import CUT_MARK, with_ends
from stepjax.rollouts.sampler import TokenCounter

# Shorter than that a reference says nothing; then references are dropped.
_LEAST_TOKENS = 16


def fitted(
    references: Sequence[Message], error: ContextLengthError, config: PacoreConfig, tokens: TokenCounter | None
) -> list[Message]:
    """Fewer or shorter references, in their order, with `error.excess` tokens less.

    "shorten" finds the length that is the most for each, so that short ones stay whole, and keeps the ends of the
    others, where conclusions stand. "drop" leaves out the longest. At least one stays.

    Raises:
        ContextLengthError: `config.overflow` is "fail", tokens cannot be counted, or there is no room even for one.
    """
    if config.overflow == "fail" or tokens is None or not references:
        raise error
    counts = [tokens.count(reference.text) for reference in references]
    # Texts that are put together may make a token more or less at each seam.
    room = sum(counts) - error.excess - len(references)
    if config.overflow == "shorten":
        most = _water_level(counts, room)
        if most >= _LEAST_TOKENS:
            return [
                reference if count <= most else _shortened(reference, most, tokens)
                for reference, count in zip(references, counts, strict=True)
            ]
    by_length = sorted(range(len(references)), key=lambda i: (counts[i], i))
    kept: set[int] = set()
    for i in by_length:
        if counts[i] <= room:
            kept.add(i)
            room -= counts[i]
    if not kept:
        raise error
    return [reference for i, reference in enumerate(references) if i in kept]


def _water_level(counts: Sequence[int], room: int) -> int:
    """The largest m for which the sum of min(count, m) is at most `room`; below 0 where there is none."""
    left, rest = room, sorted(counts)
    for i, count in enumerate(rest):
        if count * (len(rest) - i) > left:
            return left // (len(rest) - i)
        left -= count
    return max(counts, default=0)


def _shortened(reference: Message, most: int, tokens: TokenCounter) -> Message:
    """Its end, of at most `most` tokens. The sign that the beginning is missing has some, and an end can have more by
    itself than it had in its text.
    """
    left = most
    while left > 0:
        short = with_ends(reference, tokens.tail(_unmarked(reference), left))
        over = tokens.count(short.text) - most
        if over <= 0:
            return short
        left -= over
    return with_ends(reference, "")


def _unmarked(reference: Message) -> str:
    return reference.text.removeprefix(CUT_MARK) if reference.was_cut else reference.text


def losses_of_fitting(before: Sequence[Message], after: Sequence[Message]) -> tuple[int, int]:
    """How many references were dropped, and how many were shortened that were whole."""
    whole = {message.index for message in before if not message.was_cut}
    return len(before) - len(after), sum(message.was_cut and message.index in whole for message in after)
