"""A codec from training to its two ends: the ordinary loop trains it, a device encodes, a server decodes and answers.

Legend: B rows, F features of a row, D decoder width, M views, S side of a view, Z channels of a coded feature.
"""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image
from run_files import read_metrics, without_speed
from safetensors.numpy import load_file
from tiny_tofc import STEPS
from tiny_tofc import config as TINY

from stepjax.cli import main
from stepjax.config import DigitsSource, InitConfig, LoraConfig, MeshConfig, ModelConfig, TofcConfig
from stepjax.config_file import from_json, override, to_json
from stepjax.data.mixture import Sample
from stepjax.data.packing import RowBudget, pack_batch
from stepjax.data.records import open_source
from stepjax.errors import CheckpointError, ConfigError, CorruptStreamError
from stepjax.evaluation.coded import estimated_bits
from stepjax.interop.codec_files import load_codec, write_codec
from stepjax.interop.init_from import initial_model
from stepjax.interop.load import load_run
from stepjax.interop.orbax_directory import OrbaxDirectory
from stepjax.models.step_vl import init_model
from stepjax.processing.image_files import open_image
from stepjax.processing.images import make_views
from stepjax.processing.processor import Processor
from stepjax.serving.command import _codec
from stepjax.sharding import make_mesh, named_leaves, shardings
from stepjax.tofc import codec
from stepjax.tofc.codec import Limits, decode_image
from stepjax.tofc.device import Device
from stepjax.tofc.tables import Tables
from stepjax.training.loop import pretrain
from stepjax.training.step import calibrated, forward, make_train_step, new_state

pytest_plugins = ("tiny_run",)

RECIPE = Path(__file__).parent.parent / "tiny_tofc.py"


def arrays(tree) -> dict[str, np.ndarray]:
    return {name: np.asarray(jax.tree.leaves(leaf)[0]) for name, leaf in named_leaves(tree).items()}


def coded(**changes):
    """The tiny configuration with another codec."""
    tofc = dataclasses.replace(TINY.model.tofc, **changes)
    return dataclasses.replace(TINY, model=dataclasses.replace(TINY.model, tofc=tofc))


@pytest.fixture(scope="module")
def batches():
    """A function from a configuration to four rows of one or two examples, one row without images."""
    records = [open_source(DigitsSource(name="a", weight=1, task=task), 0) for task in ("transcribe", "arithmetic")]
    plan = [[(0, 0), (1, 0)], [(0, 1)], [(1, 1), (1, 2)], [(0, 2), (0, 3)]]

    def of(config):
        processor = Processor.from_config(config.images, config.tokenizer)
        rows = [[Sample(processor.process(records[kind][i]), kind) for kind, i in row] for row in plan]
        return jax.tree.map(jnp.asarray, dict(pack_batch(rows, RowBudget.of(TINY.batch, config.images))))

    return of


# The configuration ---------------------------------------------------------------------------------------------------


def test_the_tokens_of_views_follow_the_clusters():
    """Through JSON and the command line, too; a view that has fewer features keeps them."""
    images = TINY.images
    assert (images.global_tokens, images.crop_tokens) == (4, 2)
    assert from_json(json.loads(json.dumps(to_json(TINY)))) == TINY
    other = override(TINY, ["--model.tofc.global-clusters", "99", "--images.max-side", "90"], prog="x").images
    assert (other.global_tokens, other.crop_tokens, other.max_side) == (9, 2, 90)
    plain = dataclasses.replace(TINY, model=dataclasses.replace(TINY.model, tofc=None)).images
    assert (plain.global_tokens, plain.crop_tokens) == (9, 4)


