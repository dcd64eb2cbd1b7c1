"""Which references a text speaks of: "Reference 3", "Ref. 3", "references 1 and 4", and the Chinese word for it."""

import re
from collections import Counter

_WORD = re.compile(
    r"(?:\bref(?:erence)?s?\b\.?|\u53c2\u8003(?:\u7b54\u6848)?)\s*#?\s*(\d{1,4}(?:(?:\s*[,&\u3001]\s*|\s+and\s+|\s*\u548c\s*)#?\d{1,4})*)",
    re.IGNORECASE,
)  # noqa: E501


def citations(text: str, num_references: int) -> dict[int, int]:
    """How often each reference is cited, by its number from 1; only those that are cited, and that there are."""
    counts = Counter(int(number) for match in _WORD.finditer(text) for number in re.findall(r"\d+", match[1]))
    return {number: counts[number] for number in sorted(counts) if 1 <= number <= num_references}
