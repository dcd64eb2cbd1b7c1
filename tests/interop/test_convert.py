"""Conversion both ways through the command line: nothing changes, nothing half-done looks finished, all errors name."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file, save_file
from tiny_recipe import config as RECIPE

from stepjax.cli import main
from stepjax.config import NumericsConfig
from stepjax.errors import CheckpointError
from stepjax.interop import bounds
from stepjax.interop.load import load_model, open_checkpoint
from stepjax.interop.orbax_directory import chunk_shape
from stepjax.interop.partial import Partial
from stepjax.sharding import named_leaves
from stepjax.training.checkpoint import Checkpointer

FLOAT32 = NumericsConfig(compute_dtype="float32", remat="none")
SIDE_FILES = {"tokenizer_config.json": '{"a":  1}', "modeling_step_vl.py": "raise SystemExit\n", "merges.txt": "a b\n"}


@pytest.fixture(scope="module")
def public(tiny_dir):
    return load_file(tiny_dir / "model.safetensors")


@pytest.fixture
def source(tmp_path, tiny_dir, public):
    """A function that writes tensors in several files beside the tiny config and side files."""

    def write(tensors=None, files=2, name="source"):
        tensors = public if tensors is None else tensors
        directory = tmp_path / name
        directory.mkdir(parents=True)
        (directory / "config.json").write_text((tiny_dir / "config.json").read_text())
        for side_file, text in SIDE_FILES.items():
            (directory / side_file).write_text(text)
        keys, where = list(tensors), {}
        for i in range(files):
            part = {key: np.ascontiguousarray(tensors[key]) for key in keys[i::files]}
            save_file(part, directory / f"model-{i + 1:05d}.safetensors", {"format": "pt"})
            where |= dict.fromkeys(part, f"model-{i + 1:05d}.safetensors")
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where, "extra": 1}))
        return directory

    return write


@pytest.fixture(scope="module")
def converted(tmp_path_factory, tiny_dir):
    directory = tmp_path_factory.mktemp("converted") / "orbax"
    assert convert(tiny_dir, directory) == 0
    return directory


def convert(*arguments):
    return main(["convert", *map(str, arguments)])


def all_files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def all_tensors(directory):
    return {key: value for path in directory.glob("*.safetensors") for key, value in load_file(path).items()}


def resaved(key):
    """The key that Transformers gives a tensor when it saves the model again."""
    key = re.sub(r"^model\.", "model.language_model.", key)
    return re.sub(r"^(vision_model|vit_large_projector)\.", r"model.\1.", key)


def bits(values):
    return values.dtype.name, values.shape, values.tobytes()


# There and back ------------------------------------------------------------------------------------------------------


def test_every_file_comes_back_byte_for_byte(tmp_path, source):
    directory = source()
    assert convert(directory, tmp_path / "orbax") == 0
    assert convert(tmp_path / "orbax", tmp_path / "back") == 0
    assert all_files(tmp_path / "back") == all_files(directory)


def test_orbax_restores_what_is_written(tiny_dir, converted, tiny_vl):
    with ocp.CheckpointManager(converted) as manager:  # that knows nothing of ours
        state = manager.restore(0, args=ocp.args.Composite(state=ocp.args.PyTreeRestore()))["state"]
    expected = named_leaves(tiny_vl[0])
    assert state.keys() == {f"model/{name}" for name in expected}
    models = [load_model(open_checkpoint(path), numerics=FLOAT32) for path in (tiny_dir, converted)]
    for name, value in expected.items():
        for found in (state[f"model/{name}"], *(named_leaves(model)[name][...] for model in models)):
            np.testing.assert_array_equal(found, value[...], err_msg=name)


def test_an_object_store_would_take_it_for_complete(converted):
    for part in ("", "state", "meta"):
        assert (converted / "0" / part / "commit_success.txt").exists()


def test_resaved_keys_come_back_in_the_layout_on_disk(tmp_path, source, public):
    directory = source({resaved(key): value for key, value in public.items()})
    convert(directory, tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "back")
    back = all_tensors(tmp_path / "back")
    assert {key: bits(value) for key, value in back.items()} == {key: bits(value) for key, value in public.items()}
    assert not (tmp_path / "back" / "model.safetensors.index.json").exists()  # one file, and not the source's two
    assert (tmp_path / "back" / "merges.txt").read_text() == SIDE_FILES["merges.txt"]


def test_mixed_types_are_kept(tmp_path, source, public):
    mixed = {key: value.astype(np.float32 if "norm" in key else ml_dtypes.bfloat16) for key, value in public.items()}
    directory = source(mixed)
    convert(directory, tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "back")
    assert all_files(tmp_path / "back") == all_files(directory)


@pytest.mark.parametrize("when", ["there", "back"])
@pytest.mark.parametrize("part, dtype", [("all", "bfloat16"), ("decoder", "keep"), ("decoder", "bfloat16")])
def test_type_and_part_are_chosen_either_way(tmp_path, source, public, capsys, when, part, dtype):
    options = ["--part", part, "--dtype", dtype]
    there, back = (options, []) if when == "there" else ([], options)
    convert(source(), tmp_path / "orbax", *there)
    first = capsys.readouterr().out
    convert(tmp_path / "orbax", tmp_path / "back", *back)
    chosen = {
        key: value if dtype == "keep" else value.astype(ml_dtypes.bfloat16)
        for key, value in public.items()
        if part == "all" or key.startswith(("model.", "lm_head."))
    }
    tensors = all_tensors(tmp_path / "back")
    assert {key: bits(value) for key, value in tensors.items()} == {key: bits(value) for key, value in chosen.items()}
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    text = part == "decoder"
    if text:
        assert (config["architectures"], config["model_type"]) == (["Qwen3ForCausalLM"], "qwen3")
    assert open_checkpoint(tmp_path / "back").spec.is_text == text
    assert (tmp_path / "back" / "merges.txt").exists()
    assert (tmp_path / "back" / "modeling_step_vl.py").exists() != text  # of the whole model

    # What is told is what was written, not what was read.
    parameters, size = (sum(getattr(value, name) for value in chosen.values()) for name in ("size", "nbytes"))
    kind = "the decoder only, a Qwen3 text model" if text else "STEP3-VL"
    name = "float32" if dtype == "keep" else dtype
    told = f"{kind}: {parameters:,} parameters, {size:,} bytes of {name}"
    assert told in (first if when == "there" else capsys.readouterr().out)


def test_a_tied_head_that_is_stored_all_the_same_comes_back(tmp_path, public):
    config = {"model_type": "llama", "vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 192}
    config |= {"tie_word_embeddings": True, "max_position_embeddings": 128}
    directory = tmp_path / "llama"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {key: value for key, value in public.items() if key.startswith("model.") and "_norm.weight" not in key}
    tensors |= {key: value for key, value in public.items() if "layernorm" in key}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors, directory / "model.safetensors")
    assert convert(directory, tmp_path / "orbax") == 0
    assert convert(tmp_path / "orbax", tmp_path / "back") == 0
    assert all_files(tmp_path / "back") == all_files(directory)

    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, directory / "model.safetensors")
    assert convert(directory, tmp_path / "untied") == 1


# What is killed ------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from stepjax.interop.partial import Partial
mark, count = Partial.mark, int(sys.argv[1])
def mark_and_die(self, name, digest):
    mark(self, name, digest)
    if len(self.done) == count:
        os.kill(os.getpid(), signal.SIGKILL)
Partial.mark = mark_and_die
from stepjax.cli import main
sys.exit(main(["convert", *sys.argv[2:]]))
"""