def test_codecs_that_do_not_fit_their_run_are_refused():
    with pytest.raises(ConfigError, match=r"model.tofc.width=6144: must be 4 x model.vision.width = 64"):
        ModelConfig(vision=TINY.model.vision, tofc=TofcConfig())
    with pytest.raises(ConfigError, match="do not train the codec"):
        dataclasses.replace(TINY, lora=LoraConfig(rank=2))
    one_size = dataclasses.replace(TINY.images, crop_size=TINY.images.global_size)
    with pytest.raises(ConfigError, match=r"crop_clusters=2: must equal global_clusters"):
        dataclasses.replace(TINY, images=one_size)


# The model and its loss ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bottleneck", [None, 64], ids=str)
def test_a_codec_that_loses_nothing_changes_nothing(batches, bottleneck):
    """All features kept, in steps of a thousandth; the bottleneck's basis is complete."""
    config = coded(bottleneck=bottleneck, global_clusters=9, crop_clusters=4, experts=1, initial_step=1e-3)
    batch = batches(config)
    model = init_model(config.model, config.numerics, seed=1)
    state = new_state(model, optax.sgd(1.0))
    state, count = jax.jit(lambda state, batch: calibrated(state, batch, config=config))(state, batch)
    assert count == np.sum(batch["feature_index_BT"] >= 0)
    plain = init_model(dataclasses.replace(config.model, tofc=None), config.numerics, seed=1)
    run = jax.jit(lambda model, batch: forward(model, batch)[0])
    found_BTD, expected_BTD = run(state.model, batch), run(plain, batch)
    is_real = np.asarray(batch["segment_ids_BT"]) > 0
    np.testing.assert_allclose(found_BTD[is_real], expected_BTD[is_real], atol=5e-3)
    assert np.abs(np.asarray(expected_BTD)[is_real]).max() > 1


def test_the_gradient_does_not_depend_on_micro_batches_or_devices(batches):
    """Rows differ in their features and tokens, and one has no image."""
    config = coded(rate_weight=3.0, balance_weight=3.0, experts=3, temperature=0.5)
    batch, found = batches(config), {}
    model = init_model(config.model, config.numerics, seed=1)
    optimizer = optax.sgd(1.0)
    for accumulation, devices in ((1, 1), (2, 2)):
        rows = dataclasses.replace(config.batch, rows=4, accumulation=accumulation)
        step = make_train_step(dataclasses.replace(config, batch=rows), optimizer, optax.constant_schedule(1.0))
        mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
        with jax.set_mesh(mesh):
            state = new_state(model, optimizer)
            state = jax.device_put(state, shardings(state, mesh))
            state, metrics = jax.jit(step)(state, batch)
        found[accumulation, devices] = arrays(state.model), float(metrics["bits_per_value"]), float(metrics["balance"])
    old, (expected, bits, balance) = arrays(model), found.pop((1, 1))
    assert 0.1 < bits < 20 and 1e-4 < balance < 1
    for trained, *metrics in found.values():
        np.testing.assert_allclose(metrics, (bits, balance), rtol=1e-4)
        for name, array in expected.items():
            scale = np.abs(array - old[name]).max()
            np.testing.assert_allclose(trained[name], array, rtol=0, atol=2e-4 * scale + 1e-6, err_msg=name)
    assert {name for name in old if (old[name] == expected[name]).all()} == {
        "tofc/hyperprior/offset",
        "tofc/hyperprior/spread",
    }


def test_training_lowers_the_rate_and_resumes_to_the_same_codec(run, tmp_path, quick_runs):
    rows = read_metrics(run)
    assert rows[-1]["bits_per_value"] < 0.8 * rows[0]["bits_per_value"]
    config = OrbaxDirectory(run).run
    directory = tmp_path / config.name
    shutil.copytree(run, directory)
    for step in (8, STEPS):
        shutil.rmtree(directory / "checkpoints" / str(step))
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    (directory / "metrics.jsonl").write_text("\n".join(lines[:4]) + "\n")
    shutil.rmtree(directory / "tofc")
    resumed = dataclasses.replace(config, out=str(tmp_path))
    write_codec(pretrain(resumed).model, resumed)
    assert [*map(without_speed, read_metrics(directory))] == [*map(without_speed, rows)]
    assert load_codec(OrbaxDirectory(directory)).sha256 == load_codec(OrbaxDirectory(run)).sha256


