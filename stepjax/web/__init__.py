"""The web pages, plain files without a build step: the server's chat, saved traces, and what devices send. The first
two draw PaCoRe's rounds with the same viewer (rounds.js)."""

import base64
import hashlib
import html
import importlib.resources
import json
import re
from typing import Any

_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
_CHAT = ("style.css", "chat.js", "answer.js", "elements.js", "live.js", "rounds.js", "server.js")
# Of saved pages, by kind: styles and scripts, concatenated in this order.
_SAVED = {
    "trace": (("style.css",), ("elements.js", "rounds.js", "trace.js")),
    "tofc": (("style.css", "tofc.css"), ("elements.js", "tofc.js")),
}
_MODULE_WORDS = re.compile(r"^import [^;]*;\n|^export ", re.MULTILINE)


def _read(name: str) -> str:
    return importlib.resources.files(__name__).joinpath(name).read_text(encoding="utf-8")


# The chat page's files, by path: content and media type.
PAGE: dict[str, tuple[bytes, str]] = {
    "/": (_read("chat.html").encode(), "text/html"),
    **{f"/{name}": (_read(name).encode(), _TYPES[name.rpartition(".")[2]]) for name in _CHAT},
}


def saved_page(title: str, data: Any, *, kind: str = "trace") -> str:
    """A self-contained HTML file. Its script inserts the data as text, never as HTML; the data cannot break out of its
    element, and the page's CSP blocks other scripts and all requests.

    Args:
        data: JSON for the kind's last script; surrogates are allowed, NaN and infinities are not.
        kind: "trace" or "tofc".
    """
    styles, scripts = _SAVED[kind]
    style, script = "\n".join(map(_read, styles)), "\n".join(_MODULE_WORDS.sub("", _read(name)) for name in scripts)
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    values = {"title": html.escape(title), "style": style, "script": script, "policy": policy, "data": _embedded(data)}
    # In one pass, so that inserted values are not substituted again.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], _read("trace.html"))


def _embedded(data: Any) -> str:
    """JSON in which no text can close the enclosing script element."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":  # str.replace is fast even on many megabytes
        text = text.replace(character, f"\\u{ord(character):04x}")
    # UTF-8 cannot encode lone surrogates; JSON can escape them.
    return re.sub("[\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
