"""The web pages, plain files without a build step: the server's chat, and saved traces. Both draw PaCoRe's rounds with
one viewer (rounds.js)."""

import base64
import hashlib
import html
import importlib.resources
import json
import re
from typing import Any

_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
_CHAT = ("style.css", "chat.js", "answer.js", "elements.js", "live.js", "rounds.js", "server.js")
_SAVED = ("elements.js", "rounds.js", "trace.js")  # one after the other
_MODULE_WORDS = re.compile(r"^import [^;]*;\n|^export ", re.MULTILINE)


def _read(name: str) -> str:
    return importlib.resources.files(__name__).joinpath(name).read_text(encoding="utf-8")


# The chat page as a server answers with it, by path: content and media type.
PAGE: dict[str, tuple[bytes, str]] = {
    "/": (_read("chat.html").encode(), "text/html"),
    **{f"/{name}": (_read(name).encode(), _TYPES[name.rpartition(".")[2]]) for name in _CHAT},
}


def saved_page(title: str, data: Any) -> str:
    """One HTML file, complete in itself. Its script lays the data out as text, never as HTML; nothing in them can get
    out of their element, and the page's policy lets no other script run and nothing be fetched.

    Args:
        data: JSON for trace.js; surrogates are allowed, NaN and infinities are not.
    """
    style, script = _read("style.css"), "\n".join(_MODULE_WORDS.sub("", _read(name)) for name in _SAVED)
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    values = {"title": html.escape(title), "style": style, "script": script, "policy": policy, "data": _embedded(data)}
    # In one pass: what is put in is not searched again.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], _read("trace.html"))


def _embedded(data: Any) -> str:
    """JSON in which no text can end the script element around it."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":  # one after the other: many megabytes of them take no time
        text = text.replace(character, f"\\u{ord(character):04x}")
    # Lone surrogates have no form in UTF-8, but one in JSON.
    return re.sub("[\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
