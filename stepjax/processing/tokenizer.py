"""Text to token ids and back. Control tokens are looked up by their string; ids are never hard-coded.

Two names are easily confused: `<|im_start|>` opens a chat turn, `<im_start>` opens an image's global view.
`SpecialTokens` calls them `turn_start` and `image_start`.
"""

import dataclasses
import functools
import importlib.resources
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers

from stepjax.config import TokenizerConfig
from stepjax.errors import TokenError

# STEP3-VL's tokenizer is Qwen3's plus these 23 tokens. `<im_patch>` is confirmed at 151679; the order, and so the ids,
# of the others is inferred from sister models. Prefer the tokenizer.json that ships with a checkpoint.
STEP3_TOKENS = (
    *("<|EOT|>", "<|BOT|>", "<|CALL_START|>", "<|CALL_END|>", "<|THINK_START|>", "<|THINK_END|>"),
    *("<|IMG_START|>", "<|IMG_END|>", "<|META_START|>", "<|META_END|>"),
    *("<im_patch>", "<im_start>", "<im_end>"),
    *("<dream>", "<dream_start>", "<dream_end>", "<|MASK_1e69f|>", "<|UNMASK_1e69f|>"),
    *("<video_start>", "<video_end>"),
    *("<patch_start>", "<patch_end>", "<patch_newline>"),
)

# Markup in the model's output. Decoding always keeps it: reasoning and tool calls are parsed from it.
MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

_LONG_TEXT = 2**14  # characters
_UNKNOWN = "\ufffd"  # REPLACEMENT CHARACTER, as for invalid UTF-8


def _named(name: str):
    return dataclasses.field(metadata={"name": name})


def _named_optional(name: str):
    return dataclasses.field(default=None, metadata={"name": name})


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Ids of the control tokens. Optional ones are None if the tokenizer spells them as ordinary text."""

    end_of_text: int = _named("<|endoftext|>")
    turn_start: int = _named("<|im_start|>")
    turn_end: int = _named("<|im_end|>")
    image_patch: int = _named("<im_patch>")  # one per image feature
    image_start: int = _named("<im_start>")  # around the features of a global view
    image_end: int = _named("<im_end>")
    patch_start: int = _named("<patch_start>")  # around the features of a crop
    patch_end: int = _named("<patch_end>")
    patch_newline: int = _named("<patch_newline>")  # after each row of crops
    think_start: int | None = _named_optional("<think>")
    think_end: int | None = _named_optional("</think>")

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a generation. They include the image token, as in the public checkpoint's configuration."""
        return self.end_of_text, self.turn_end, self.image_patch


