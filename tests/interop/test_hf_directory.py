"""Which files of a Hugging Face directory count, and which names, headers and kinds of file are refused."""

import json
import os
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from stepjax.errors import CheckpointError
from stepjax.interop.bounds import read_json
from stepjax.interop.hf_directory import HFDirectory, side_files
from stepjax.interop.hf_match import match, places
from stepjax.interop.safetensors_file import parse_header

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def public(tiny_dir):
    return load_file(tiny_dir / "model.safetensors")


@pytest.fixture
def make(tmp_path, tiny_dir, public):
    """A function that makes a directory with these files of tensors (all of them, or every second) and an index."""
    keys = list(public)

    def write(files, index=None):
        (tmp_path / "config.json").write_text((tiny_dir / "config.json").read_text())
        for name, part in files.items():
            chosen = keys[part] if isinstance(part, slice) else keys
            save_file({key: public[key] * (part != "zeros") for key in chosen}, tmp_path / name)
        if index is not None:
            chosen = {key: name for name, part in index.items() for key in keys[part]}
            (tmp_path / INDEX).write_text(json.dumps({"weight_map": chosen}))
        return tmp_path

    return write


ALL, FIRST, SECOND = slice(None), slice(0, None, 2), slice(1, None, 2)
SHARDS = {"model-00001-of-00002.safetensors": FIRST, "model-00002-of-00002.safetensors": SECOND}
STRAYS = ("consolidated", "adapter_model", "model copy", "model-00001-of-00002 (1)", ".model", "stale")
CHOICES = {
    "one file beside strays": ({"model.safetensors": ALL} | {f"{name}.safetensors": "zeros" for name in STRAYS}, None),
    "shards beside strays": (SHARDS | {f"{name}.safetensors": "zeros" for name in STRAYS}, None),
    "shards without a total": ({"model-00001.safetensors": FIRST, "model-00002.safetensors": SECOND}, None),
    "an index beside strays": (SHARDS | {"consolidated.safetensors": "zeros"}, SHARDS),
    "an index, and a tensor twice": ({**SHARDS, "model-00003.safetensors": "zeros"}, SHARDS),
    "an index with names of its own": ({"a.safetensors": ALL}, {"a.safetensors": ALL}),
    "a whole file and a stale index": ({"model.safetensors": ALL}, SHARDS),
    "a whole file and half of the index's": ({"model.safetensors": ALL} | dict(list(SHARDS.items())[:1]), SHARDS),
}


@pytest.mark.parametrize("files, index", CHOICES.values(), ids=CHOICES)
def test_strays_never_decide(make, public, files, index):
    directory = make(files, index)
    (directory / "._model.safetensors").write_bytes(b"\0\5\x16\7 Mac OS X")
    (directory / "model.safetensors.bak").write_bytes(b"a backup")
    source = HFDirectory(directory)
    assert source.entries.keys() == public.keys()
    for key in public:
        np.testing.assert_array_equal(source.read(key), public[key])


def test_the_index_says_which_of_two_counts(make, public):
    directory = make(
        {"a.safetensors": ALL, "b.safetensors": "zeros"}, {"a.safetensors": FIRST, "b.safetensors": SECOND}
    )
    source = HFDirectory(directory)
    for i, key in enumerate(public):
        np.testing.assert_array_equal(source.read(key), public[key] * (i % 2 == 0))


@pytest.mark.parametrize(
    "files, index, named",
    [
        ({"consolidated.safetensors": ALL}, None, "holds no model.safetensors.* it has consolidated.safetensors"),
        (SHARDS | {"model-00001.safetensors": ALL}, None, "files of several sets: .*model-00001.safetensors"),
        (SHARDS | {"model-00001-of-00003.safetensors": ALL}, None, "files of several sets: .*-of-00003"),
        ({"model-00001-of-00002.safetensors": FIRST}, SHARDS, "missing files: model-00002-of-00002"),
        (SHARDS, {"model-00001-of-00002.safetensors": ALL}, "names tensors that are not in their files"),
    ],
)
def test_what_is_ambiguous_or_lacks_files_is_refused(make, files, index, named):
    with pytest.raises(CheckpointError, match=named):
        HFDirectory(make(files, index))


NAMES = ["/etc/passwd", "../model.safetensors", "/tmp/x.safetensors", "a/b.safetensors", "..", "", ".safetensors", 3]
NAMES += ["config.json", "a\\b.safetensors", "a\n.safetensors", "\x1b[31m.safetensors", "\ud800.safetensors", None, []]
NAMES += ["a" * 300 + ".safetensors", "C:x.safetensors"]


@pytest.mark.parametrize("name", NAMES)
def test_the_index_names_plain_files_of_the_directory(make, name):
    directory = make({"model.safetensors": ALL})
    (directory / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(CheckpointError, match="no usable weight_map"):
        HFDirectory(directory)


@pytest.mark.parametrize("fields", [[], {}, {"weight_map": None}, {"weight_map": ["a"]}, "text"])
def test_an_index_of_another_form_is_refused(make, fields):
    directory = make({"model.safetensors": ALL})
    (directory / INDEX).write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="index.json"):
        HFDirectory(directory)


