"""An exported directory in PyTorch, where nothing of ours is installed: the same pixels, tokens, logits and answers.

Legend: B rows, T tokens.
"""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_checkpoint import write_tiny_checkpoint

import stepjax
from stepjax.cli import main
from stepjax.config import ImageConfig, ModelConfig, NumericsConfig, TokenizerConfig
from stepjax.config_file import load_recipe
from stepjax.interop import export_files
from stepjax.interop.hf_match import places
from stepjax.interop.load import open_checkpoint
from stepjax.interop.model_spec import ModelSpec, spec_from_hf
from stepjax.models.step_vl import NO_FEATURE, abstract_model
from stepjax.training.checkpoint import Checkpointer

pytest.importorskip("torch")

FLOAT32 = NumericsConfig(compute_dtype="float32", remat="none")
DATA = Path(__file__).parent.parent / "data"
DEMO = load_recipe(Path(__file__).parent.parent.parent / "configs" / "digits" / "pretrain.py")
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def unlike_the_public(recipe):
    """A recipe with every field that differs from the public checkpoint's, and that the PyTorch files must honour."""
    decoder = dataclasses.replace(
        recipe.model.decoder,
        qk_norm=False,
        tie_embeddings=True,
        rope_theta=500.0,
        norm_eps=1e-3,
        yarn_factor=2.0,
        yarn_trained_positions=1024,
        yarn_attention_factor=1.2,
    )
    vision = dataclasses.replace(recipe.model.vision, mlp_dim=191, rope_theta=77.0, norm_eps=1e-2)
    images = dataclasses.replace(
        recipe.images,
        small_is_inclusive=False,
        max_crops=None,
        mean=(0.5, 0.4, 0.3),
        small_aspect=1.2,
        elongated_aspect=3.0,
        round_up_fraction=0.6,
    )
    model = dataclasses.replace(recipe.model, vision=vision, decoder=decoder, projector_bias=True)
    return dataclasses.replace(recipe, model=model, images=images)


