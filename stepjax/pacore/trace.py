"""The trace of a problem: one HTML file, complete in itself, that shows all that led to the answer.

Data are JSON inside the page, laid out by its script as text, never as HTML. What models and problems say cannot get
out of the JSON, and the page's policy lets no other script run and nothing be fetched.
"""

import base64
import hashlib
import html
import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from stepjax.pacore.answers import Matching
from stepjax.pacore.records import Outcome
from stepjax.pacore.trace_data import shown, trace_data

_PAGE = Path(__file__).parent / "trace_page"
_SCRIPTS = ("elements.js", "timeline.js", "trace.js")
# What would mean something in HTML or in scripts, or, as lone surrogates, has no form in UTF-8; JSON can name them.
_NOT_PLAIN = [*"<>&\u2028\u2029"]
_SURROGATES = re.compile("[\ud800-\udfff]+")


def trace_html(
    of: Outcome,
    *,
    title: str | None = None,
    correct: bool | None = None,
    matching: Matching | None = None,
    thoughts: bool = True,
    notes: Sequence[str] = (),
) -> str:
    """
    Args:
        correct: whether the answer is right, where that is known.
        matching: how answers are found in messages, to show them; None where they are no short answers.
        thoughts: with the chains of thought, which make up most of a page.
        notes: for the reader, at the top.
    """
    data = trace_data(of, correct=correct, matching=matching, thoughts=thoughts)
    name = title or f"{of.problem.id}: trace"
    return fill(
        "trace.html", {"title": html.escape(name), "data": script_json({"title": name, "notes": notes, **data})}
    )


def write_trace(of: Outcome, path: str | os.PathLike[str], **options: Any) -> None:
    """Writes `trace_html(of, **options)`; the file is there as a whole or not at all."""
    write_whole(Path(path), trace_html(of, **options))


def script_json(value: Any) -> str:
    """JSON that no text in it can end the script element around."""
    text = json.dumps(shown(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in _NOT_PLAIN:  # one after the other: many megabytes of them take no time
        text = text.replace(character, f"\\u{ord(character):04x}")
    return _SURROGATES.sub(lambda match: "".join(f"\\u{ord(each):04x}" for each in match[0]), text)


def fill(template: str, values: Mapping[str, str]) -> str:
    """A page from its template: `{{name}}` stands for a value, and for its style, script and policy."""
    style, script = _read("trace.css"), "\n".join(map(_read, _SCRIPTS))
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    known = {"style": style, "script": script, "policy": policy, **values}
    # In one pass: what is put in is not looked at again.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: known[match[1]], _read(template))


def write_whole(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.tmp")
    try:
        # Surrogates may still stand in a title.
        temporary.write_text(text, encoding="utf-8", errors="replace", newline="\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@cache
def _read(name: str) -> str:
    return (_PAGE / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
