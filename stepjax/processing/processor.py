"""Turns a record into an `Example`: image views, token ids and loss weights. Shared by training and inference."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from PIL import Image

from stepjax.config import ImageConfig, TokenizerConfig
from stepjax.errors import ImageError, RecordError, TokenError
from stepjax.processing import chat_template
from stepjax.processing.chat_template import ImageSegment, Segment, SpecialSegment, TextSegment, TrainedTurns
from stepjax.processing.image_files import open_image
from stepjax.processing.images import CodedImage, UncutImage, uncut
from stepjax.processing.tokenizer import Tokenizer, load_tokenizer
from stepjax.processing.tokens import Draft, Example, TextSpan, check_length, lay_out, least_tokens

_KINDS = ("messages", "text", "content")
_SHORT, _NUM_SHORT = 64, 4096  # longest text whose ids are kept, in characters, and how many of them

MARKER = "<image>"
_IMAGE_KEYS = ("image", "images")
_OTHER_MEDIA = ("video", "videos", "audio", "audios")
_SLOT: dict[str, Any] = {"type": "image"}
_SHAPE = (
    'write <image> in the text once for each image, in order, or give a content of [{"type": "image", "image": PATH}, '
    '{"type": "text", "text": ...}]'
)


class Processor:
    """Picklable, for data workers."""

    def __init__(self, tokenizer: Tokenizer, image_config: ImageConfig, tokenizer_config: TokenizerConfig):
        """
        Args:
            tokenizer: need not come from `tokenizer_config.path`.
            tokenizer_config: decides how generation prompts end.
        """
        self.tokenizer = tokenizer
        self.image_config = image_config
        self.tokenizer_config = tokenizer_config
        self._short: dict[str, list[int]] = {}

    @classmethod
    def from_config(cls, images: ImageConfig, tokenizer: TokenizerConfig) -> "Processor":
        """Loads the configured tokenizer.

        Raises:
            TokenError: the tokenizer cannot be used.
        """
        return cls(load_tokenizer(tokenizer), images, tokenizer)

    def process(self, record: dict[str, Any], *, trained: TrainedTurns = "all") -> Example:
        """Makes the training example of a record: `draft` with its views."""
        return self.draft(record, trained=trained).example(self.image_config)

    def draft(self, record: dict[str, Any], *, trained: TrainedTurns = "all") -> Draft:
        """Makes the training example of a record, its views yet to be cut. The images are decoded and planned.

        Args:
            record: has an `id`, and one of

                - `messages`: a conversation, with optional `tools`; see `chat_template.render`.
                - `text`: a document.
                - `content`: a document of text and image items, in order.

                Documents are trained whole and end with `<|endoftext|>`. `images` go to their places in the text (see
                `place_images`). Unrelated keys are ignored.
            trained: assistant turns of a conversation that count in the loss.

        Raises:
            RecordError: the record is malformed, an image or message is unusable, or nothing in it is trained. Names
                the record and the cause.
        """
        name = _record_name(record)
        try:
            segments = self._segments(place_images(record), trained)
            draft = self._lay_out(name, segments)
        except (ImageError, TokenError) as error:
            raise RecordError(f"record {name!r}: {error}") from error
        except RecursionError as error:
            raise RecordError(f"record {name!r}: a value is nested too deeply; leave it out") from error
        if not draft.loss_weights.any():
            raise RecordError(
                f"record {name!r} has nothing to train on (trained={trained!r}): give a document some text, "
                "or a conversation an assistant turn, after the last user turn if only that is trained"
            )
        return draft

    def process_prompt(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        enable_thinking: bool | None = None,
        max_tokens: int | None = None,
        name: str = "prompt",
        open_image: Callable[..., Image.Image | CodedImage] = open_image,
    ) -> Example:
        """Makes the prompt for the assistant's next turn. All loss weights are zero.

        Args:
            messages: see `chat_template.render`.
            tools: JSON schemas of the functions that the assistant may call.
            enable_thinking: None defers to `TokenizerConfig.generation_starts_thinking`; see
                `chat_template.generation_prompt`.
            max_tokens: limit for the prompt. Fails early if the text alone exceeds it.
            name: names the conversation in error messages.
            open_image: like `image_files.open_image`, or gives coded images.

        Raises:
            ContextLengthError: the prompt is longer than `max_tokens`.
            RecordError: a message or an image is unusable. Names the cause.
        """
        try:
            segments = [
                *chat_template.render(messages, tools=tools, trained="none"),
                *chat_template.generation_prompt(
                    starts_thinking=self.tokenizer_config.generation_starts_thinking, enable_thinking=enable_thinking
                ),
            ]
            longest = self.tokenizer.longest_token
            least = sum(least_tokens(each.text, longest) if isinstance(each, TextSegment) else 1 for each in segments)
            check_length(least, max_tokens, name, at_least=True)
            draft = self._lay_out(name, segments, open_image)
            check_length(len(draft.tokens), max_tokens, name)
            return draft.example(self.image_config)
        except (ImageError, TokenError) as error:
            raise RecordError(f"{name}: {error}") from error

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a generation."""
        return self.tokenizer.stop_ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of token ids; see `Tokenizer.decode`."""
        return self.tokenizer.decode(ids, skip_special)

    def _segments(self, record: dict[str, Any], trained: TrainedTurns) -> list[Segment]:
        kinds = [kind for kind in _KINDS if record.get(kind) is not None]
        if len(kinds) != 1:
            shape = (
                '; write a conversation as {"messages": [{"role": "user", "content": ...}, ...]}' if not kinds else ""
            )
            found = f"{kinds or 'none'} of the keys {', '.join(_KINDS)}"
            raise TokenError(f"it has {found}: give exactly one{shape} (its keys are {_shown(list(record))})")
        tools = record.get("tools")
        if tools is not None and not isinstance(tools, (list, tuple)):
            raise TokenError(f"tools={_shown(tools)}: give a list of JSON schemas")
        if tools is not None and kinds != ["messages"]:
            raise TokenError("it has tools without messages: only a conversation can have tools")
        if kinds == ["messages"]:
            return chat_template.render(record["messages"], tools=tools, trained=trained)
        kind = kinds[0]
        wanted = str if kind == "text" else list
        if not isinstance(record[kind], wanted):
            raise TokenError(f"{kind} is a {type(record[kind]).__name__}: give a {wanted.__name__}")
        document = chat_template.content_segments(record[kind], kind, trained=True)
        return [*document, SpecialSegment("<|endoftext|>", trained=True)]

    def _lay_out(
        self, name: str, segments: Sequence[Segment], open_image: Callable[..., Image.Image | CodedImage] = open_image
    ) -> Draft:
        spans: list[TextSpan | UncutImage | CodedImage] = []
        ids: list[int] = []  # of the open span: as long as the weight is the same
        trained = False
        num_images = 0
        for segment in segments:
            if isinstance(segment, ImageSegment):
                image = open_image(segment.image, name=f"image {num_images}, {segment.where}", frame=segment.frame)
                views = image if isinstance(image, CodedImage) else uncut(image, self.image_config)
                spans += TextSpan(ids, float(trained)), views
                ids = []
                num_images += 1
                continue
            if segment.trained != trained:
                spans.append(TextSpan(ids, float(trained)))
                ids, trained = [], segment.trained
            if isinstance(segment, TextSegment):
                ids += self._ids(segment.text)
            else:
                ids += self.tokenizer.encode_marker(segment.name)
        spans.append(TextSpan(ids, float(trained)))
        return lay_out(name, spans, self.image_config, self.tokenizer.special_tokens)

    def _ids(self, text: str) -> list[int]:
        """Ids of plain text. Those of short texts are kept: the template's come with every record."""
        if len(text) > _SHORT:
            return self.tokenizer.encode(text)
        ids = self._short.get(text)
        if ids is None:
            if len(self._short) >= _NUM_SHORT:
                self._short.clear()
            ids = self._short[text] = self.tokenizer.encode(text)
        return ids


