"""Which references a text speaks of: "Reference 3", "Ref. 3", "references 1 and 4", and the Chinese word for it."""

import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

_WORD = re.compile(
    r"(?:\bref(?:erence)?s?\b\.?|\u53c2\u8003(?:\u7b54\u6848)?)\s*#?\s*(\d{1,4}(?:(?:\s*[,&\u3001]\s*|\s+and\s+|\s*\u548c\s*)#?\d{1,4})*)",
    re.IGNORECASE,
)  # noqa: E501


class Citation(NamedTuple):
    """A place in a text that names a reference: `text[start:end]`, the word included for the first of several."""

    start: int
    end: int
    number: int


def find_citations(text: str, num_references: int) -> Iterator[Citation]:
    """The places, in their order, that name a reference that there is."""
    for match in _WORD.finditer(text):
        for i, found in enumerate(re.finditer(r"\d+", match[1])):
            number = int(found[0])
            if 1 <= number <= num_references:
                yield Citation(
                    match.start(1) + found.start() if i else match.start(), match.start(1) + found.end(), number
                )


def citations(text: str, num_references: int) -> dict[int, int]:
    """How often each reference is cited, by its number from 1; only those that are cited, and that there are."""
    counts = Counter(citation.number for citation in find_citations(text, num_references))
    return {number: counts[number] for number in sorted(counts)}
