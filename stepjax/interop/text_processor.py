"""Conversations and text for text-only models: any tokenizer, with its own chat template.

`stepjax.processing` keeps text and control tokens apart and knows STEP3-VL's markup. Other text models have their own
control tokens and templates. As in the software they were made for, a conversation is rendered to one string here, and
text that spells a control token becomes that token.
"""

import contextlib
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from stepjax.errors import CheckpointError, TokenError
from stepjax.interop.bounds import read_text
from stepjax.processing import templates
from stepjax.processing.processor import Processor
from stepjax.processing.tokenizer import encode as ids_of
from stepjax.processing.tokenizer import longest_token
from stepjax.processing.tokens import Example, check_length, least_tokens, text_example

TOKENIZER = "tokenizer.json"
TEMPLATE = "chat_template.jinja"

_MAX_BYTES = 256 * 2**20  # limit per side file; the largest tokenizers have some 30 MiB


class TextProcessor:
    """
    Attributes:
        tokenizer: as loaded from the file.
        chat_templates: Jinja templates by name; empty for base models. "tool_use" is used if there are tools, otherwise
            "default".
        stop_ids: tokens that end a generation.
        special: tokens available to templates by name, such as `bos_token`.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        chat_template: str | Mapping[str, str] | None = None,
        stop_ids: tuple[int, ...] = (),
        special: dict[str, str] | None = None,
    ):
        self.tokenizer = tokenizer
        named = {"default": chat_template} if isinstance(chat_template, str) else chat_template
        self.chat_templates = dict(named or {})
        self.stop_ids = stop_ids
        self.special = special or {}

    @classmethod
    def from_directory(cls, directory: Path) -> "TextProcessor":
        """Reads the tokenizer and, if present, its configuration, templates and stop tokens.

        Stop tokens are merged from all files, since models differ in which file they fill in.

        Raises:
            CheckpointError: there is no usable tokenizer.json, or another file is broken.
        """
        text = read_text(directory / TOKENIZER, _MAX_BYTES)
        try:
            tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare exceptions
            raise CheckpointError(f"{directory / TOKENIZER} cannot be read: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        fields = _json(directory / "tokenizer_config.json")
        if "added_tokens_decoder" not in fields:  # older format
            fields |= _json(directory / "special_tokens_map.json")
        names = {name: _spelling(value) for name, value in fields.items() if name.endswith("_token")}
        special = {name: value for name, value in names.items() if value is not None}
        stop_ids = []
        for path in (directory / "generation_config.json", directory / "config.json"):
            config = _json(path)
            stop_ids += [*_stop_ids(path, config), *_stop_ids(path, config.get("text_config"))]
        # A token missing from the tokenizer cannot be generated.
        end = tokenizer.token_to_id(special.get("eos_token", ""))
        stop_ids += [] if end is None else [end]
        return cls(
            tokenizer,
            chat_template=_chat_templates(directory, fields.get("chat_template")),
            stop_ids=tuple(dict.fromkeys(stop_ids)),
            special=special,
        )

    @property
    def vocab_size(self) -> int:
        """Largest id plus one; a decoder needs at least this many embedding rows."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text, including special tokens that the model expects around it, such as BOS."""
        return ids_of(self.tokenizer, text, add_special_tokens=add_special_tokens)

    @functools.cached_property
    def longest_token(self) -> int:
        """Length in bytes of the longest token of plain text."""
        return longest_token(self.tokenizer)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        return self.tokenizer.decode([int(index) for index in ids], skip_special_tokens=skip_special)

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        documents: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Renders a conversation with the model's template.

        The template gets the same variables as in Transformers, and messages are normalised as in vLLM: text items
        become one string, null content becomes "", and JSON call arguments become an object.

        Args:
            variables: extra variables for the template.

        Raises:
            TokenError: there is no template, it refuses the conversation, or it fails.
        """
        if not self.chat_templates:
            raise TokenError("the checkpoint has no chat template: encode plain text instead")
        name = "tool_use" if tools and "tool_use" in self.chat_templates else "default"
        if name not in self.chat_templates:
            raise TokenError(f"no chat template is named {name!r}, only {', '.join(self.chat_templates)}: rename one")
        variables = {
            **self.special,
            **variables,
            "messages": [_message(message, f"messages[{index}]") for index, message in enumerate(messages)],
            "tools": tools or None,
            "documents": documents or None,
            "add_generation_prompt": add_generation_prompt,
        }
        return templates.render(self.chat_templates[name], variables, name=f"the chat template {name!r}", is_chat=True)

    def process_prompt(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        enable_thinking: bool | None = None,
        max_tokens: int | None = None,
        name: str = "prompt",
    ) -> Example:
        """The prompt for the assistant's next turn; like `Processor.process_prompt`, for text.

        Raises:
            TokenError: see `render`.
            ContextLengthError: the prompt has more than `max_tokens`.
        """
        variables: dict[str, Any] = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        text = self.render(messages, tools=tools, **variables)
        check_length(least_tokens(text, self.longest_token), max_tokens, name, at_least=True)
        example = self.process_text(text, name=name, add_special_tokens=False)
        check_length(len(example.tokens), max_tokens, name)
        return example

    def process_text(self, text: str, *, name: str = "prompt", add_special_tokens: bool = True) -> Example:
        """A prompt for the model to continue."""
        return text_example(self.encode(text, add_special_tokens=add_special_tokens), name)


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise TokenError(f"{where}={message!r:.120}: give a dict of role and content")
    made = {key: value for key, value in message.items() if value is not None}
    made["content"] = _content(message.get("content"), f"{where}.content")
    # Templates use various names for reasoning.
    reasoning = next((made[key] for key in ("reasoning_content", "thinking", "reasoning") if key in made), None)
    if reasoning is not None:
        made = {"thinking": reasoning, **made, "reasoning_content": reasoning}
    if made.get("tool_calls"):
        made["tool_calls"] = [
            _call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(made["tool_calls"])
        ]
    return made


def _content(content: Any, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise TokenError(f"{where}={content!r:.120}: give a string, or a list of text items")
    for index, item in enumerate(content):
        if not isinstance(item, dict) or item.get("type") != "text" or not isinstance(item.get("text"), str):
            raise TokenError(
                f'{where}[{index}]={item!r:.120}: give {{"type": "text", "text": str}}; this model reads text'
            )
    return "\n".join(item["text"] for item in content)


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise TokenError(f"{where}={call!r:.120}: give a dict with the function's name and arguments")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):  # servers pass JSON; some write "" for no arguments
        with contextlib.suppress(ValueError, RecursionError):
            arguments = json.loads(arguments.strip() or "{}")
    if not isinstance(arguments, dict):
        raise TokenError(f"{where}.arguments={arguments!r:.120}: give a dict, or the JSON of an object")
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


def _chat_templates(directory: Path, given: Any) -> dict[str, str]:
    """Templates by name; files override the tokenizer's configuration."""
    files = {"default": directory / TEMPLATE} if (directory / TEMPLATE).exists() else {}
    files |= {path.stem: path for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    if files:
        return {name: read_text(path, _MAX_BYTES) for name, path in files.items()}
    given = _json(directory / "chat_template.json").get("chat_template", given)
    if isinstance(given, str):
        return {"default": given}
    try:
        named = {each["name"]: each["template"] for each in given or ()}
        if all(isinstance(text, str) for item in named.items() for text in item):
            return named
    except (TypeError, KeyError):
        pass
    raise CheckpointError(f"{directory}: chat_template={given!r:.120}: give a string, or a list of name and template")


def _stop_ids(path: Path, fields: Any) -> list[int]:
    """Stop ids in the configuration `fields`, which was read from `path`."""
    given = fields.get("eos_token_id") if isinstance(fields, dict) else None
    ids = given if isinstance(given, list) else [] if given is None else [given]
    for index in ids:
        if not isinstance(index, int) or isinstance(index, bool):
            raise CheckpointError(f"{path}: eos_token_id={index!r:.120}: give a whole number, or a list of them")
    return ids


def _json(path: Path) -> dict[str, Any]:
    """The file's JSON object; empty if the file is missing or holds something else."""
    text = read_text(path, _MAX_BYTES) if path.exists() else "{}"
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return fields if isinstance(fields, dict) else {}


def _spelling(value: Any) -> str | None:
    """The text of a token, given as a string or as a dict with it."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


# Any processor -------------------------------------------------------------------------------------------------------

AnyProcessor = Processor | TextProcessor  # servers and samplers take either

_TAIL = 16  # last tokens of a prompt; enough for any spelling of `<think>`


def encode(processor: AnyProcessor, text: str, *, max_tokens: int | None = None, name: str = "prompt") -> list[int]:
    """Ids of a text to continue. For STEP3-VL, never ids of control tokens.

    Raises:
        ContextLengthError: the text is certainly longer than `max_tokens`, judging by its length.
    """
    encoder = processor if isinstance(processor, TextProcessor) else processor.tokenizer
    check_length(least_tokens(text, encoder.longest_token), max_tokens, name, at_least=True)
    return encoder.encode(text)


def vocab_size(processor: AnyProcessor) -> int:
    return processor.vocab_size if isinstance(processor, TextProcessor) else processor.tokenizer.vocab_size


def image_token(processor: AnyProcessor) -> int | None:
    """The placeholder id for image features; None for text-only models."""
    return None if isinstance(processor, TextProcessor) else processor.tokenizer.special_tokens.image_patch


def starts_thinking(processor: AnyProcessor, prompt: Example) -> bool:
    """Whether the prompt ends with an open `<think>`."""
    return processor.decode(prompt.tokens[-_TAIL:].tolist(), False).rstrip().endswith("<think>")
