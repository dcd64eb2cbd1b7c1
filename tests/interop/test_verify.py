"""`stepjax convert verify` tells a model that is the recorded one from one that is not."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from stepjax.cli import main

GOLDEN = Path(__file__).parents[1] / "data" / "tiny_vl_golden.safetensors"


def verify(directory, golden, *options):
    return main(["convert", "verify", str(directory), "--golden", str(golden), *options])


def test_every_recorded_tensor_is_compared(tiny_dir, capsys):
    assert verify(tiny_dir, GOLDEN, "--tolerance", "5e-5") == 0
    table = capsys.readouterr().out
    for name in ("trunk_global", "trunk_crop", "features_global", "features_crop", "logits", "text_logits"):
        assert f"\n{name} " in table
    assert "0 tokens" in table and "not compared" not in table


@pytest.fixture
def changed(tmp_path, tiny_dir):
    """The tiny checkpoint with one value of the last norm changed."""
    tensors = load_file(tiny_dir / "model.safetensors")
    tensors["model.norm.weight"][3] += 0.01
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((tiny_dir / "config.json").read_text())
    return tmp_path


def test_a_change_is_found_where_it_is(changed, tmp_path, capsys):
    recorded = load_file(GOLDEN)
    names = ("pixel_values", "trunk_global", "text_ids", "text_logits")
    golden = tmp_path / "golden"
    save_file({name: recorded[name] for name in names}, golden)
    assert verify(changed, golden) == 1
    output = capsys.readouterr()
    assert "differs in text_logits (--tolerance 0.001)" in output.err
    assert "above the tolerance" in output.out


def test_a_text_model_is_compared_by_its_text(tiny_dir, tmp_path, capsys):
    main(["convert", str(tiny_dir), str(tmp_path / "orbax"), "--part", "decoder"])
    assert verify(tmp_path / "orbax", GOLDEN, "--tolerance", "5e-5") == 0
    output = capsys.readouterr().out
    assert "text_logits" in output and "not compared: features_crop" in output


def test_files_that_cannot_be_compared_are_refused(tiny_dir, tmp_path, capsys):
    assert verify(tiny_dir, tmp_path / "nothing") == 1
    assert "cannot be read as safetensors" in capsys.readouterr().err
    recorded = load_file(GOLDEN)
    save_file({"something": np.zeros(3)}, tmp_path / "other.safetensors")
    assert verify(tiny_dir, tmp_path / "other.safetensors") == 1
    assert "has nothing to compare" in capsys.readouterr().err
    save_file({"text_logits": recorded["text_logits"]}, tmp_path / "other.safetensors")
    assert verify(tiny_dir, tmp_path / "other.safetensors") == 1
    assert "text_logits needs text_ids" in capsys.readouterr().err
    save_file(
        {"text_logits": recorded["text_logits"][:, :3], "text_ids": recorded["text_ids"]}, tmp_path / "o.safetensors"
    )
    assert verify(tiny_dir, tmp_path / "o.safetensors") == 1
    assert "is recorded as (1, 3, 320), but the model computes (1, 24, 320)" in capsys.readouterr().err


def test_the_image_token_comes_from_the_configuration(tiny_dir, tmp_path, capsys):
    config = json.loads((tiny_dir / "config.json").read_text()) | {"image_token_id": 5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((tiny_dir / "model.safetensors").read_bytes())
    assert verify(tmp_path, GOLDEN) == 1
    assert "image tokens (id 5), but the views have 30 features" in capsys.readouterr().err
