"""Conversations and text for a model that sees no images: any tokenizer, and the chat template that came with it.

`stepjax.processing` keeps text and control tokens apart, and knows the markup of STEP3-VL. Other text models have
control tokens and templates of their own; here, as in the software that they were made for, a conversation is rendered
to one string, and text that spells a control token becomes it.
"""

import datetime
import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from stepjax.errors import CheckpointError, TokenError
from stepjax.processing.tokenizer import encode, longest_token
from stepjax.processing.tokens import Example, check_length, least_tokens, text_example

TOKENIZER = "tokenizer.json"
TEMPLATE = "chat_template.jinja"


class TextProcessor:
    """
    Attributes:
        tokenizer: as the file has it.
        chat_template: Jinja; None for models that are not made for conversations.
        stop_ids: tokens that end a generation.
        special: what a template may ask for by name, such as `bos_token`.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        chat_template: str | None = None,
        stop_ids: tuple[int, ...] = (),
        special: dict[str, str] | None = None,
    ):
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.stop_ids = stop_ids
        self.special = special or {}

    @classmethod
    def from_directory(cls, directory: Path) -> "TextProcessor":
        """Reads the tokenizer and, where they are, its configuration, template and stop tokens.

        Raises:
            CheckpointError: there is no usable tokenizer.json.
        """
        try:
            tokenizer = tokenizers.Tokenizer.from_str((directory / TOKENIZER).read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare ones
            raise CheckpointError(f"{directory / TOKENIZER} cannot be read: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        fields = _json(directory / "tokenizer_config.json")
        template = fields.get("chat_template")
        if (directory / TEMPLATE).exists():
            template = (directory / TEMPLATE).read_text(encoding="utf-8")
        ends = _json(directory / "generation_config.json").get("eos_token_id")
        if ends is None:
            ends = _json(directory / "config.json").get("eos_token_id")
        stop_ids = tuple(ends) if isinstance(ends, list) else () if ends is None else (int(ends),)
        names = {name: _spelling(value) for name, value in fields.items() if name.endswith("_token")}
        return cls(
            tokenizer,
            chat_template=template if isinstance(template, str) else None,
            stop_ids=stop_ids,
            special={name: value for name, value in names.items() if value is not None},
        )

    @property
    def vocab_size(self) -> int:
        """One more than the largest id; a decoder needs at least this many rows of embeddings."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text; with those around it that the model was trained with, such as a first token."""
        return encode(self.tokenizer, text, add_special_tokens=add_special_tokens)

    @functools.cached_property
    def longest_token(self) -> int:
        """Bytes of the longest one that text can become."""
        return longest_token(self.tokenizer)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        return self.tokenizer.decode([int(index) for index in ids], skip_special_tokens=skip_special)

    def render(
        self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """A conversation as the model's template writes it. `variables` are the template's own.

        Raises:
            TokenError: there is no template, or it refuses the conversation.
        """
        if self.chat_template is None:
            raise TokenError("the checkpoint has no chat template: encode a text instead")
        try:
            from jinja2 import TemplateError
            from jinja2.ext import loopcontrols
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as error:
            raise TokenError("chat templates need jinja2: pip install 'stepjax[text]'") from error

        def refuse(message: str) -> None:
            raise TokenError(f"the chat template refuses the conversation: {message}")

        def tojson(value: Any, indent: int | None = None, **options: Any) -> str:
            return json.dumps(value, ensure_ascii=False, indent=indent, **options)

        # A sandbox, for templates are programs that come with the weights; the settings are Transformers'.
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = tojson
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        arguments = self.special | variables | {"add_generation_prompt": add_generation_prompt}
        try:
            return environment.from_string(self.chat_template).render(messages=list(messages), **arguments)
        except (TemplateError, TypeError) as error:
            raise TokenError(f"the chat template cannot render the conversation: {error}") from error

    def process_prompt(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        enable_thinking: bool | None = None,
        max_tokens: int | None = None,
        name: str = "prompt",
    ) -> Example:
        """The prompt of a conversation that the assistant is to continue; as `Processor.process_prompt`, of text.

        Raises:
            TokenError: see `render`.
            ContextLengthError: it has more than `max_tokens`.
        """
        given = {"tools": tools, "enable_thinking": enable_thinking}
        variables = {key: value for key, value in given.items() if value is not None}
        text = self.render(messages, **variables)
        check_length(least_tokens(text, self.longest_token), max_tokens, name, at_least=True)
        example = self.process_text(text, name=name, add_special_tokens=False)
        check_length(len(example.tokens), max_tokens, name)
        return example

    def process_text(self, text: str, *, name: str = "prompt", add_special_tokens: bool = True) -> Example:
        """A text that the model is to continue."""
        return text_example(self.encode(text, add_special_tokens=add_special_tokens), name)


def _json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return fields if isinstance(fields, dict) else {}


def _spelling(value: Any) -> str | None:
    """Of a token that is given by its text, or by a dict with it."""
    return value.get("content") if isinstance(value, dict) else value if isinstance(value, str) else None
