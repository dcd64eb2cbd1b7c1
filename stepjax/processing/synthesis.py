"""The synthesis prompt: a conversation whose last message lists the references.

The last message is replaced by a text in the published structure (report, table 6): the task; the problem; the
references, each under a line "Reference <n>:", from 1; and the request for the model's own solution. Models trained
with PaCoRe cite "Reference 3", so other templates should keep the labels. The wording is ours and differs for tool
results. "short" names a template of the same parts in few tokens, for small models: the problem, then "Ref <n>" before
each reference.

Earlier messages and the last message's images are unchanged. Without references nothing changes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from stepjax.errors import ConfigError, RecordError, TokenError
from stepjax.processing import templates

Position = Literal["before", "after"]

# White space as published: a blank line before each reference, two before the last sentence.
TEMPLATE = """{% set is_tool = role == "tool" -%}
Below are {{ "the result of a tool call" if is_tool else "a problem" }} and several reference answers to it. Examine \
them critically, then {{ "decide on the next step yourself" if is_tool else "work out your own answer" }}.

{{ "Tool result" if is_tool else "Problem" }}:
{{ problem }}

Reference answers:{% if has_tool_calls %}
(Tool calls inside a reference were proposed only: none of them has been run.){% endif %}{%
for reference in references %}

Reference {{ loop.index }}:
{{ reference }}{% endfor %}


Drawing on the {{ "tool result" if is_tool else "problem" }} and the references above, give your own \
{{ "analysis and the next steps" if is_tool else "complete solution" }}."""


SHORT = "{{ problem }}{% for reference in references %}\nRef {{ loop.index }} {{ reference }}{% endfor %}"


class Template:
    """
    Args:
        template: "short", or a Jinja file, instead of the built-in template.
        images: whether images go before or after the text.

    Raises:
        ConfigError: the file cannot be read, or is not a valid Jinja template.
    """

    def __init__(self, template: str | None = None, images: Position = "before"):
        self._images, self._name = images, f"template {template!r}"
        self.text = TEMPLATE if template is None else SHORT
        if template not in (None, "short"):
            try:
                self.text = Path(template).expanduser().read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"{self._name} cannot be read: {error}") from error
            try:  # once, within limits: a template that loops forever fails here
                for role in ("user", "tool"):
                    templates.render(self.text, _variables(role, "problem", ["reference"]), name=self._name)
            except TokenError as error:
                raise ConfigError(f"{error}; it may use problem, references, role and has_tool_calls") from error

    def conversation(self, messages: Sequence[dict[str, Any]], references: Sequence[str]) -> tuple[dict[str, Any], ...]:
        """
        Raises:
            RecordError: the conversation does not end with a user's or a tool's message of text and images, or the
                template fails on it.
        """
        check_conversation(messages)
        if not references:
            return tuple(messages)
        *before, last = messages
        text, images = _text_and_images(last["content"])
        text = self._render(last["role"], text, references)
        content: str | list[dict[str, Any]] = text
        if images:
            item = {"type": "text", "text": text}
            content = [*images, item] if self._images == "before" else [item, *images]
        return (*before, {**last, "content": content})

    def _render(self, role: str, problem: str, references: Sequence[str]) -> str:
        try:
            template = templates.compiled(self.text)
            return template.render(**_variables(role, problem, references))
        except Exception as error:
            raise RecordError(f"{self._name} cannot render: {type(error).__name__}: {error}") from error


def _variables(role: str, problem: str, references: Sequence[str]) -> dict[str, Any]:
    has_tool_calls = any("<tool_call>" in text for text in references)
    return {"problem": problem, "references": list(references), "role": role, "has_tool_calls": has_tool_calls}


def check_conversation(messages: Sequence[dict[str, Any]]) -> None:
    """
    Raises:
        RecordError: the conversation does not end with a user's or a tool's message of text and images.
    """
    if not messages:
        raise RecordError("messages is empty: give at least the user's question")
    last = messages[-1]
    if not isinstance(last, dict) or last.get("role") not in ("user", "tool"):
        role = last.get("role") if isinstance(last, dict) else last
        raise RecordError(f"the last message has role={role!r}: PaCoRe answers a user's or a tool's message")
    _text_and_images(last.get("content"))


def _text_and_images(content: Any) -> tuple[str, list[dict[str, Any]]]:
    if isinstance(content, str):
        return content, []
    texts, images = [], []
    for item in content if isinstance(content, list) else [content]:
        kind = item.get("type") if isinstance(item, dict) else None
        if kind == "text":
            texts.append(str(item["text"]))
        elif kind in ("image", "image_url", "features"):
            images.append(item)
        else:
            raise RecordError(f"the last message's content has {item!r:.120}: give a text, or items of text and images")
    return "\n".join(texts), images