@pytest.mark.parametrize("direction", ["there", "back"])
def test_a_killed_conversion_leaves_nothing_finished_and_is_resumed(tmp_path, source, direction, monkeypatch, caplog):
    directory = source()
    if direction == "back":
        convert(directory, tmp_path / "orbax")
    start, end = (directory, tmp_path / "orbax") if direction == "there" else (tmp_path / "orbax", tmp_path / "back")
    outcome = subprocess.run(
        [sys.executable, "-c", KILLED, "20", start, end], capture_output=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    assert outcome.returncode == -signal.SIGKILL, outcome.stderr.decode()
    assert not end.exists()
    journal = end.with_name(end.name + ".partial") / "journal.jsonl"
    before = {json.loads(line)[0] for line in journal.read_text().splitlines()[1:]}
    assert len(before) >= 20
    with journal.open("a") as file:
        file.write('"half a li')  # as of a line that was being written

    done = []
    mark = Partial.mark
    monkeypatch.setattr(Partial, "mark", lambda self, *noted: (done.append(noted[0]), mark(self, *noted)))
    with caplog.at_level("INFO", "stepjax"):
        assert convert(start, end) == 0
    assert "resuming" in caplog.text
    assert done and not before & set(done)
    if direction == "there":
        convert(end, tmp_path / "back")
    assert all_files(tmp_path / "back") == all_files(directory)


def test_a_conversion_that_is_killed_while_orbax_saves_starts_anew(tmp_path, tiny_dir, monkeypatch):
    """Some arrays have moved then."""
    rename, moved = Path.rename, []

    def rename_some(self, target):
        moved.append(self)
        if len(moved) > 5:
            raise OSError("killed")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_some)
    assert convert(tiny_dir, tmp_path / "orbax") == 1
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["orbax.partial"]
    assert convert(tiny_dir, tmp_path / "orbax") == 0
    assert convert(tmp_path / "orbax", tmp_path / "back") == 0
    assert all_files(tmp_path / "back") == all_files(tiny_dir)


