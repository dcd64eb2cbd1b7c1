r"""Renders conversations as ChatML. `answer_stream` parses the model's replies.

    <|im_start|>ROLE\nCONTENT<|im_end|>\n                       a turn
    <think>\nREASONING\n</think>\n                              before the content of an assistant turn
    <tool_call>\n{"name": ..., "arguments": ...}\n</tool_call>  after the content, Hermes style
    <tool_response>\nCONTENT\n</tool_response>                  tool results, in a user turn

The model sees reasoning only after the last user turn, as in Qwen3.

Rendering yields segments, not a string: text that spells a control token stays text. Only an assistant's content may
carry markup, namely its own `<think>` and `<tool_call>`.

Unconfirmed: we have not seen the public checkpoint's template. This one follows its known properties and otherwise
(tools, dropped reasoning) Qwen3's template.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from stepjax.errors import TokenError
from stepjax.processing.answer_stream import split_reasoning

TrainedTurns = Literal["all", "last", "none"]

_ROLES = ("system", "user", "assistant", "tool")
_KEYS = ("role", "content", "reasoning_content", "tool_calls", "train", "tool_call_id", "name")
_CALL_MARKERS = re.compile("(</?tool_call>)")

# Qwen3's training prompt, verbatim; other wording would be another protocol.
_TOOLS_HEAD = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
)
_TOOLS_TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n"
    '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)


@dataclasses.dataclass(frozen=True)
class TextSegment:
    text: str
    trained: bool = False


@dataclasses.dataclass(frozen=True)
class SpecialSegment:
    """A control token, by name; plain text if the tokenizer has no such token."""

    name: str
    trained: bool = False


@dataclasses.dataclass(frozen=True)
class ImageSegment:
    """An image, as given in the record. Never trained."""

    image: Any
    frame: int | None = None  # frame of an animation, or page of a file
    where: str = ""  # place in the record, for error messages


Segment = TextSegment | SpecialSegment | ImageSegment


def render(
    messages: Sequence[dict[str, Any]],
    *,
    tools: Sequence[dict[str, Any]] | None = None,
    trained: TrainedTurns = "all",
) -> list[Segment]:
    """Renders a conversation, without a generation prompt.

    Args:
        messages: dicts of `role` and `content`. Content is a string or a list of `{"type": "text", "text": ...}` and
            `{"type": "image", "image": ...}`; an animation also needs a `frame` number, from 0. Assistant messages may
            have `reasoning_content` and `tool_calls`; content may then be None. Without `reasoning_content`, a
            `<think>...</think>` at the start of the content is the reasoning. An assistant message may also have
            `train`: False leaves its turn out of the loss, True has it in whichever turns are trained. `name` and
            `tool_call_id` are accepted for compatibility but not shown to the model.
        tools: JSON schemas of the functions that the assistant may call.
        trained: assistant turns that count in the loss, including their closing `<|im_end|>`: all, those after the last
            user turn, or none (then `train` has no effect). Reasoning of earlier turns is dropped either way.

    Returns:
        Segments; adjacent text within a turn is joined, so it is tokenized as one string.

    Raises:
        TokenError: a message is malformed; names its position and the value.
    """
    if trained not in ("all", "last", "none"):
        raise TokenError(f'trained={trained!r}: give "all", "last" or "none"')
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise TokenError(f"messages={messages!r}: give a non-empty list of messages")
    for index, message in enumerate(messages):
        _check_message(message, f"messages[{index}]")
    roles = [message["role"] for message in messages]
    last_user = max((index for index, role in enumerate(roles) if role == "user"), default=-1)

    segments: list[Segment] = []
    first = 0
    if tools:
        if roles[0] == "system":
            first = 1
            system = [*content_segments(messages[0].get("content"), "messages[0].content"), TextSegment("\n\n")]
        else:
            system = []
        segments += _turn("system", [*system, *_tools(tools)])
    for index in range(first, len(messages)):
        message, where, role = messages[index], f"messages[{index}]", roles[index]
        if role == "assistant":
            is_last = index > last_user
            is_trained = trained == "all" or (trained == "last" and is_last)
            if trained != "none" and message.get("train") is not None:
                is_trained = message["train"]
            segments += _turn(role, _assistant(message, where, is_trained, shows_reasoning=is_last), is_trained)
        elif role == "tool":
            # Results of parallel calls share a turn.
            if index == 0 or roles[index - 1] != "tool":
                segments += [SpecialSegment("<|im_start|>"), TextSegment("user")]
            segments += [TextSegment("\n"), SpecialSegment("<tool_response>"), TextSegment("\n")]
            segments += content_segments(message.get("content"), f"{where}.content")
            segments += [TextSegment("\n"), SpecialSegment("</tool_response>")]
            if index + 1 == len(messages) or roles[index + 1] != "tool":
                segments += [SpecialSegment("<|im_end|>"), TextSegment("\n")]
        else:
            segments += _turn(role, content_segments(message.get("content"), f"{where}.content"))
    return _joined(segments)


def generation_prompt(*, starts_thinking: bool, enable_thinking: bool | None = None) -> list[Segment]:
    """The segments after a conversation that prompt the model to answer.

    Args:
        starts_thinking: whether to open `<think>` if `enable_thinking` is None.
        enable_thinking: True opens `<think>`; False writes empty reasoning, so that the model skips it.
    """
    segments: list[Segment] = [SpecialSegment("<|im_start|>"), TextSegment("assistant\n")]
    if enable_thinking is False:
        segments += _reasoning("", trained=False)
    elif enable_thinking or starts_thinking:
        segments += [SpecialSegment("<think>"), TextSegment("\n")]
    return segments


def content_segments(content: object, where: str, *, trained: bool = False) -> list[Segment]:
    """Segments of a message's content, or of an interleaved document.

    Args:
        content: a string, or a list of text and image items.
        where: names the content in error messages.

    Raises:
        TokenError: the content is neither, or an item is malformed.
    """
    if isinstance(content, str):
        return [TextSegment(content, trained)]
    if not isinstance(content, list):
        raise TokenError(f"{where}={_shown(content)}: give a string, or a list of text and image items")
    segments: list[Segment] = []
    for index, item in enumerate(content):
        here = f"{where}[{index}]"
        kind = item.get("type") if isinstance(item, dict) else None
        if kind == "text" and isinstance(item.get("text"), str):
            segments.append(TextSegment(item["text"], trained))
        elif kind == "image" and item.get("image") is not None:
            frame = item.get("frame")
            if frame is not None and (not isinstance(frame, int) or isinstance(frame, bool) or frame < 0):
                raise TokenError(f"{here}.frame={_shown(frame)}: give a whole number, from 0")
            segments.append(ImageSegment(item["image"], frame, here))
        else:
            raise TokenError(
                f'{here}={_shown(item)}: give {{"type": "text", "text": str}} or {{"type": "image", "image": ...}}'
            )
    return segments


def _turn(role: str, body: Sequence[Segment], trained: bool = False) -> list[Segment]:
    return [
        SpecialSegment("<|im_start|>"),
        TextSegment(f"{role}\n"),
        *body,
        SpecialSegment("<|im_end|>", trained),
        TextSegment("\n"),
    ]


def _assistant(message: dict[str, Any], where: str, trained: bool, *, shows_reasoning: bool) -> list[Segment]:
    reasoning, calls = message.get("reasoning_content"), message.get("tool_calls")
    if message.get("content") is None and (reasoning is not None or calls):
        content = ""
    else:
        parts = content_segments(message.get("content"), f"{where}.content")
        images = [part for part in parts if not isinstance(part, TextSegment)]
        if images:
            raise TokenError(f"{where}.content has {len(images)} image(s): an assistant's turn can hold only text")
        content = "".join(part.text for part in parts if isinstance(part, TextSegment))
    if reasoning is None and "</think>" in content:
        content, reasoning = split_reasoning(content)

    segments: list[Segment] = []
    if reasoning is not None:
        content = content.lstrip("\n")
        if shows_reasoning:
            segments += _reasoning(reasoning.strip("\n"), trained)
    segments += _marked(content, trained)
    for index, call in enumerate(calls or ()):
        text = _call_json(call, f"{where}.tool_calls[{index}]")
        segments += [
            TextSegment("\n" if content or index else "", trained),
            SpecialSegment("<tool_call>", trained),
            TextSegment(f"\n{text}\n", trained),
            SpecialSegment("</tool_call>", trained),
        ]
    return segments


def _reasoning(text: str, trained: bool) -> list[Segment]:
    return [
        SpecialSegment("<think>", trained),
        TextSegment(f"\n{text}\n", trained),
        SpecialSegment("</think>", trained),
        TextSegment("\n", trained),
    ]


def _tools(tools: Sequence[dict[str, Any]]) -> list[Segment]:
    lines = []
    for index, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise TokenError(f"tools[{index}]={_shown(tool)}: give a JSON schema as a dict")
        lines.append(_json(tool, f"tools[{index}]"))
    return [TextSegment(_TOOLS_HEAD + "\n".join(lines)), *_marked(_TOOLS_TAIL, trained=False)]


def _call_json(call: object, where: str) -> str:
    function = call.get("function", call) if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not name:
        raise TokenError(f'{where}={_shown(call)}: give {{"name": str, "arguments": dict}}')
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):  # servers pass them as JSON, and some write none as no text
        text = arguments if arguments.strip() else "{}"
        try:
            is_object = isinstance(json.loads(text), dict)
        except (ValueError, RecursionError):
            is_object = False
    else:
        is_object = isinstance(arguments, dict)
        text = _json(arguments, f"{where}.arguments")
    if not is_object:
        raise TokenError(f"{where}.arguments={_shown(arguments)}: give a dict, or the JSON of an object")
    return f'{{"name": {_json(name, where)}, "arguments": {text}}}'


def _json(value: object, where: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise TokenError(f"{where}={_shown(value)} cannot be written as JSON: {error}") from error


def _marked(text: str, trained: bool) -> list[Segment]:
    parts = _CALL_MARKERS.split(text)  # text and markers alternate
    return [
        SpecialSegment(part, trained) if index % 2 else TextSegment(part, trained) for index, part in enumerate(parts)
    ]


def _joined(segments: Iterable[Segment]) -> list[Segment]:
    # No token spans an untrained and a trained segment: a prompt would end inside it.
    joined: list[Segment] = []
    texts: list[str] = []  # adjacent texts, joined all at once: repeated concatenation is quadratic
    trained = False

    def close() -> None:
        if texts:
            joined.append(TextSegment("".join(texts), trained))
            texts.clear()

    for segment in segments:
        if not isinstance(segment, TextSegment):
            close()
            joined.append(segment)
        elif segment.text:
            if segment.trained != trained:
                close()
            trained = segment.trained
            texts.append(segment.text)
    close()
    return joined


def _check_message(message: object, where: str) -> None:
    if not isinstance(message, dict):
        raise TokenError(f"{where}={_shown(message)}: give a dict of role and content")
    role = message.get("role")
    if role not in _ROLES:
        raise TokenError(f"{where}.role={role!r}: give one of {', '.join(_ROLES)}")
    unknown = [key for key, value in message.items() if key not in _KEYS and value is not None]
    if unknown:
        raise TokenError(f"{where} has the unknown keys {unknown}: known are {', '.join(_KEYS)}")
    for key, kind in (("reasoning_content", str), ("tool_calls", list), ("train", bool)):
        value = message.get(key)
        if value is None:
            continue
        if role != "assistant":
            raise TokenError(f"{where}.{key} is set, but the role is {role!r}: only an assistant's turn can have it")
        if not isinstance(value, kind):
            raise TokenError(f"{where}.{key}={_shown(value)}: give a {kind.__name__}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}..."
