"""Penalties, from -1 to 0: mixed languages, fabricated citations, overconfidence.

They are simple rules, so each says what it does not see. Give them small weights.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from typing import Any

from stepjax.rewards.registry import Record, reward
from stepjax.tasks import gold

_FOREIGN_LETTERS, _FOREIGN_SHARE = 8, 0.02  # fewer may be names or quotations
# Scripts that are written together. Greek is mathematics.
_COMPANIONS = {"HIRAGANA": ("CJK", "KATAKANA"), "KATAKANA": ("CJK", "HIRAGANA"), "HANGUL": ("CJK",)}
_EVERYWHERE = {"LATIN", "GREEK", "MATHEMATICAL", "FULLWIDTH", "MODIFIER", "MICRO", "OHM", "ANGSTROM", "SCRIPT"}
_LANGUAGE = re.compile(
    r"\b(?:translat\w*|chinese|mandarin|japanese|korean|russian|ukrainian|arabic|hebrew|hindi|thai|persian|language)\b"
    r"|\u8bed|\u6587|\u7ffb\u8bd1|\u8a9e",
    re.IGNORECASE,
)
_NOT_PROSE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|\$[^$\n]*\$|https?://\S+", re.DOTALL)

_URL = re.compile(r"https?://[^\s<>\"'`\])}|\\^]+|\bwww\.[\w-]+\.[^\s<>\"'`\])}|\\^]+", re.IGNORECASE)
_DOI = re.compile(r"\b10\.\d{4,9}/[^\s<>\"'`\])}|\\^]+")
_ARXIV = re.compile(r"\barxiv[:.\s/]{1,3}(?:org/)?(?:abs/|pdf/)?\s*(\d{4}\.\d{4,5}|[a-z-]+/\d{7})", re.IGNORECASE)
_HOST = re.compile(r"(?:[\w.-]*\.)?(?:example\.(?:com|org|net)|localhost|127\.0\.0\.1)(?:[:/].*)?")

_SURE = re.compile(
    r"\b(?:definitely|certainly|undoubtedly|unquestionably|indisputably|obviously|guaranteed"
    r"|(?:there is |there's )?(?:no|without (?:a |any )?) ?doubt|beyond (?:a |any )?doubt"
    r"|(?:absolutely|completely|totally|entirely|fully|very|quite|100 ?%) (?:sure|certain|confident|right|correct)"
    r"|i(?:'m| am) (?:sure|certain|confident|positive))\b"
    r"|\u6beb\u65e0\u7591\u95ee|\u7edd\u5bf9\u6b63\u786e|\u5341\u5206\u786e\u5b9a|\u80af\u5b9a\u662f",
    re.IGNORECASE,
)
_HEDGED = re.compile(
    r"(?:\b(?:not|never|hardly|almost|nearly|isn't|aren't|nor|cannot|if|less)|n't)\W+(?:\w+\W+){0,2}\Z", re.I
)


@reward("language_mixing", kind="penalty")
def language_mixing(record: Record, text: str) -> float:
    """-1 if letters of scripts that neither question nor gold use are at least 8 and 2 % of all letters, else 0.

    Latin and Greek letters are at home everywhere, and code, formulas and links do not count. A question that speaks of
    languages allows all. Not seen: languages of one script, such as English with French.
    """
    asked = _question(record)
    if _LANGUAGE.search(asked):
        return 0.0
    allowed = set(_scripts(asked)) | _EVERYWHERE
    allowed |= {each for script in allowed for each in _COMPANIONS.get(script, ())}
    scripts = _scripts(_NOT_PROSE.sub(" ", text))
    foreign = sum(count for script, count in scripts.items() if script not in allowed)
    return -1.0 if foreign >= max(_FOREIGN_LETTERS, _FOREIGN_SHARE * scripts.total()) else 0.0


@reward("fabricated_citations", kind="penalty")
def fabricated_citations(record: Record, text: str) -> float:
    """-1 if there is a URL, a DOI or an arXiv id that is not in the question or the gold, else 0.

    Nothing is looked up, so one that exists is refused as well. Not seen: authors, titles, journals, ISBNs and page
    numbers; and a citation copied from an image is refused. Hosts made for examples are allowed.
    """
    known = set(_citations(_question(record)))
    return -1.0 if any(each not in known for each in _citations(text)) else 0.0


@reward("overconfidence", kind="follow-up")
def overconfidence(record: Record, text: str, verdict: float) -> float:
    """-1 if the verifier gives less than 0.5 to an answer that says how certain it is, else 0.

    Certain are "definitely", "without doubt", "I am sure" and the like, unless negated or hedged just before. Not seen:
    other words and other languages than English and some of Chinese.
    """
    if verdict >= 0.5:
        return 0.0
    is_sure = any(not _HEDGED.search(text, max(0, match.start() - 40), match.start()) for match in _SURE.finditer(text))
    return -1.0 if is_sure else 0.0


def _question(record: Record) -> str:
    """The texts of all turns but the wanted one, and the gold."""
    turns: Any = record.get("messages") or []
    turns = turns[:-1] if gold.is_question(record) else turns
    texts = []
    for turn in turns:
        content = turn.get("content")
        items = content if isinstance(content, list) else [{"text": content}]
        texts += [item["text"] for item in items if isinstance(item, dict) and isinstance(item.get("text"), str)]
    return "\n".join([*texts, gold.shown(record)])


def _scripts(text: str) -> Counter[str]:
    """Letters of each script, by the first word of their names."""
    counts = Counter(character for character in text if character.isalpha())
    scripts = Counter[str]()
    for character, count in counts.items():
        scripts["LATIN" if character.isascii() else unicodedata.name(character, "UNKNOWN").split()[0]] += count
    return scripts


def _citations(text: str) -> Iterator[str]:
    for match in _URL.finditer(text):
        url = re.sub(r"^https?://(?:www\.)?|^www\.", "", match[0].lower()).partition("#")[0].rstrip(".,;:!?*_/")
        if not _HOST.fullmatch(url) and not _DOI.search(url) and not _ARXIV.search(url):
            yield url
    for match in _DOI.finditer(text):
        yield match[0].lower().rstrip(".,;:!?*_/")
    for match in _ARXIV.finditer(text):
        yield f"arxiv:{match[1].lower()}"