def test_work_of_a_source_that_has_changed_is_not_gone_on_with(tmp_path, source, public, capsys):
    directory = source()
    (tmp_path / "orbax.partial").mkdir()
    (tmp_path / "orbax.partial" / "journal.jsonl").write_text('{"to": "orbax"}\n"lm_head.weight"\n')
    assert convert(directory, tmp_path / "orbax") == 1
    assert "orbax.partial holds the unfinished work of another conversion" in capsys.readouterr().err
    assert convert(directory, tmp_path / "orbax", "--overwrite") == 0
    assert not (tmp_path / "orbax.partial").exists()
    assert convert(tmp_path / "orbax", tmp_path / "back") == 0
    assert all_files(tmp_path / "back") == all_files(directory)


def test_a_destination_is_replaced_on_request_only(tmp_path, tiny_dir, converted, capsys):
    for form, start in (("orbax", tiny_dir), ("back", converted)):
        (tmp_path / form).mkdir()
        assert convert(start, tmp_path / form) == 1
        assert f"{form} exists already" in capsys.readouterr().err
        for _ in range(2):  # an empty directory, and what a conversion has made
            assert convert(start, tmp_path / form, "--overwrite") == 0
    assert all_files(tmp_path / "back") == all_files(tiny_dir)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "orbax"]


@pytest.mark.parametrize("form", ["directory", "code", "run", "file", "link"])
def test_only_what_a_conversion_may_have_made_is_replaced(tmp_path, source, capsys, form):
    directory, precious = source(), tmp_path / "precious"
    if form == "file":
        precious.write_text("kept")
    elif form == "link":
        (tmp_path / "other").mkdir()
        precious.symlink_to(tmp_path / "other")
    else:
        inside = {"directory": ["notes"], "code": ["config.json", "model.safetensors", "src/a.py"], "run": []}[form]
        for name in [*inside, *(["checkpoints/8/state/d", "metrics.jsonl"] if form == "run" else [])]:
            (precious / name).parent.mkdir(parents=True, exist_ok=True)
            (precious / name).write_text("kept")
    before = sorted(tmp_path.rglob("*"))
    assert convert(directory, precious, "--overwrite") == 1
    assert "--overwrite would delete" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_work_in_a_directory_that_is_not_ours_is_not_begun(tmp_path, source, capsys):
    directory, precious = source(), tmp_path / "out.partial" / "precious"
    precious.parent.mkdir()
    precious.touch()
    assert convert(directory, tmp_path / "out", "--overwrite") == 1
    assert "out.partial is in the way" in capsys.readouterr().err
    assert precious.exists()


@pytest.mark.parametrize("kind", ["hf", "orbax", "run"])
@pytest.mark.parametrize("place", ["same", "inside", "parent", "link", "dots", "partial"])
def test_nothing_is_written_over_what_is_read(tmp_path, source, converted, capsys, kind, place):
    start = source(name="m/hf") if kind == "hf" else tmp_path / "m" / "orbax"
    if kind == "orbax":
        shutil.copytree(converted, start)
    elif kind == "run":
        (tmp_path / "m").mkdir()
        with Checkpointer(start / "checkpoints", keep=1, config=RECIPE) as checkpointer:
            checkpointer.save(2, {"x": jax.numpy.zeros(2)}, {})
    (tmp_path / "link").symlink_to(start)
    destinations = {"same": start, "inside": start / "out", "parent": start.parent, "link": tmp_path / "link"}
    destinations |= {"dots": start / ".." / start.name, "partial": start.with_name("x")}
    if place == "partial":
        start = start.rename(start.with_name("x.partial"))
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    assert convert(start, destinations[place], "--overwrite") == 1
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before
    assert "name another place" in capsys.readouterr().err