# Kinds of file -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pipe", "directory", "device", "nothing"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", INDEX])
def test_only_regular_files_are_read(make, name, kind):
    """A pipe would be waited for, and a device be read, for ever."""
    directory = make({"model.safetensors": ALL}, {"model.safetensors": ALL})
    path = directory / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    if kind == "nothing" and name == INDEX:
        assert HFDirectory(directory).entries
        return
    with pytest.raises(
        CheckpointError, match="not a regular file" if kind != "nothing" else "cannot be read|missing files"
    ):
        HFDirectory(directory)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"a": 1, "a": 2}',
        '{"a": ' + "9" * 5000 + "}",
        "[]",
        "null",
        "",
        "{",
        "\ud800",
    ],
    ids=lambda text: text[:9],
)
def test_json_that_cannot_be_used_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match="config.json cannot be read"):
        read_json(tmp_path / "config.json")


def test_large_json_is_refused_unread(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 40)  # of holes
    with pytest.raises(CheckpointError, match="it has 1,099,511,627,776 bytes"):
        read_json(tmp_path / "config.json")


def test_links_are_followed_within_the_hubs_cache_only(tmp_path, tiny_dir):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (blobs / name[::-1]).write_bytes((tiny_dir / name).read_bytes() if (tiny_dir / name).exists() else b"{}")
        (snapshot / name).symlink_to(f"../../blobs/{name[::-1]}")
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (snapshot / "merges.txt").symlink_to(secret)
    (snapshot / "broken.txt").symlink_to(tmp_path / "nowhere")
    (snapshot / "loop.txt").symlink_to("loop.txt")
    assert HFDirectory(snapshot).entries
    files, others = side_files(snapshot)
    assert [file.name for file in files] == ["config.json", "tokenizer.json"]
    assert others == ["broken.txt", "loop.txt", "merges.txt"]


# Headers -------------------------------------------------------------------------------------------------------------

A = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
B = {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]}
HEADERS = {
    "negative offsets": {"a": A | {"data_offsets": [-16, 0]}},
    "offsets in reverse": {"a": A | {"data_offsets": [16, 0]}},
    "a negative shape": {"a": A | {"shape": [-2, -2]}},
    "an overlap": {"a": A, "b": B | {"data_offsets": [14, 20]}},
    "the same place twice": {"a": A, "b": A},
    "a gap": {"a": A, "b": B | {"data_offsets": [18, 24]}},
    "a gap at the start": {"b": B},
    "more bytes than the shape": {"a": A | {"data_offsets": [0, 20]}},
    "fewer bytes than the shape": {"a": A | {"shape": [2, 2**40]}},
    "another type's size": {"a": A | {"dtype": "BF16"}},
    "a shape of text": {"a": A | {"shape": "22"}},
    "a shape of floats": {"a": A | {"shape": [2.0, 2.0]}},
    "a shape of booleans": {"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}},
    "three offsets": {"a": A | {"data_offsets": [0, 8, 16]}},
    "no offsets": {"a": {"dtype": "F32", "shape": [2]}},
    "a type that is a list": {"a": A | {"dtype": ["F32"]}},
    "a number for a tensor": {"a": 5},
    "a list": [A],
    "null": None,
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_headers_that_make_no_sense_are_refused(tmp_path, header):
    with pytest.raises(CheckpointError, match="model.safetensors is damaged"):
        parse_header(tmp_path / "model.safetensors", json.dumps(header))


@pytest.mark.parametrize("text", ["", "{", '{"a": 1, "a": 2}', "[" * 100_000, json.dumps({"a": A})[:-1] + ', "a": {}}'])
def test_headers_that_are_no_json_are_refused(tmp_path, text):
    with pytest.raises(CheckpointError, match="model.safetensors is damaged"):
        parse_header(tmp_path / "model.safetensors", text)


def test_sound_headers_are_read_in_any_order(tmp_path):
    text = json.dumps(
        {"__metadata__": {"format": "pt"}, "b": B, "none": A | {"shape": [0], "data_offsets": [16, 16]}, "a": A}
    )
    assert {key: entry.nbytes for key, entry in parse_header(tmp_path, text).items()} == {"b": 6, "none": 0, "a": 16}


@pytest.mark.parametrize("length", [0, 1, 90_000_000, 2**40, 2**63])
def test_a_headers_length_is_compared_with_the_file_before_it_is_read(make, length):
    directory = make({"model.safetensors": ALL})
    with (directory / "model.safetensors").open("r+b") as file:
        file.write(length.to_bytes(8, "little"))
    with pytest.raises(CheckpointError, match=re.escape(f"its header has {length:,} of")):
        HFDirectory(directory)


def test_many_misfits_are_told_in_few_words(make, public):
    directory = make({"model.safetensors": ALL})
    save_file({f"tensor{i}": np.zeros(1, np.float32) for i in range(2000)}, directory / "model.safetensors")
    source = HFDirectory(directory)
    with pytest.raises(CheckpointError, match="and 1,900 more") as error:
        match(places(source.spec.tensors(), source.spec.shapes()), source.entries)
    assert len(str(error.value)) < 12_000
