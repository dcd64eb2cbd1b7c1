r"""Images that a record names beside its text, put where they belong.

Other tools (LLaVA, LLaMA-Factory, ms-swift, TRL) write a list of images and a place for each, `<image>` in the text or
an image item without an image:

    {"messages": [{"role": "user", "content": "<image>\nWhat is it?"}, ...], "images": ["a.png"]}

The text around a marker stays as it is. Without a place, images go before the text of the user's turn if there is just
one. Whatever else could be meant is refused: such a record would train as text, without its images.
"""

from typing import Any

from stepjax.errors import TokenError

MARKER = "<image>"
_KEYS = ("image", "images")
_OTHER_MEDIA = ("video", "videos", "audio", "audios")
_SLOT: dict[str, Any] = {"type": "image"}
_SHAPE = (
    'write <image> in the text once for each image, in order, or give a content of [{"type": "image", "image": PATH}, '
    '{"type": "text", "text": ...}]'
)


def place_images(record: dict[str, Any]) -> dict[str, Any]:
    """The record with its images as items of its content; itself if it names none beside its text.

    Raises:
        TokenError: which image goes where is not clear, a place has no image, or there are other media.
    """
    for key in _OTHER_MEDIA:
        if _is_given(record.get(key)):
            raise TokenError(f"it has {key!r}, and only images can be seen: give frames as images, or leave it out")
    kind = next((kind for kind in ("messages", "content", "text") if record.get(kind) is not None), "text")
    turns = record["messages"] if kind == "messages" and isinstance(record["messages"], list) else [record]
    key = "text" if kind == "text" else "content"
    contents = [_split(turn.get(key)) if isinstance(turn, dict) else [] for turn in turns]
    num_slots = sum(item is _SLOT for content in contents for item in content)

    keys = [key for key in _KEYS if _is_given(record.get(key))]
    if not keys:
        # A document without images may well speak of <image>: it is HTML, say. A question that does has lost its own.
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
    record = {name: value for name, value in record.items() if name not in _KEYS}
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
    """The items of a content, with a slot for each place of an image; nothing of what is malformed."""
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