def _record_name(record: object) -> str:
    if not isinstance(record, dict):
        raise RecordError(f"a record is a {type(record).__name__}, {_shown(record)}: give a dict")
    name = record.get("id")
    if not isinstance(name, str) or not name:
        raise RecordError(f"a record has id={name!r}: give a non-empty string; its keys are {list(record)}")
    return name


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}..."


def place_images(record: dict[str, Any]) -> dict[str, Any]:
    r"""Moves a record's `images` into its content as items. Returns the record itself if it has none.

    Other tools (LLaVA, LLaMA-Factory, ms-swift, TRL) write a list of images, and a place for each: `<image>` in the
    text, or an image item without an image:

        {"messages": [{"role": "user", "content": "<image>\nWhat is it?"}, ...], "images": ["a.png"]}

    Text around a marker is unchanged. Without places, images go before the text of the user turn if there is only one.
    Anything else is refused, since the record would train as text, without its images.

    Raises:
        TokenError: it is unclear which image goes where, a place has no image, or there are other media.
    """
    for key in _OTHER_MEDIA:
        if _is_given(record.get(key)):
            raise TokenError(f"it has {key!r}, but the model reads only images: give frames as images, or leave it out")
    kind = next((kind for kind in ("messages", "content", "text") if record.get(kind) is not None), "text")
    turns = record["messages"] if kind == "messages" and isinstance(record["messages"], list) else [record]
    key = "text" if kind == "text" else "content"
    contents = [_split(turn.get(key)) if isinstance(turn, dict) else [] for turn in turns]
    num_slots = sum(item is _SLOT for content in contents for item in content)

    keys = [key for key in _IMAGE_KEYS if _is_given(record.get(key))]
    if not keys:
        # A document without images may mention <image>, like HTML. A question that mentions it has lost its images.
        if num_slots and kind != "text":
            raise TokenError(
                f"it has {num_slots} place(s) for images ({MARKER}, or an item without one), and no 'images': "
                "name them there, or take the places out"
            )
        return record
    if len(keys) > 1:
        raise TokenError("it has both 'image' and 'images': give one of them")
    value = record[keys[0]]
    images = list(value) if isinstance(value, (list, tuple)) else [value]
    if any(isinstance(item, dict) and item.get("image") is not None for content in contents for item in content):
        raise TokenError(f"it has {keys[0]!r} and image items with images of their own: give one of them")
    if not num_slots and kind == "messages":
        users = [i for i, turn in enumerate(turns) if isinstance(turn, dict) and turn.get("role") == "user"]
        if len(users) == 1:
            contents[users[0]] = [_SLOT] * len(images) + contents[users[0]]
            num_slots = len(images)
    if num_slots != len(images):
        raise TokenError(f"it has {len(images)} under {keys[0]!r}, and {num_slots} place(s) for them: {_SHAPE}")

    left = iter(images)
    filled = [
        [{"type": "image", "image": next(left)} if item is _SLOT else item for item in content] for content in contents
    ]
    record = {name: value for name, value in record.items() if name not in _IMAGE_KEYS}
    if kind == "messages":
        replaced = zip(turns, contents, filled, strict=True)
        return record | {
            "messages": [{**turn, "content": new} if _SLOT in old else turn for turn, old, new in replaced]
        }
    if kind == "text":
        del record["text"]
    return record | {"content": filled[0]}


def _is_given(value: object) -> bool:
    return value is not None and not (isinstance(value, (str, bytes, list, tuple, dict)) and not value)


def _split(content: object) -> list[Any]:
    """The items of a content, with a slot per image place; malformed items are dropped."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    items: list[Any] = []
    for item in content if isinstance(content, list) else ():
        text = item.get("text") if isinstance(item, dict) and item.get("type") == "text" else None
        if isinstance(text, str) and MARKER in text:
            pieces = [[{"type": "text", "text": piece}] if piece else [] for piece in text.split(MARKER)]
            items += pieces[0] + [each for piece in pieces[1:] for each in (_SLOT, *piece)]
        else:
            is_slot = isinstance(item, dict) and item.get("type") == "image" and item.get("image") is None
            items.append(_SLOT if is_slot else item)
    return items