# What cannot be used -------------------------------------------------------------------------------------------------


def test_all_misfits_are_named_and_nothing_is_written(tmp_path, source, public, capsys):
    tensors = dict(public)
    del tensors["model.norm.weight"], tensors["vision_model.ln_pre.bias"]
    tensors["model.layers.7.mlp.up_proj.weight"] = np.zeros((192, 64), np.float32)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1]
    assert convert(source(tensors), tmp_path / "orbax") == 1
    message = capsys.readouterr().err
    for named in ("missing: vision_model.ln_pre.bias, model.norm.weight", "model.layers.7.mlp.up_proj.weight"):
        assert named in message
    assert "lm_head.weight (319, 64) (expected (320, 64))" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_layers_of_different_types_are_named(tmp_path, source, public, capsys):
    key = "model.layers.1.mlp.up_proj.weight"
    directory = source(public | {key: public[key].astype(np.float16)})
    assert convert(directory, tmp_path / "orbax") == 1
    assert f"{key} is F16, other layers are F32: pass --dtype" in capsys.readouterr().err
    assert convert(directory, tmp_path / "orbax", "--dtype", "float32") == 0


def test_types_that_are_not_read_are_named(tmp_path, source, public, capsys):
    key = "model.layers.1.mlp.up_proj.weight"
    assert convert(source(public | {key: public[key].astype(np.int8)}), tmp_path / "orbax") == 1
    assert f"{key} is I8: only F32, F16, BF16 are read" in capsys.readouterr().err


def test_truncated_and_absent_files_are_named(tmp_path, source, capsys):
    directory = source()
    file = directory / "model-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert convert(directory, tmp_path / "orbax") == 1
    assert "model-00002.safetensors is damaged" in capsys.readouterr().err
    file.unlink()
    assert convert(directory, tmp_path / "orbax") == 1
    assert "names missing files: model-00002.safetensors" in capsys.readouterr().err


def test_files_that_others_named_stay_in_the_directory(tmp_path, converted, capsys):
    shutil.copytree(converted, tmp_path / "orbax")
    [text] = json.loads((converted / "hf_headers.json").read_text()).values()
    for name in ("/tmp/x.safetensors", "../x.safetensors", "a/b.safetensors", "config.json", "\n.safetensors", ""):
        (tmp_path / "orbax" / "hf_headers.json").write_text(json.dumps({name: text}))
        assert convert(tmp_path / "orbax", tmp_path / "back") == 1
        assert "which is not a plain safetensors file name" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["orbax"]


def test_links_out_of_a_directory_are_left_out(tmp_path, source, caplog):
    directory, secret = source(), tmp_path / "secret"
    secret.write_text("secret")
    (directory / "linked.txt").symlink_to(secret)
    assert convert(directory, tmp_path / "orbax") == 0
    assert "left out of" in caplog.text
    (tmp_path / "orbax" / "hf" / "linked.txt").symlink_to(secret)
    assert convert(tmp_path / "orbax", tmp_path / "back") == 0
    assert not (tmp_path / "back" / "linked.txt").exists()


# Damage --------------------------------------------------------------------------------------------------------------

LAYERS = "model/decoder/blocks/mlp/up_kernel"


def damage(state, kind):
    array = state / LAYERS
    if kind == "a missing chunk":
        (array / "1.0.0").unlink()
    elif kind == "a missing array":
        shutil.rmtree(array)
    elif kind == "a short chunk":
        os.truncate(array / "1.0.0", 1000)
    elif kind == "huge chunks":
        fields = json.loads((array / ".zarray").read_text())
        (array / ".zarray").write_text(json.dumps(fields | {"chunks": [1, 2**20, 2**20]}))
    elif kind == "another shape":
        fields = json.loads((array / ".zarray").read_text())
        (array / ".zarray").write_text(json.dumps(fields | {"shape": [2, 2**40, 192]}))
    elif kind == "no names":
        (state / "_METADATA").write_text(json.dumps({"tree_metadata": [1]}))
    else:
        position = {"the first bit": 0, "a bit": 12345, "the last bit": -1}[kind]
        data = bytearray((array / "1.0.0").read_bytes())
        data[position] ^= 0x80
        (array / "1.0.0").write_bytes(data)


