"""Records by index from JSON Lines and ArrayRecord files, and errors that say where to look."""

import json
import os
import pickle
from pathlib import Path

import pytest

import stepjax.data.records as records_module
from stepjax.config import ArrayRecordSource, DigitsSource, JsonlSource
from stepjax.data.digits import DigitsRecords
from stepjax.data.records import ArrayRecords, JsonlRecords, open_source
from stepjax.errors import RecordError


def write(path: Path, *lines: bytes | str | dict) -> str:
    """Lines as they are, and dicts as JSON; with a newline behind each."""
    encoded = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
    path.write_bytes(b"".join((e.encode() if isinstance(e, str) else e) + b"\n" for e in encoded))
    return str(path)


def user(*items) -> dict:
    return {"messages": [{"role": "user", "content": list(items)}, {"role": "assistant", "content": "yes"}]}


def image(value) -> dict:
    return {"type": "image", "image": value}


# JSON Lines ----------------------------------------------------------------------------------------------------------


def test_records_are_found_by_index_among_blank_lines(tmp_path):
    texts = ["first", "zwei \u00fc\u4e2d", "3" * 5000, "last"]
    lines = [
        "",
        {"text": texts[0]},
        "   ",
        "\t",
        {"text": texts[1]},
        {"text": texts[2]},
        "",
        {"text": texts[3]},
        "",
        "",
    ]
    records = JsonlRecords("docs", write(tmp_path / "a.jsonl", *lines))
    assert len(records) == 4
    assert [records[i]["text"] for i in (3, 1, 0, 2)] == [texts[i] for i in (3, 1, 0, 2)]


