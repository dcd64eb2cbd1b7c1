"""Images beside a record's text: placed where that is clear, refused where it is not."""

import pytest
from PIL import Image

from stepjax.config import ImageConfig, TokenizerConfig
from stepjax.errors import RecordError, TokenError
from stepjax.processing.processor import Processor, place_images

processor = Processor.from_config(ImageConfig(global_size=112, crop_size=56, patch_size=14), TokenizerConfig())
ANSWER = {"role": "assistant", "content": "y"}


def chat(*contents, **fields):
    turns = [turn for content in contents for turn in ({"role": "user", "content": content}, ANSWER)]
    return {"id": "r", "messages": turns, **fields}


def text(value):
    return {"type": "text", "text": value}


def image(value=None):
    return {"type": "image"} if value is None else {"type": "image", "image": value}


@pytest.mark.parametrize(
    "record, contents",
    [
        (chat("<image>\nq", image="a"), [[image("a"), text("\nq")]]),
        (chat("<image>\nq", images=["a"]), [[image("a"), text("\nq")]]),
        (chat("one <image> two <image>", images=["a", "b"]), [[text("one "), image("a"), text(" two "), image("b")]]),
        (
            chat("<image><image>", "so?", "<image>", images=["a", "b", "c"]),
            [[image("a"), image("b")], "so?", [image("c")]],
        ),
        (chat([image(), text("q")], [image(), text("<image>")], images="abc"), None),
        (
            chat([image(), text("q")], [text("r <image>")], images=["a", "b"]),
            [[image("a"), text("q")], [text("r "), image("b")]],
        ),
        (chat("q", images=["a", "b"]), [[image("a"), image("b"), text("q")]]),
        (chat("q", image=b"bytes"), [[image(b"bytes"), text("q")]]),
        (chat([text("q")], image={"path": "a"}), [[image({"path": "a"}), text("q")]]),
        (chat("q", image=None, images=[], video="", videos=None), ["q"]),
        (chat([image("a"), text("q")], source="b", answer=3, image_id=7), [[image("a"), text("q")]]),
    ],
)
def test_conversations(record, contents):
    if contents is None:
        with pytest.raises(TokenError, match="1 under 'images', and 3 place.s."):
            place_images(record)
        return
    placed = place_images(record)
    assert [turn["content"] for turn in placed["messages"] if turn["role"] == "user"] == contents
    assert place_images(placed) == placed, "what is placed stays"
    assert placed.get("source") == record.get("source")


def test_documents():
    html = {"id": "r", "text": "the element <image> of SVG"}  # names no image: a document is free to speak of one
    assert place_images(html) is html
    assert place_images({"id": "r", "text": "see <image>: a", "images": ["a"]}) == {
        "id": "r",
        "content": [text("see "), image("a"), text(": a")],
    }
    assert place_images({"content": [image(), text("a")], "image": "x"}) == {"content": [image("x"), text("a")]}


@pytest.mark.parametrize(
    "record, message",
    [
        (chat("<image>\nq"), "1 place.s. for images.* no 'images'"),
        (chat([text("<image>\nq")]), "1 place.s. for images"),
        (chat("q", images=[], image=None) | {"messages": [{"role": "user", "content": "<image>"}]}, "no 'images'"),
        (
            chat("q") | {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<image>"}]},
            "no 'i",
        ),
        ({"text": "a", "image": "x"}, "1 under 'image', and 0 place.s. for them: write <image>"),
        ({"content": [text("a")], "images": ["x"]}, "1 under 'images', and 0 place.s."),
        (chat("<image>", images=["a", "b"]), "2 under 'images', and 1 place.s."),
        (chat("<image> <image>", image="a"), "1 under 'image', and 2 place.s."),
        (chat("q", "r", image="a"), "1 under 'image', and 0 place.s."),
        (chat([image("a"), text("<image>")], images=["b"]), "image items with images of their own"),
        (chat("<image>", image="a", images=["a"]), "both 'image' and 'images'"),
        (chat("q", video="a.mp4"), "'video', but the model reads only images"),
        (chat("q", videos=["a.mp4"]), "'videos'"),
        ({"text": "q", "audio": {"path": "a.wav"}}, "'audio'"),
    ],
)
def test_what_is_not_clear_is_refused(record, message):
    with pytest.raises(TokenError, match=message):
        place_images(record)


@pytest.mark.parametrize("messages", [[], "hello", 7, [1, "a", None], [{"role": "system", "content": 7}, {}]])
def test_what_is_malformed_is_left_to_the_template(messages):
    record = {"messages": messages}
    assert place_images(record) is record
    if messages != []:
        with pytest.raises(TokenError, match="for them"):
            place_images(record | {"images": ["a"]})


@pytest.mark.parametrize(
    "record, message",
    [
        ({"id": "r", "conversations": [{"from": "human", "value": "q"}]}, 'messages": .*conversations'),
        ({"id": "r", "prompt": "q", "response": "a"}, 'messages": .*prompt'),
        (chat("<image>q"), "no 'images'"),
        (chat("q", tools=-1), "tools=-1: give a list"),
    ],
)
def test_the_processor_names_the_shape_to_write(record, message):
    with pytest.raises(RecordError, match=f"record 'r': .*{message}"):
        processor.process(record)


def test_the_processor_sees_the_images_of_records_from_python():
    picture = Image.new("RGB", (30, 20))
    for record in (chat("<image>q", image=picture), chat("q", images=[picture])):
        assert len(processor.process(record).global_views) == 1