PUBLIC = ModelSpec(ModelConfig(), ImageConfig())
RECIPES = {"demo": DEMO, "unlike": unlike_the_public(DEMO)}


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Conversations, with images of every kind of layout and mode."""
    directory = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)

    def image(name, height, width, *channels, dtype=np.uint8, **options):
        pixels = rng.integers(0, np.iinfo(dtype).max, (height, width, *channels), dtype)
        Image.fromarray(pixels).save(directory / name, **options)
        return {"type": "image", "image": str(directory / name)}

    exif = Image.Exif()
    exif[0x0112] = 6
    text = [{"type": "text", "text": text} for text in ("Transcribe the digits.", "What changed?", "naïve 1 < 2\n\n3")]
    wide, tall = image("wide.png", 60, 300, 3), image("tall.png", 200, 30, 3)
    thin, turned = image("thin.png", 5, 30, 4), image("turned.jpg", 50, 90, 3, exif=exif)
    exact, deep = image("exact.png", 80, 80, 3), image("deep.png", 50, 64, dtype=np.uint16)
    large = image("large.png", 400, 700, 3)
    call = {"name": "add", "arguments": {"a": 1, "b": [2, "x"]}}
    return [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [exact, text[0], thin, turned]},
                {"role": "assistant", "content": "<think>\nlook\n</think>\n12"},
                {"role": "user", "content": [text[1], tall, deep]},
            ],
            "options": {},
        },
        {"messages": [{"role": "user", "content": [wide, text[0]]}], "options": {}},
        {"messages": [{"role": "user", "content": "1 + 1?"}], "options": {}},
        {"messages": [{"role": "user", "content": [large, text[2]]}], "options": {"enable_thinking": False}},
        {
            "messages": [
                {"role": "user", "content": "and 2 + 2?"},
                {"role": "assistant", "content": "", "reasoning_content": "sum", "tool_calls": [{"function": call}]},
                {"role": "tool", "content": "4"},
                {"role": "tool", "content": [text[2]]},
            ],
            "options": {"tools": [TOOL], "enable_thinking": True},
        },
    ]


@pytest.fixture(scope="module")
def directories(tmp_path_factory, randomized):
    """Exported runs, and the tiny checkpoint with the files that an export writes."""
    top = tmp_path_factory.mktemp("exported")
    for name, recipe in RECIPES.items():
        model = randomized(abstract_model(recipe.model, recipe.numerics), spread=0.2)
        with Checkpointer(top / "runs" / name / "checkpoints", keep=1, config=recipe) as checkpointer:
            checkpointer.save(1, {"model": model}, {}, wait=True)
        assert main(["convert", str(top / "runs" / name), str(top / name)]) == 0
    golden = write_tiny_checkpoint(top / "golden")
    token = json.loads((golden / "config.json").read_text())["image_token_id"]
    export_files.make(golden, open_checkpoint(golden).spec, TokenizerConfig(path="demo"), "float32", None)
    assert json.loads((golden / "config.json").read_text())["image_token_id"] == token
    shutil.copytree(DATA / "tiny_vl", top / "recorded")  # its config.json has less in it than ours
    for file in (top / "demo").glob("*.py"):
        shutil.copy(file, top / "recorded")
    fields = json.loads((top / "recorded" / "config.json").read_text())
    auto_map = json.loads((top / "demo" / "config.json").read_text())["auto_map"]
    export_files.write_config(top / "recorded", fields | {"auto_map": auto_map})
    (top / "public").mkdir()
    export_files.make(top / "public", PUBLIC, TokenizerConfig(path="demo"), "bfloat16", None)
    return top


@pytest.fixture(scope="module")
def theirs(directories, chats, golden, tmp_path_factory):
    """The arrays that a process without stepjax makes of the directories."""
    work = tmp_path_factory.mktemp("alone")
    inputs = ("input_ids", "pixel_values", "patch_pixel_values", "num_patches")
    np.savez(work / "recorded.npz", **{key: golden[key] for key in inputs})
    names = {"demo": chats, "unlike": chats[:1], "golden": chats[:1]}
    jobs = [{"kind": "chats", "name": name, "chats": asked} for name, asked in names.items()]
    jobs += [{"kind": "recorded", "name": "recorded", "recorded": str(work / "recorded.npz")}]
    jobs += [{"kind": "shapes", "name": "public"}]
    for job in jobs:
        job["directory"] = str(directories / job["name"])
    for job in (jobs[0], jobs[-1]):
        job["again"] = str(directories / "again" / job["name"])
    (work / "jobs.json").write_text(json.dumps(jobs))
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_", "JAX_"))}
    subprocess.run(
        [sys.executable, "-I", Path(__file__).parent / "stands_alone.py", work / "jobs.json", work / "results.npz"],
        env=environment | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "home")},
        cwd=work,
        check=True,
    )
    return dict(np.load(work / "results.npz"))


@pytest.fixture(scope="module")
def ours(directories):
    where = {"demo": "runs/demo", "unlike": "runs/unlike", "golden": "golden"}
    return {name: stepjax.load(directories / path, numerics=FLOAT32) for name, path in where.items()}


CASES = [*(("demo", i) for i in range(5)), ("unlike", 0), ("golden", 0)]


@pytest.mark.parametrize("name, i", CASES)
def test_pixels_tokens_logits_and_answers(ours, theirs, chats, name, i):
    model, processor = ours[name]
    example = processor.process_prompt(chats[i]["messages"], **chats[i]["options"])
    length = len(example.tokens)
    assert theirs[f"{name}/{i}/input_ids"].tolist() == [example.tokens.tolist()]
    for key, views in {"pixel_values": example.global_views, "patch_pixel_values": example.crops}.items():
        assert (f"{name}/{i}/{key}" in theirs) == bool(len(views))
        if len(views):
            found = theirs[f"{name}/{i}/{key}"]
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found.transpose(0, 2, 3, 1), views)

    answer_T = theirs[f"{name}/{i}/generated"][0]
    assert theirs[f"{name}/{i}/without_cache"][0, length:].tolist() == answer_T.tolist()
    hidden_BTD = model(
        tokens_BT=np.concatenate([example.tokens, answer_T])[None],
        positions_BT=np.arange(length + len(answer_T))[None],
        feature_index_BT=np.pad(example.feature_index, (0, len(answer_T)), constant_values=NO_FEATURE)[None],
        global_views_BGHWC=example.global_views[None],
        crops_BCHWC=example.crops[None],
    )
    logits_TV = np.asarray(model.decoder.logits(hidden_BTD))[0]
    assert np.abs(logits_TV).max() > 1
    np.testing.assert_allclose(theirs[f"{name}/{i}/logits"][0], logits_TV[:length], rtol=0, atol=1e-4)
    assert answer_T.tolist() == logits_TV[length - 1 : -1].argmax(-1).tolist()  # every token is our likeliest
    assert str(theirs[f"{name}/{i}/text"]) == processor.decode(answer_T)


def ended(tokens, stop_ids):
    """Tokens up to the first that ends them, behind which a batch is padded."""
    ends = [place for place, token in enumerate(tokens) if token in stop_ids]
    return tokens[: ends[0] + 1] if ends else tokens


@pytest.mark.parametrize("kind", ["generated", "beams"])
def test_rows_of_a_padded_batch_are_what_they_are_alone(theirs, ours, kind):
    stop_ids = ours["demo"][1].stop_ids
    rows = theirs[f"demo/batch/{kind}"].tolist()
    assert len(rows) == 3
    for i, row in enumerate(rows):
        assert ended(row, stop_ids) == ended(theirs[f"demo/{i}/{kind}"][0].tolist(), stop_ids)


def test_the_recorded_model_in_pytorch(theirs, golden):
    np.testing.assert_allclose(theirs["recorded/logits"], golden["logits"], rtol=0, atol=1e-4)
    assert theirs["recorded/generated"][0].tolist() == golden["greedy_tokens"].tolist()


def test_the_public_sizes(directories, theirs):
    """The 10B model by its shapes and `config.json`, whose fields are the defaults of classes and must stay written."""
    shapes = {key.removeprefix("public/"): tuple(value) for key, value in theirs.items() if key.startswith("public/")}
    assert shapes == {place.key: place.shape for place in places(PUBLIC.tensors(), PUBLIC.shapes())}
    assert sum(math.prod(shape) for shape in shapes.values()) == 10_171_750_144
    for directory in (directories / "public", directories / "again" / "public"):
        assert spec_from_hf(json.loads((directory / "config.json").read_text())) == PUBLIC


def test_what_pytorch_saves_is_read(directories, theirs, tmp_path):
    assert theirs["demo/again/generated"].tolist() == theirs["demo/0/generated"].tolist()
    again = directories / "again" / "demo"
    assert len(list(again.glob("*.safetensors"))) > 1
    config = json.loads((again / "config.json").read_text())
    assert config["architectures"] == ["StepVLForConditionalGeneration"]  # as servers know it
    assert main(["convert", str(again), str(tmp_path / "orbax")]) == 0
    model, processor = stepjax.load(tmp_path / "orbax", numerics=FLOAT32)
    before, processor_before = stepjax.load(directories / "demo", numerics=FLOAT32)
    assert (model.config, processor.image_config) == (before.config, processor_before.image_config)
    for one, other in zip(jax.tree.leaves(model), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(one, other)
