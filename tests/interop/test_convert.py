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

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from stepjax.cli import main
from stepjax.config import NumericsConfig
from stepjax.errors import CheckpointError
from stepjax.interop import bounded
from stepjax.interop.load import load_model, open_checkpoint
from stepjax.interop.orbax_arrays import chunk_shape
from stepjax.interop.partial import Partial
from stepjax.training.checkpoint import restore_model

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
        directory.mkdir()
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


def test_orbax_itself_restores_what_is_written(tmp_path, source, tiny_vl):
    convert(source(), tmp_path / "orbax")
    spec = open_checkpoint(tmp_path / "orbax").spec
    restored = restore_model(tmp_path / "orbax", spec.abstract(FLOAT32))
    for ours, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(tiny_vl[0]), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_resaved_keys_come_back_in_the_layout_on_disk(tmp_path, source, public):
    directory = source({resaved(key): value for key, value in public.items()})
    convert(directory, tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "back")
    back = all_tensors(tmp_path / "back")
    assert {key: bits(value) for key, value in back.items()} == {key: bits(value) for key, value in public.items()}
    assert not (tmp_path / "back" / "model.safetensors.index.json").exists()  # one file, and not the source's two
    assert (tmp_path / "back" / "merges.txt").read_text() == SIDE_FILES["merges.txt"]


@pytest.mark.parametrize("where", ["there", "back"])
def test_types_are_cast_on_request(tmp_path, source, public, where):
    there, back = (["--dtype", "bfloat16"], []) if where == "there" else ([], ["--dtype", "bfloat16"])
    convert(source(), tmp_path / "orbax", *there)
    convert(tmp_path / "orbax", tmp_path / "back", *back)
    tensors = all_tensors(tmp_path / "back")
    assert tensors.keys() == public.keys()
    for key, value in tensors.items():
        assert bits(value) == bits(public[key].astype(ml_dtypes.bfloat16)), key


def test_mixed_types_are_kept(tmp_path, source, public):
    mixed = {key: value.astype(np.float32 if "norm" in key else ml_dtypes.bfloat16) for key, value in public.items()}
    directory = source(mixed)
    convert(directory, tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "back")
    assert all_files(tmp_path / "back") == all_files(directory)


@pytest.mark.parametrize("when", ["there", "back"])
def test_the_decoder_alone(tmp_path, source, public, when):
    there, back = (["--part", "decoder"], []) if when == "there" else ([], ["--part", "decoder"])
    convert(source(), tmp_path / "orbax", *there)
    convert(tmp_path / "orbax", tmp_path / "text", *back)
    tensors = all_tensors(tmp_path / "text")
    assert tensors.keys() == {key for key in public if key.startswith(("model.", "lm_head."))}
    assert all(bits(value) == bits(public[key]) for key, value in tensors.items())
    config = json.loads((tmp_path / "text" / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["Qwen3ForCausalLM"], "qwen3")
    assert (tmp_path / "text" / "merges.txt").exists()
    assert not (tmp_path / "text" / "modeling_step_vl.py").exists()  # of the whole model
    assert open_checkpoint(tmp_path / "text").spec.is_text


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
def mark_and_die(self, name):
    mark(self, name)
    if len(self.done) == count:
        os.kill(os.getpid(), signal.SIGKILL)
Partial.mark = mark_and_die
from stepjax.cli import main
sys.exit(main(["convert", *sys.argv[2:]]))
"""


@pytest.mark.parametrize("direction", ["there", "back"])
def test_a_killed_conversion_leaves_nothing_finished_and_goes_on(tmp_path, source, direction, monkeypatch, capsys):
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
    before = {json.loads(line) for line in journal.read_text().splitlines()[1:]}
    assert len(before) >= 20
    with journal.open("a") as file:
        file.write('"half a li')  # as of a line that was being written

    done = []
    mark = Partial.mark
    monkeypatch.setattr(Partial, "mark", lambda self, name: (done.append(name), mark(self, name)))
    assert convert(start, end) == 0
    assert "going on after" in capsys.readouterr().err
    assert done and not before & set(done)
    if direction == "there":
        convert(end, tmp_path / "back")
    assert all_files(tmp_path / "back") == all_files(directory)


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


def test_a_destination_is_replaced_on_request_only(tmp_path, source, capsys):
    directory = source()
    (tmp_path / "orbax").mkdir()
    (tmp_path / "orbax" / "precious").touch()
    assert convert(directory, tmp_path / "orbax") == 1
    assert "orbax is there already" in capsys.readouterr().err
    assert (tmp_path / "orbax" / "precious").exists()
    assert convert(directory, tmp_path / "orbax", "--overwrite") == 0
    assert not (tmp_path / "orbax" / "precious").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["orbax", "source"]


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
    assert "names files that are not there: model-00002.safetensors" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named(tmp_path, source, capsys):
    convert(source(), tmp_path / "orbax")
    state = tmp_path / "orbax" / "0" / "state"
    shutil.rmtree(state / "model" / "projector" / "kernel")
    assert convert(tmp_path / "orbax", tmp_path / "back") == 1
    assert "model/projector/kernel is missing or damaged" in capsys.readouterr().err


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
    assert "0.0 GB are to be written and 0.0 GB are free" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_bad_usage(capsys):
    assert convert() == 2
    assert convert("one") == 2
    assert convert("one", "two", "--dtype", "int8") == 2


# Memory --------------------------------------------------------------------------------------------------------------


def test_no_more_than_the_budget_is_in_flight(monkeypatch):
    monkeypatch.setattr(bounded, "BYTES_IN_FLIGHT", 100)
    lock, sizes, seen, now = threading.Lock(), [10, 60, 60, 30, 500, 20, 90, 90, 5, 5, 5] * 5, [], [0]

    def job(size):
        with lock:
            now[0] += size
            seen.append((now[0], size))
        time.sleep(0.001)
        with lock:
            now[0] -= size

    bounded.run_bounded((size, functools.partial(job, size)) for size in sizes)
    assert len(seen) == len(sizes)
    assert all(total <= 100 or total == size for total, size in seen)  # a larger one alone
    assert any(total > size for total, size in seen)  # the others not


def test_the_first_error_ends_the_others():
    def fail():
        raise CheckpointError("this one")

    with pytest.raises(CheckpointError, match="this one"):
        bounded.run_bounded([(1, fail), *((1, lambda: None) for _ in range(50))])


def test_layers_are_chunks_and_large_ones_several():
    assert chunk_shape((36, 4096, 12288), 2, stacked=True) == (1, 4096, 12288)
    assert chunk_shape((36, 128), 2, stacked=True) == (1, 128)
    assert chunk_shape((36, 4096, 12288), 4, stacked=True) == (1, 4096, 8192)
    assert chunk_shape((151936, 4096), 2, stacked=False) == (16384, 4096)
    assert chunk_shape((4096, 151936), 2, stacked=False) == (4096, 16384)
    assert chunk_shape((), 4, stacked=False) == ()


def test_the_loaded_model_is_the_same_from_either_format(tmp_path, source, tiny_vl):
    directory = source()
    convert(directory, tmp_path / "orbax")
    for path in (directory, tmp_path / "orbax"):
        model = load_model(open_checkpoint(path), numerics=FLOAT32)
        for ours, expected in zip(jax.tree.leaves(model), jax.tree.leaves(tiny_vl[0]), strict=True):
            np.testing.assert_array_equal(ours, expected)