def test_a_run_may_start_from_anothers_codec(run, tmp_path):
    config = dataclasses.replace(TINY, init_from=InitConfig(path=str(run)), seed=5)
    model, starts = initial_model(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    assert [start.part for start in starts if start.stored] == ["vision", "projector", "decoder", "tofc"]
    expected = arrays(load_run(run)[0])
    for name, array in arrays(model).items():
        np.testing.assert_array_equal(array, expected[name])


# Both ends -----------------------------------------------------------------------------------------------------------


def test_real_bytes_are_those_that_training_estimates(run):
    """Of all features of 120 pictures in one tile: every tile costs some bytes more, and the coder's lanes 0.6 %."""
    device = Device(run)
    records = open_source(DigitsSource(name="a", weight=1, task="transcribe", split="held_out"), 0)
    contents = [records[i]["messages"][0]["content"] for i in range(120)]
    images = [item["image"] for content in contents for item in content if item["type"] == "image"]
    x_NZ = np.concatenate([tile for image in images for tile in device.features(open_image(image, name="a"))[0]])
    size = len(codec.encode(device.tables, [x_NZ]))
    estimate = estimated_bits(load_run(run)[0], x_NZ) / 8
    assert 2000 < estimate and abs(size / estimate - 1) < 0.01


def test_the_device_computes_what_the_model_does(run, pictures):
    model, _, config = load_run(run)
    device, merged = Device(run), jax.jit(lambda model, views_MHWC: model.merged_views(views_MHWC))
    assert dataclasses.replace(device.images) == dataclasses.replace(config.images)
    for name in ("large", "small"):
        image = open_image(str(pictures / f"{name}.png"), name=name)
        views = make_views(image, config.images)
        tiles, columns = device.features(image)
        expected = [*merged(model, views.crops_NHWC)] if len(views.crops_NHWC) else []
        expected += [*merged(model, views.global_view_HWC[None])]
        assert columns == views.plan.columns == (3 if name == "large" else 0)
        for tile, features in zip(tiles, expected, strict=True):
            np.testing.assert_allclose(tile, features, rtol=1e-4, atol=1e-4)


def test_encoded_and_decoded_images_have_the_answers_of_their_pixels(run, pictures, tmp_path, capsys):
    images = [str(pictures / "large.png"), str(pictures / "small.png")]
    assert main(["tofc", "encode", str(run), *images, "--out", str(tmp_path)]) == 0
    frames = [tmp_path / "large.tofc", tmp_path / "small.tofc"]
    said = capsys.readouterr().out
    for image, frame in zip(images, frames, strict=True):
        assert f"{Path(image).stat().st_size:,} bytes as a file, {frame.stat().st_size:,} coded in" in said
    ask = ["--prompt", "What?", "--max-tokens", "6"]
    features = ["--out", str(tmp_path / "features.npz")]
    assert main(["tofc", "decode", str(run), *map(str, frames), *ask, *features]) == 0
    captured = capsys.readouterr()
    assert "6 crops and a global view" in captured.err and "0 crops and a global view" in captured.err
    with np.load(tmp_path / "features.npz") as found:
        assert found["large/columns"] == 3 and found["small/tile_0"].shape == (4, 24)
        tile = codec.decode(Device(run).tables, frames[0].read_bytes())[6]
        np.testing.assert_array_equal(found["large/tile_6"], tile)
    assert main(["generate", str(run), "--image", images[0], "--image", images[1], *ask]) == 0
    assert capsys.readouterr().out == captured.out and captured.out.strip()


def test_evaluation_counts_real_bytes(run, tmp_path, capsys):
    copy = tmp_path / "tiny_tofc"
    shutil.copytree(run, copy)
    lines = [
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}, {"role": "assistant"}]},
        {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant"}]},
    ]
    for line in lines:
        line["messages"][1]["content"] = "2"
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pixels = np.random.default_rng(1).integers(0, 255, (40, 100, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert main(["tofc", "evaluate", str(copy), "--data", str(tmp_path / "data.jsonl")]) == 0
    written = json.loads((copy / "tofc_evaluation.json").read_text())
    frame = Device(run).encode(open_image(str(tmp_path / "a.png"), name="a")).frame
    assert (written["pictures"], written["bytes"], written["bytes_95"]) == (1, len(frame), len(frame))
    assert written["estimate"] < written["payload"] < written["bytes"]
    assert written["codec"] == Device(run).tables.sha256 and written["results"][0]["total"] == 2
    said = capsys.readouterr().out
    assert "1 pictures:" in said and "training estimates" in said


# Refusals ------------------------------------------------------------------------------------------------------------


def test_frames_that_cannot_be_read_are_refused(run, pictures, tmp_path, capsys):
    frame = Device(run).encode(open_image(str(pictures / "large.png"), name="large")).frame
    other = bytearray(frame)
    other[1] ^= 1
    for data, words in (
        (frame[:-3], "its header says otherwise; send it again"),
        (frame[:3], "does not begin as one"),
        (b"\x89PNG" + frame, "does not begin as one"),
        (frame[:40] + bytes([frame[40] ^ 4]) + frame[41:], "checksums do not match; send them again"),
        (bytes(1 << 20) + frame, "the limit is 1048576"),
        (b"", "frame of 0 bytes"),
    ):
        (tmp_path / "x.tofc").write_bytes(data)
        assert main(["tofc", "decode", str(run), str(tmp_path / "x.tofc")]) == 1
        [*_, line] = capsys.readouterr().err.splitlines()
        assert line.startswith("stepjax tofc decode: ") and words in line
    assert main(["tofc", "decode", str(run), str(tmp_path / "none.tofc")]) == 1
    assert "none.tofc cannot be read or written" in capsys.readouterr().err


def test_frames_of_no_image_are_refused(run):
    tables, images = Device(run).tables, TINY.images
    crop, view = np.zeros((2, 24), np.float32), np.zeros((4, 24), np.float32)
    good = decode_image(tables, codec.encode(tables, [crop, crop, crop, crop, view], columns=2), images)
    assert (good.plan.columns, good.plan.rows, good.crops_NQZ.shape) == (2, 2, (4, 2, 24))
    for tiles, columns in (
        ([crop, crop, crop, view], 2),
        ([crop, view], 0),
        ([view], 1),
        ([crop, crop], 1),
        ([view, view], 1),
        ([crop] * 3 + [view], 4),
    ):
        with pytest.raises(CorruptStreamError, match="this model's crops have 2 and global views 4"):
            decode_image(tables, codec.encode(tables, tiles, columns=columns), images)
    few = dataclasses.replace(TINY, images=dataclasses.replace(images, max_crops=1)).images
    with pytest.raises(CorruptStreamError, match="over images.max_crops=1"):
        decode_image(tables, codec.encode(tables, [crop, crop, view], columns=2), few)


def test_images_and_streams_mix_in_a_prompt(run, pictures):
    """The views of each are where those of an image file would be."""
    _, processor, config = load_run(run)
    device = Device(run)

    def open_one(path, **options):
        image = open_image(path, **options)
        small = "small" in path
        return decode_image(device.tables, device.encode(image).frame, config.images) if small else image

    for names in (("small", "large"), ("large", "small")):
        content = [{"type": "image", "image": str(pictures / f"{name}.png")} for name in names]
        messages = [{"role": "user", "content": content}]
        mixed, files = (processor.process_prompt(messages, open_image=each) for each in (open_one, open_image))
        np.testing.assert_array_equal(mixed.tokens, files.tokens)
        np.testing.assert_array_equal(mixed.feature_index, files.feature_index)
        own = names.index("large")
        np.testing.assert_array_equal(mixed.global_views[own], files.global_views[own])
        assert mixed.global_views[1 - own].ndim == 2 and len(mixed.crops) == len(files.crops)
        pixels = [view for view in mixed.crops if view.ndim == 3]
        np.testing.assert_array_equal(pixels, files.crops[-len(pixels) :] if own else files.crops[: len(pixels)])


def test_runs_that_cannot_be_used_are_refused(run, finished_run, tmp_path, capsys):
    def answer(*arguments):
        assert main([*arguments]) == 1
        return capsys.readouterr().err.splitlines()[-1]

    plain, frame = str(finished_run.directory), str(tmp_path / "x.tofc")
    assert "has no tofc/codec.safetensors: `stepjax tofc train` writes it" in answer(
        "tofc", "encode", plain, "a.png", "--out", frame
    )
    assert "has no codec: train one with `stepjax tofc train`" in answer("tofc", "evaluate", plain)
    assert "run `stepjax tofc train" in answer("sft", str(RECIPE))
    assert "has no codec to train" in answer("tofc", "train", str(RECIPE.with_name("tiny_sft.py")))
    assert "which the public layout has no place for" in answer("convert", str(run), str(tmp_path / "hf"))
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / str(STEPS))
    with pytest.raises(CheckpointError, match=r"is not that of .*/checkpoints/8"):
        load_codec(OrbaxDirectory(copy))
    tensors = load_file(copy / "tofc/device.safetensors")
    data = (copy / "tofc/device.safetensors").read_bytes()
    (copy / "tofc/device.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="its checksum is not that of its contents"):
        Device(copy)
    (copy / "tofc/device.safetensors").write_bytes((copy / "tofc/codec.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="does not go with codec.safetensors beside it"):
        Device(copy)
    (copy / "tofc/device.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Device(copy)
    assert all(
        name.startswith(("parameter/vision", "parameter/projector/down", "parameter/tofc/down", "program/"))
        for name in tensors
    )


def test_encoding_loads_neither_training_nor_decoder_nor_server(run, pictures, tmp_path):
    """As a device with the packages of `stepjax[device]` alone: its copy of the run has no checkpoint either."""
    shutil.copytree(run / "tofc", tmp_path / "tofc")
    heavy = ("flax", "optax", "orbax", "grain", "tensorstore", "tokenizers", "jinja2", "sklearn", "openai", "pydantic")
    rooms = ("models", "interop", "inference.engine", "training.loop", "training.checkpoint", "serving", "data")
    program = (
        "import sys; from stepjax.cli import main; assert main(sys.argv[1:]) == 0\n"
        f"heavy = {heavy!r} + {tuple(f'stepjax.{room}' for room in rooms)!r}\n"
        "found = [name for name in heavy if name in sys.modules]; assert not found, found"
    )
    arguments = ["tofc", "encode", str(tmp_path / "tofc"), str(pictures / "small.png"), "--out", str(tmp_path / "x")]
    subprocess.run([sys.executable, "-c", program, *arguments], check=True, timeout=300)
    device = Device(run)
    frame = (tmp_path / "x").read_bytes()
    assert codec.parse(frame).model == device.tables.id
    assert decode_image(device.tables, frame, TINY.images, limits=Limits(frame_bytes=1000)).plan.num_crops == 0


def test_a_server_of_the_run_reads_its_streams_once_it_has_ended(run, tmp_path, caplog):
    assert _codec(str(run)).id == Tables.load(run / "tofc" / "codec.safetensors").id
    shutil.copytree(run, tmp_path / "going_on", ignore=shutil.ignore_patterns("tofc"))
    assert _codec(str(tmp_path / "going_on")) is None and "features of devices are refused" in caplog.text