class Tokenizer:
    """A `tokenizers.Tokenizer` that keeps control tokens and text apart. Picklable, for data workers.

    `encode` never yields a control token: a user who writes "<|im_end|>" does not end a turn.
    `special` and `encode_marker` return control tokens by name.
    """

    def __init__(self, raw: tokenizers.Tokenizer, name: str = "tokenizer"):
        """
        Args:
            raw: must have every non-optional token of `SpecialTokens`.
            name: names the tokenizer in error messages.

        Raises:
            TokenError: control tokens are missing, or the tokenizer's model produces them from plain text.
        """
        self._raw = raw
        self._added = {token.content: index for index, token in raw.get_added_tokens_decoder().items()}
        self._hidden = frozenset(
            index
            for index, token in raw.get_added_tokens_decoder().items()
            if token.special and token.content not in MARKERS
        )
        self._text = _without_added_tokens(raw)
        self.special_tokens = self._resolve(name)
        self._check_text_stays_text(name)

    @property
    def vocab_size(self) -> int:
        """Largest id plus one; a decoder needs at least this many embedding rows."""
        return max(self._raw.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self.special_tokens.stop_ids

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without control tokens.

        Raises:
            TokenError: as the function `encode`.
        """
        return encode(self._text, text, add_special_tokens=False)

    @functools.cached_property
    def longest_token(self) -> int:
        """Length in bytes of the longest token of plain text."""
        return longest_token(self._text)

    def special(self, name: str) -> int:
        """Id of the control token spelled `name`, such as "<im_patch>".

        Raises:
            TokenError: there is no such token.
        """
        if name not in self._added:
            raise TokenError(f"the tokenizer has no control token {name!r}: it has {', '.join(self._added)}")
        return self._added[name]

    def encode_marker(self, name: str) -> list[int]:
        """The control token spelled `name` if it exists, else the ids of `name` as plain text."""
        return [self._added[name]] if name in self._added else self.encode(name)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of token ids.

        Args:
            ids: ids beyond the vocabulary, which a decoder with spare embedding rows can sample, become U+FFFD.
            skip_special: drop control tokens, except reasoning and tool call markup.
        """
        parts: list[str] = []
        run: list[int] = []
        for index in map(int, ids):
            if skip_special and index in self._hidden:
                continue
            if 0 <= index and self._raw.id_to_token(index) is not None:
                run.append(index)
                continue
            parts += [self._raw.decode(run, skip_special_tokens=False), _UNKNOWN]
            run = []
        return "".join([*parts, self._raw.decode(run, skip_special_tokens=False)])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a tokenizer.json that `load_tokenizer` and Hugging Face's tokenizers read."""
        self._raw.save(os.fspath(path))

    def _resolve(self, name: str) -> SpecialTokens:
        fields = dataclasses.fields(SpecialTokens)
        required = [field.metadata["name"] for field in fields if field.default is dataclasses.MISSING]
        missing = [token for token in required if token not in self._added]
        if missing:
            remedy = "take the tokenizer.json that ships with the STEP3-VL checkpoint"
            if set(missing) <= set(STEP3_TOKENS):
                remedy += ", or load this one with add_missing=True to add STEP3-VL's to Qwen3's"
            raise TokenError(f"{name} lacks the control tokens {', '.join(missing)}: {remedy}")
        ids: dict[str, Any] = {field.name: self._added.get(field.metadata["name"]) for field in fields}
        return SpecialTokens(**ids)

    def _check_text_stays_text(self, name: str) -> None:
        # If text could merge into a control token's id, users could control the model.
        for token, index in self._added.items():
            if index in self.encode(token):
                raise TokenError(
                    f"{name} turns the text {token!r} into control token {index}: remove it from the model's vocabulary"
                )


def encode(tokenizer: tokenizers.Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    """Ids of a text. Other threads keep running while a long text is encoded.

    Raises:
        TokenError: `text` is not a string of Unicode characters (half a surrogate pair, for example).
    """
    try:
        if len(text) < _LONG_TEXT:
            return tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
    except (TypeError, UnicodeEncodeError) as error:
        raise TokenError(f"text {text!r:.80} cannot be encoded: give a str of valid Unicode characters") from error


def longest_token(tokenizer: tokenizers.Tokenizer) -> int:
    """Upper bound on the bytes of the longest token: tokens may spell bytes as characters."""
    return max((len(token.encode()) for token in tokenizer.get_vocab(with_added_tokens=True)), default=1)


def load_tokenizer(source: TokenizerConfig | str | os.PathLike[str], *, add_missing: bool = False) -> Tokenizer:
    """Reads a tokenizer.json.

    Args:
        source: the file, its directory, or "demo" for the small bundled tokenizer ("./demo" is a directory of that
            name).
        add_missing: add missing STEP3-VL tokens, e.g. to Qwen3's tokenizer; see `add_step3_tokens`.

    Raises:
        TokenError: the file does not exist, is not a tokenizer, or lacks control tokens.
    """
    path = os.fspath(source.path if isinstance(source, TokenizerConfig) else source)
    text = _demo_json() if path == "demo" else _read_json(Path(path))
    try:
        raw = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more specific
        raise TokenError(f"{path} is not a tokenizer.json: {error}") from error
    if add_missing:
        add_step3_tokens(raw)
    return Tokenizer(raw, name=path)


def add_step3_tokens(raw: tokenizers.Tokenizer) -> list[str]:
    """Adds missing `STEP3_TOKENS` to `raw`, in order, at the next free ids.

    Qwen3's tokenizer then has `<im_patch>` at 151679, like the public checkpoint, and `<patch_newline>` at 151691.
    Unconfirmed: all other ids. With a published checkpoint, use its own tokenizer.json.

    Returns:
        The added names.
    """
    present = {token.content for token in raw.get_added_tokens_decoder().values()}
    missing = [name for name in STEP3_TOKENS if name not in present]
    raw.add_special_tokens(missing)
    return missing


def _demo_json() -> str:
    resource = importlib.resources.files("stepjax").joinpath("assets", "demo_tokenizer", "tokenizer.json")
    return resource.read_text(encoding="utf-8")


def _read_json(path: Path) -> str:
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenError(
            f"tokenizer {str(path)!r} cannot be read ({error}): "
            'give a tokenizer.json, a directory that holds one, or "demo"'
        ) from error


def _without_added_tokens(raw: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    # The library splits text at added tokens before tokenizing it. Its switch against this (encode_special_tokens) does
    # not cover tokens that are not marked special, such as <think>.
    description = json.loads(raw.to_str())
    # Truncation would silently drop text, and a post-processor may insert tokens.
    description.update(added_tokens=[], truncation=None, padding=None, post_processor=None)
    return tokenizers.Tokenizer.from_str(json.dumps(description))