def test_windows_line_ends_and_a_last_line_without_one(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\r\n\r\n{"text": "b"}\r\n  \r\n{"text": "c"}')
    records = JsonlRecords("docs", path)
    assert [records[i]["text"] for i in range(len(records))] == ["a", "b", "c"]


def test_byte_order_mark_is_no_error(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
    assert JsonlRecords("docs", path)[0]["text"] == "a"


def test_id_defaults_to_source_and_index_and_is_kept_where_given(tmp_path):
    records = JsonlRecords("docs", write(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b", "id": "mine"}))
    assert [records[i]["id"] for i in range(2)] == ["docs/0", "mine"]


def test_image_paths_are_relative_to_the_file(tmp_path):
    uri, url, absolute = "data:image/png;base64,AAAA", "https://example.org/a.png", str(tmp_path / "b.png")
    images = ["pictures/a.png", uri, url, absolute]
    path = write(
        tmp_path / "a.jsonl",
        user(*map(image, images), {"type": "text", "text": "pictures/a.png"}),
        {"content": [image("pictures/a.png"), {"type": "text", "text": "a"}]},
    )
    records = JsonlRecords("chat", path)
    resolved = str(tmp_path / "pictures/a.png")
    content = records[0]["messages"][0]["content"]
    assert [item["image"] for item in content[:-1]] == [resolved, uri, url, absolute]
    assert content[-1]["text"] == "pictures/a.png"
    assert records[0]["messages"][1]["content"] == "yes"
    assert records[1]["content"][0]["image"] == resolved


def test_bad_json_names_the_record_the_line_and_the_file(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "a"}, "", '{"text": "b"', {"text": "c"})
    records = JsonlRecords("docs", path)
    assert records[2]["text"] == "c"
    with pytest.raises(RecordError) as error:
        records[1]
    message = str(error.value)
    assert "docs/1" in message and f"line 3 of {path}" in message and '{"text": "b"' in message


@pytest.mark.parametrize("line", ['"text"', "5", "null"])
def test_json_that_is_no_object_is_refused(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text(line)  # without a newline, so that "5" is a file of one byte
    with pytest.raises(RecordError, match=r"docs/0.*line 1 of .*JSON object"):
        JsonlRecords("docs", path)[0]


DEEP = b"[" * 3000 + b"]" * 3000
BAD_LINES = {
    "no text": (b'{"text": "\xff\xfe"}', "not valid JSON.*utf-8"),
    "UTF-16": ('{"text": "a"}'.encode("utf-16-le"), "not valid JSON"),
    "deep": (b'{"text": "a", "meta": ' + DEEP + b"}", "nested too deeply"),
    "deep, unclosed": (b'{"text": "a", "meta": ' + b'{"a":' * 100_000, "nested too deeply"),
    "a huge number": (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "not valid JSON.*digits"),
    "NaN": (b'{"text": "a", "n": NaN}', "NaN is not JSON"),
    "infinity": (b'{"text": "a", "n": -Infinity}', "-Infinity is not JSON"),
    "NUL": (b'{"text": "a\x00b"}', "not valid JSON.*control character"),
    "half a pair": (b'{"text": "a\\ud83d"}', "half a surrogate pair"),
    "half a pair as a key": (b'{"text": "a", "\\uDE00": 1}', "half a surrogate pair"),
    "a key twice": (b'{"text": "a", "text": "b"}', "the key 'text' is given twice"),
    "a key twice within": (b'{"messages": [{"role": "user", "role": "assistant"}]}', "the key 'role' is given twice"),
    "an id that is a list": (b'{"text": "a", "id": [1]}', r"id is \[1\]"),
    "an id that is empty": (b'{"text": "a", "id": ""}', "id is ''"),
    "an array": (b"[1, 2]", "JSON object, this is list"),
    "a video": (b'{"text": "a", "video": "a.mp4"}', "'video'"),
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_record_names_its_line_and_file_and_spoils_no_other(tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", {"text": "a"}, line, {"text": "c"})
    records = JsonlRecords("docs", path)
    assert len(records) == 3 and records[0]["text"] == "a" and records[2]["text"] == "c"
    with pytest.raises(RecordError, match=f"docs/1.*line 2 of {path}.*{message}"):
        records[1]


def test_a_record_over_the_bound_is_refused_and_never_held(tmp_path, monkeypatch):
    monkeypatch.setattr(records_module, "MAX_RECORD", 2000)
    monkeypatch.setattr(records_module, "_PIECE", 64)
    texts = ["x" * 1900, "x" * 2000, " " * 3000, "y" * 100]
    path = write(tmp_path / "a.jsonl", *({"text": text} if text.strip() else text for text in texts))
    records = JsonlRecords("docs", path)
    assert [records[i]["text"] for i in (0, 2)] == [texts[0], texts[3]]
    with pytest.raises(RecordError, match="docs/1.*line 2 of .*more than 0 MiB; keep images in files"):
        records[1]


@pytest.mark.parametrize(
    "text", ['[{"text": "a"}]', '[\n {"text": "a"},\n {"text": "b"}\n]\n', '\ufeff [{"text": "a"},\n1]']
)
def test_a_json_array_is_told_from_json_lines(tmp_path, text):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(RecordError, match=r"'docs': .*a.jsonl is a JSON array; write one object a line"):
        JsonlRecords("docs", tmp_path / "a.jsonl")


@pytest.mark.parametrize(("given", "name"), [(5, "5"), (2**70, str(2**70)), ("a", "a"), (None, "docs/0")])
def test_ids(tmp_path, given, name):
    assert JsonlRecords("docs", write(tmp_path / "a.jsonl", {"text": "a", "id": given}))[0]["id"] == name


def test_only_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(RecordError, match="cannot be read: not a regular file"):
            JsonlRecords("docs", path)
        with pytest.raises(RecordError, match="cannot be read: .*not a regular file"):
            ArrayRecords("docs", [str(path)])


# Images beside the text ----------------------------------------------------------------------------------------------


def test_images_beside_messages_are_placed_and_found(tmp_path):
    (tmp_path / "b.png").write_bytes(b"")
    lines = [
        {"messages": user("q")["messages"][1:], "images": None},
        {"messages": [{"role": "user", "content": "<image>\nq"}], "image": "a.png"},
        {
            "messages": [{"role": "user", "content": "q"}],
            "images": [f"file://{tmp_path}/with%20space.png", "gs://b/a.png"],
        },
    ]
    records = JsonlRecords("chat", write(tmp_path / "a.jsonl", *lines))
    assert records[0]["messages"] == lines[0]["messages"]
    assert records[1]["messages"][0]["content"] == [image(str(tmp_path / "a.png")), {"type": "text", "text": "\nq"}]
    placed = [image(f"{tmp_path}/with space.png"), image("gs://b/a.png"), {"type": "text", "text": "q"}]
    assert records[2]["messages"][0]["content"] == placed
    assert "images" not in records[2] and "image" not in records[1]


@pytest.mark.parametrize(
    "messages", ["hello", [1, "a", None], [{"role": "user"}], [{"content": ["a", {"image": 5}]}], 7]
)
def test_malformed_messages_are_left_to_the_processor(tmp_path, messages):
    records = JsonlRecords("chat", write(tmp_path / "a.jsonl", {"messages": messages}))
    assert records[0]["messages"] == messages


@pytest.mark.parametrize("content", [b"", b"\n\n", b"  \r\n\t\n"])
def test_file_without_a_record_is_refused(tmp_path, content):
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    with pytest.raises(RecordError, match="'docs'.*empty.jsonl holds no record"):
        open_source(JsonlSource(name="docs", weight=1, path=str(path)), seed=0)


def test_missing_file_and_folder_are_refused(tmp_path):
    with pytest.raises(RecordError, match="'docs'.*nowhere.jsonl cannot be read: No such file"):
        open_source(JsonlSource(name="docs", weight=1, path=str(tmp_path / "nowhere.jsonl")), seed=0)
    with pytest.raises(RecordError, match="'docs'.*cannot be read"):
        open_source(JsonlSource(name="docs", weight=1, path=str(tmp_path)), seed=0)


def test_jsonl_pickles_for_data_workers(tmp_path):
    records = JsonlRecords("docs", write(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b"}))
    assert pickle.loads(pickle.dumps(records))[1] == records[1]


# ArrayRecord ---------------------------------------------------------------------------------------------------------


def write_array_record(path: Path, *records: dict | bytes) -> str:
    module = pytest.importorskip("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record if isinstance(record, bytes) else json.dumps(record).encode())
    writer.close()
    return str(path)


def test_array_record_files_are_one_source(tmp_path):
    first = write_array_record(tmp_path / "a.array_record", {"text": "a"}, {"text": "b", "id": "mine"})
    second = write_array_record(tmp_path / "b.array_record", user(image("x.png")), b'{"text": ')
    records = open_source(ArrayRecordSource(name="big", weight=1, paths=(first, second)), seed=0)
    assert len(records) == 4
    assert [records[i]["id"] for i in (1, 0, 2)] == ["mine", "big/0", "big/2"]
    assert records[0]["text"] == "a"
    assert records[2]["messages"][0]["content"][0]["image"] == str(tmp_path / "x.png")
    with pytest.raises(RecordError, match=r"big/3.*b\.array_record.*not valid JSON"):
        records[3]
    assert pickle.loads(pickle.dumps(records))[1] == records[1]


def test_missing_and_empty_array_record_files_are_refused(tmp_path):
    there = write_array_record(tmp_path / "a.array_record", {"text": "a"})
    missing = str(tmp_path / "b.array_record")
    with pytest.raises(RecordError) as error:
        ArrayRecords("big", [there, missing])
    assert "'big'" in str(error.value) and missing in str(error.value) and there not in str(error.value)
    with pytest.raises(RecordError, match="'big'.*no paths were given"):
        ArrayRecords("big", [])
    with pytest.raises(RecordError, match=r"'big'.*c\.array_record hold no record"):
        ArrayRecords("big", [write_array_record(tmp_path / "c.array_record")])


def test_damaged_array_record_files_are_refused(tmp_path):
    good = write_array_record(tmp_path / "a.array_record", *({"text": str(i)} for i in range(50)))
    content = bytearray(Path(good).read_bytes())
    content[100:400] = bytes(byte ^ 255 for byte in content[100:400])
    (tmp_path / "flipped.array_record").write_bytes(content)
    (tmp_path / "cut.array_record").write_bytes(content[:1000])
    with pytest.raises(RecordError, match=r"'big'.*cut.array_record cannot be read"):
        ArrayRecords("big", [str(tmp_path / "cut.array_record")])
    with pytest.raises(RecordError, match=r"big/3.*flipped.array_record.*the file is damaged"):
        ArrayRecords("big", [str(tmp_path / "flipped.array_record")])[3]


# What a resumed run compares -----------------------------------------------------------------------------------------


def test_the_digest_of_a_file_finds_every_change_of_size_and_every_change_of_a_small_one(tmp_path, monkeypatch):
    monkeypatch.setattr(records_module, "_BLOCK", 64)
    small, large = tmp_path / "small.jsonl", tmp_path / "large.jsonl"
    write(small, *({"text": f"{i:04}"} for i in range(100)))
    write(large, *({"text": f"{i:04}"} for i in range(1000)))
    for path in (small, large):
        (before,) = JsonlRecords("docs", path).files()
        content = path.read_bytes()
        assert before == {"path": str(path), "bytes": len(content), "records": content.count(b"\n")} | {
            "digest": before["digest"]
        }
        lines = content.splitlines(keepends=True)
        swapped = [*lines[:51], lines[51][:-3] + b'" }\n', lines[52][:-6] + b'5"}\n', *lines[53:]]
        changes = [
            content + lines[0],
            b"".join(lines[:-1]),
            b"".join(swapped),
            b"x" + content[1:],
            content[:-2] + b"]\n",
        ]
        changes += [content.replace(b"0050", b"9950")] if path == small else []
        for changed in changes:
            path.write_bytes(changed)
            assert JsonlRecords("docs", path).files() != [before]
        path.write_bytes(content)
        assert JsonlRecords("docs", path).files() == [before]


def test_digits_are_a_source():
    source = DigitsSource(name="sums", weight=1, task="arithmetic")
    records = open_source(source, seed=3)
    assert isinstance(records, DigitsRecords)
    assert records[5] == DigitsRecords(source, 3)[5] != DigitsRecords(source, 4)[5]
