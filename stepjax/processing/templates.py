"""Untrusted Jinja templates, rendered within limits.

Templates are programs. Jinja's sandbox keeps them from touching the machine but cannot stop nested loops or
`'a' * 10 ** 10`, so they run in a separate process.
"""

import datetime
import functools
import json
import traceback
from collections.abc import Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from stepjax.errors import LimitError, TokenError
from stepjax.processing import bounded

SECONDS = 2.0
MEMORY = 512 * 2**20
MAX_CHARS = 8 * 2**20  # limit for a template's output


def render(template: str, variables: Mapping[str, Any], *, name: str, is_chat: bool = False) -> str:
    """Renders a template.

    Args:
        variables: values that JSON cannot express become the names of their types, as in Transformers.
        name: names the template in errors.
        is_chat: render the way Transformers renders chat templates; otherwise with Jinja's defaults, and undefined
            variables are errors.

    Raises:
        TokenError: the template is invalid, refuses the conversation, fails, or exceeds its limits.
    """
    try:
        data = json.dumps(variables, default=lambda value: f"<{type(value).__name__}>")
        return bounded.call(_render, template, data, is_chat, seconds=SECONDS, memory=MEMORY)
    except (LimitError, TokenError) as error:
        raise TokenError(f"{name} {str(error).removeprefix('it ')}") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise TokenError(f"{name}: its variables cannot be written as JSON: {error}") from None


def _render(template: str, data: str, is_chat: bool) -> str:
    variables = json.loads(data)
    parts, size = [], 0
    try:
        for part in compiled(template, is_chat).generate(**variables):
            size += len(part)
            if size > MAX_CHARS:
                raise TokenError(f"writes more than {MAX_CHARS} characters")
            parts.append(part)
    except (TokenError, MemoryError):
        raise
    except Exception as error:  # templates can raise anything
        lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == _FILE]
        line = error.lineno if isinstance(error, jinja2.TemplateSyntaxError) else lines[-1] if lines else "?"
        raise TokenError(f"cannot render: line {line}: {type(error).__name__}: {error}"[:500]) from None
    return "".join(parts)


_FILE = "<template>"  # Jinja's name for templates without a file


@functools.lru_cache(maxsize=16)
def compiled(template: str, is_chat: bool = False) -> jinja2.Template:
    """The compiled template. Rendering it directly is unlimited; see `render`."""
    if not is_chat:
        return jinja2.sandbox.ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined).from_string(template)
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


class _Generation(jinja2.ext.Extension):
    """Supports `{% generation %}`, which marks assistant text for training; renders its body."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

    def _said(self, caller) -> str:
        return caller()


def _refuse(message: str) -> None:
    raise TokenError(f"refuses the conversation: {message}"[:500])


def _tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