KINDS = ["a missing chunk", "a missing array", "a short chunk", "huge chunks", "another shape", "no names"]
KINDS += ["the first bit", "a bit", "the last bit"]


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_not_read_as_data(tmp_path, converted, capsys, kind):
    shutil.copytree(converted, tmp_path / "orbax")
    damage(tmp_path / "orbax" / "0" / "state", kind)
    named = "_METADATA|tree_metadata|state" if kind == "no names" else LAYERS.removeprefix("model/")
    assert convert(tmp_path / "orbax", tmp_path / "back") == 1
    assert re.search(named, capsys.readouterr().err)
    assert not (tmp_path / "back").exists()
    with pytest.raises(CheckpointError, match=named):
        load_model(open_checkpoint(tmp_path / "orbax"), numerics=FLOAT32)


def test_damage_is_found_by_a_conversion_that_goes_on(tmp_path, converted, monkeypatch, capsys):
    """The parts of a digest that were added before it was killed count, and an array is compared as a whole."""
    shutil.copytree(converted, tmp_path / "orbax")
    damage(tmp_path / "orbax" / "0" / "state", "a bit")
    monkeypatch.setattr(Partial, "mark", functools.partialmethod(stop_after, Partial.mark, 30))
    assert convert(tmp_path / "orbax", tmp_path / "back") == 1 and "internal error" in capsys.readouterr().err
    monkeypatch.undo()
    assert convert(tmp_path / "orbax", tmp_path / "back") == 1
    assert f"{LAYERS.removeprefix('model/')}: the values are not those that were saved" in capsys.readouterr().err


def stop_after(self, mark, count, name, digest):
    mark(self, name, digest)
    if len(self.done) == count:
        raise RuntimeError


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["nowhere", "there"], "nowhere: there is no such directory"),
        (["gs://bucket/model", "there"], "gs://bucket/model: conversions read and write local directories"),
        ([".", "there"], "neither a Hugging Face directory"),
    ],
)
def test_paths_that_hold_nothing_are_refused(tmp_path, monkeypatch, capsys, arguments, named):
    monkeypatch.chdir(tmp_path)
    assert convert(*arguments) == 1
    assert named in capsys.readouterr().err


def test_families_that_are_not_known_are_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "gemma", "vocab_size": 5}')
    assert convert(tmp_path, tmp_path / "there") == 1
    assert "model_type='gemma'" in capsys.readouterr().err


def test_a_full_disk_is_told_beforehand(tmp_path, source, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert convert(source(), tmp_path / "orbax") == 1
    assert "0.0 GB to write, but only 0.0 GB free" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("arguments", [[], ["one"], ["one", "two", "--dtype", "int8"]])
def test_bad_usage(arguments):
    with pytest.raises(SystemExit) as error:
        convert(*arguments)
    assert error.value.code == 2


# Memory --------------------------------------------------------------------------------------------------------------


def test_no_more_than_the_budget_is_in_flight(monkeypatch):
    monkeypatch.setattr(bounds, "BYTES_IN_FLIGHT", 100)
    lock, sizes, seen, now = threading.Lock(), [10, 60, 60, 30, 500, 20, 90, 90, 5, 5, 5] * 5, [], [0]

    def job(size):
        with lock:
            now[0] += size
            seen.append((now[0], size))
        time.sleep(0.001)
        with lock:
            now[0] -= size

    bounds.run_bounded((size, functools.partial(job, size)) for size in sizes)
    assert len(seen) == len(sizes)
    assert all(total <= 100 or total == size for total, size in seen)  # a larger one alone
    assert any(total > size for total, size in seen)  # the others not


def test_the_first_error_ends_the_others():
    def fail():
        raise CheckpointError("this one")

    with pytest.raises(CheckpointError, match="this one"):
        bounds.run_bounded([(1, fail), *((1, lambda: None) for _ in range(50))])


def test_layers_are_chunks_and_large_ones_several():
    assert chunk_shape((36, 4096, 12288), 2, stacked=True) == (1, 4096, 12288)
    assert chunk_shape((36, 128), 2, stacked=True) == (1, 128)
    assert chunk_shape((36, 4096, 12288), 4, stacked=True) == (1, 4096, 8192)
    assert chunk_shape((151936, 4096), 2, stacked=False) == (16384, 4096)
    assert chunk_shape((4096, 151936), 2, stacked=False) == (4096, 16384)
    assert chunk_shape((), 4, stacked=False) == ()
