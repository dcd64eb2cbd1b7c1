"""Compaction: from a trajectory to the message that it leaves, and from a round's messages to the references of the
next prompt, in their order and shortened to fit (section 2.1).

C(w) keeps the conclusion and drops the reasoning: what stands after the last `</think>`. A trajectory that was cut off
in its reasoning has no conclusion. It is dropped, or the end of the reasoning is passed on; never all of it.
"""

import dataclasses
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from stepjax.errors import ContextLengthError
from stepjax.pacore.config import PacoreConfig
from stepjax.pacore.records import Reference, Trajectory
from stepjax.rollouts.sampler import TokenCounter

CUT_MARK = "[...] "  # marks where the beginning of a message was cut

_LEAST_TOKENS = 16  # a shorter reference says nothing, so references are dropped instead


def compact(trajectory: Trajectory, config: PacoreConfig, tokens: TokenCounter | None) -> Reference | str:
    """The message of a trajectory, or why it leaves none: its status, "empty" or "truncated".

    Args:
        tokens: needed if `config.truncated` is "tail".
    """
    if trajectory.status != "ok":
        return trajectory.status
    rollout = trajectory.rollout
    _, _, conclusion = rollout.content.rpartition("</think>")
    calls = [_call_text(call) for call in rollout.tool_calls]
    text = "\n".join(part for part in (conclusion.strip(), *calls) if part)
    if text:
        return Reference(trajectory.index, text)
    if rollout.finish_reason != "length":
        return "empty"
    reasoning = (rollout.reasoning or "").strip()
    if config.truncated == "drop" or not reasoning:
        return "truncated"
    assert tokens is not None, "checked when the coordinator was made"
    return end_of(Reference(trajectory.index, reasoning), tokens.tail(reasoning, config.tail_tokens))


def answers(messages: Iterable[Reference]) -> list[Reference]:
    """The messages that may be voted on: ends of reasoning only if there is nothing else."""
    messages = list(messages)
    return [message for message in messages if not message.was_cut] or messages


def end_of(message: Reference, text: str) -> Reference:
    """A message cut to its end `text`, and marked as cut."""
    return dataclasses.replace(message, text=CUT_MARK + text.lstrip(), was_cut=True)


def _call_text(call: dict) -> str:
    """A proposed call as the markup of the authors' server: tool_call, function, parameter."""
    function = call.get("function", call)
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            pass
    if not isinstance(arguments, dict):
        arguments = {"arguments": arguments}
    lines = ["<tool_call>", f"<function={function.get('name')}>"]
    for name, value in arguments.items():
        shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        lines.append(f"<parameter={name}>\n{shown}\n</parameter>")
    return "\n".join([*lines, "</function>", "</tool_call>"])


def ordered(
    messages: Iterable[Reference], trajectories: Sequence[Trajectory], config: PacoreConfig, seed: int
) -> list[Reference]:
    """References in the order of the next prompt; it does not depend on which call ended first.

    Args:
        messages: those of `trajectories`, matched by index.
        seed: for the shuffle; `config.order` "length" always uses 42.
    """
    references = sorted(messages, key=lambda message: message.index)
    if config.order == "shuffle":
        random.Random(seed).shuffle(references)
        return references
    # The released code sorts by the length of its server's `content`: the whole output or, if the server parses
    # reasoning, the part after it. Here reasoning is always parsed.
    lengths = {each.index: len(each.rollout.content) for each in trajectories}
    references.sort(key=lambda message: lengths.get(message.index, len(message.text)))
    random.Random(42).shuffle(references)
    return references


# Fitting references into the context.


def fitted(
    references: Sequence[Reference], error: ContextLengthError, config: PacoreConfig, tokens: TokenCounter | None
) -> list[Reference]:
    """Fewer or shorter references, in the same order, with `error.excess` fewer tokens.

    "shorten" finds the largest common limit: short references stay whole, the others keep their ends, which have the
    conclusions. "drop" removes the longest. At least one stays.

    Raises:
        ContextLengthError: `config.overflow` is "fail", tokens cannot be counted, or not even one reference fits.
    """
    if config.overflow == "fail" or tokens is None or not references:
        raise error
    counts = [tokens.count(reference.text) for reference in references]
    # Joining texts may add or remove a token at each seam.
    room = sum(counts) - error.excess - len(references)
    if config.overflow == "shorten":
        most = _water_level(counts, room)
        if most >= _LEAST_TOKENS:
            return [
                reference if count <= most else _shortened(reference, most, tokens)
                for reference, count in zip(references, counts, strict=True)
            ]
    kept: set[int] = set()
    for i in sorted(range(len(references)), key=lambda i: (counts[i], i)):
        if counts[i] <= room:
            kept.add(i)
            room -= counts[i]
    if not kept:
        raise error
    return [reference for i, reference in enumerate(references) if i in kept]


def _water_level(counts: Sequence[int], room: int) -> int:
    """The largest m for which the sum of min(count, m) is at most `room`; negative if there is none."""
    left, rest = room, sorted(counts)
    for i, count in enumerate(rest):
        if count * (len(rest) - i) > left:
            return left // (len(rest) - i)
        left -= count
    return max(counts, default=0)


def _shortened(reference: Reference, most: int, tokens: TokenCounter) -> Reference:
    """The reference's end, at most `most` tokens with the mark. An end may have more tokens than inside its text."""
    text = reference.text.removeprefix(CUT_MARK) if reference.was_cut else reference.text
    left = most
    while left > 0:
        short = end_of(reference, tokens.tail(text, left))
        over = tokens.count(short.text) - most
        if over <= 0:
            return short
        left -= over
    return end_of(reference, "")


def losses_of_fitting(before: Sequence[Reference], after: Sequence[Reference]) -> tuple[int, int]:
    """The number of references dropped, and of whole ones shortened."""
    whole = {message.index for message in before if not message.was_cut}
    return len(before) - len(after), sum(message.was_cut and message.index in whole for message in after)


# Citations: "Reference 3", "Ref. 3", "references 1 and 4", and the Chinese word for it.

_WORD = re.compile(
    r"(?:\bref(?:erence)?s?\b\.?|\u53c2\u8003(?:\u7b54\u6848)?)\s*#?\s*"
    r"(\d{1,4}(?:(?:\s*[,&\u3001]\s*|\s+and\s+|\s*\u548c\s*)#?\d{1,4})*)",
    re.IGNORECASE,
)


class Citation(NamedTuple):
    """A citation at `text[start:end]`; the first of several includes the word before it."""

    start: int
    end: int
    number: int


def find_citations(text: str, num_references: int) -> Iterator[Citation]:
    """Citations of the references, numbered from 1, in order."""
    for match in _WORD.finditer(text):
        for i, found in enumerate(re.finditer(r"\d+", match[1])):
            start = match.start(1) + found.start() if i else match.start()
            if 1 <= int(found[0]) <= num_references:
                yield Citation(start, match.start(1) + found.end(), int(found[0]))


def citations(text: str, num_references: int) -> dict[int, int]:
    """Citation counts by reference number, from 1; uncited references are omitted."""
    counts = Counter(citation.number for citation in find_citations(text, num_references))
    return dict(sorted(counts.items()))
