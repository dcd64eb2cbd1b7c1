"""Starting from weights: every source, part by part, and refusals that name the tensor."""

import dataclasses
import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_recipe import config as tiny

import stepjax.interop.init_from as init_from
import stepjax.training.loop as loop
from stepjax.cli import main
from stepjax.config import DecoderConfig, ImageConfig, InitConfig, MeshConfig, ModelConfig, NumericsConfig, VisionConfig
from stepjax.config_file import to_json
from stepjax.errors import CheckpointError
from stepjax.interop.convert import to_orbax
from stepjax.interop.export_files import config_json
from stepjax.interop.hf_config import config_from_hf
from stepjax.interop.hf_directory import HFDirectory
from stepjax.interop.hf_layout import timm_tensors
from stepjax.interop.hf_match import places
from stepjax.interop.init_from import describe, plan_start
from stepjax.interop.model_spec import ModelSpec
from stepjax.models.step_vl import abstract_model, make_model
from stepjax.sharding import make_mesh, parameter_name, shardings
from stepjax.training.checkpoint import Checkpointer
from stepjax.training.dry_run import describe as dry_run
from stepjax.training.optimizer import make_optimizer
from stepjax.training.step import TrainState, new_state

pytest_plugins = ("tiny_run",)

FLOAT32 = NumericsConfig(compute_dtype="float32", remat="none")
PARTS = ("vision", "projector", "decoder")
SMALL = ModelConfig(
    vision=VisionConfig(width=32, num_layers=2, num_heads=2, mlp_dim=48, patch_size=4, position_grid=6),
    decoder=DecoderConfig(
        vocab_size=64, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48, max_positions=128
    ),
)


def recipe(model=SMALL, **sources):
    images = ImageConfig(global_size=4 * model.vision.position_grid, crop_size=16, patch_size=4)
    return dataclasses.replace(
        tiny, model=model, images=images, numerics=FLOAT32, init_from=InitConfig(**sources), seed=3
    )


CONFIG = recipe()
LARGE = dataclasses.replace(SMALL, decoder=dataclasses.replace(SMALL.decoder, vocab_size=74))


def named(model):
    return {parameter_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(model)}


def write_tensors(path, tensors, values):
    stored = {}
    for place in places(tensors, {name: value.shape for name, value in values.items()}):
        value = np.asarray(values[place.tensor.name])
        stored[place.key] = np.ascontiguousarray(
            place.tensor.to_hf(value if place.layer is None else value[place.layer])
        )
    save_file(stored, path)


def write_hf(directory, model, *, spec=None):
    spec = spec or ModelSpec(model.config, CONFIG.images)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config_json(spec, None, None)))
    values = {name.removeprefix("decoder/") if spec.is_text else name: value for name, value in named(model).items()}
    write_tensors(directory / "model.safetensors", spec.tensors(), values)
    return directory


def write_timm(directory, model):
    directory.mkdir()
    tensors = timm_tensors(model.config.vision)
    write_tensors(directory / "model.safetensors", tensors, named(model))
    fields = {"architecture": "vit_pe_lang_gigantic_patch14_448", "model_args": {"num_heads": 2}}
    fields["pretrained_cfg"] = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    (directory / "config.json").write_text(json.dumps(fields))
    return directory


def write_run(directory, model):
    state = TrainState(jnp.int32(7), model, {})
    with Checkpointer(directory / "checkpoints", keep=1, config=to_json(CONFIG)) as checkpointer:
        checkpointer.save(7, state, {}, wait=True)
    return directory


@pytest.fixture(scope="module")
def model(randomized):
    """The model that every source holds."""
    return randomized(abstract_model(SMALL, FLOAT32), seed=5)


@pytest.fixture(scope="module")
def sources(model, tmp_path_factory):
    """A source of every kind, by name."""
    top = tmp_path_factory.mktemp("sources")
    hf = write_hf(top / "hf", model)
    text = write_hf(top / "text", model.decoder, spec=ModelSpec(SMALL.decoder))
    for name, directory in (("converted", hf), ("converted_text", text)):
        to_orbax(HFDirectory(directory), top / name)
    run = write_run(top / "run", model)
    timm = write_timm(top / "timm", model)
    return {
        "hf": hf,
        "text": text,
        "timm": timm,
        "timm_file": timm / "model.safetensors",
        "converted": top / "converted",
        "converted_text": top / "converted_text",
        "run": run,
        "checkpoints": run / "checkpoints",
        "step": run / "checkpoints" / "7",
    }


def on_eight():
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


@pytest.mark.parametrize(
    "kinds",
    [
        {"path": "hf"},
        {"path": "converted"},
        {"path": "run"},
        {"vision": "timm", "projector": "hf", "decoder": "text"},
        {"vision": "timm_file", "projector": "step", "decoder": "converted_text"},
        {"vision": "checkpoints"},
        {"path": "run", "decoder": "text"},
    ],
    ids=str,
)
def test_each_source_fills_its_parts_and_the_others_are_those_of_a_run_without(kinds, sources, model, initial_model):
    config = recipe(**{name: str(sources[kind]) for name, kind in kinds.items()})
    mesh = on_eight()
    started, starts = init_from.initial_model(config, mesh)
    expected, random = named(model), named(initial_model)
    layouts = named(shardings(abstract_model(SMALL, FLOAT32), mesh))
    for name, value in named(started).items():
        assert value.sharding.is_equivalent_to(layouts[name], value.ndim), name
        filled = "path" in kinds or name.split("/")[0] in kinds
        np.testing.assert_array_equal(value, (expected if filled else random)[name], err_msg=name)
    assert [start.part for start in starts if start.source is not None] == [
        part for part in PARTS if "path" in kinds or part in kinds
    ]


def test_nothing_named_is_a_run_without_sources():
    assert plan_start(CONFIG) == [] and describe([], CONFIG) == []


def bilinear(table, size):
    """Half-pixel centres, edges repeated."""
    at = (np.arange(size) + 0.5) * len(table) / size - 0.5
    low = np.floor(at).astype(int)
    share = (at - low)[:, None, None]
    rows = (1 - share) * table[np.clip(low, 0, len(table) - 1)] + share * table[np.clip(low + 1, 0, len(table) - 1)]
    return rows


@pytest.mark.parametrize(("kind", "grid"), [("hf", 9), ("timm", 9), ("timm", 4), ("converted", 4), ("run", 9)])
def test_the_position_table_is_resized(kind, grid, sources, model):
    wide = dataclasses.replace(SMALL, vision=dataclasses.replace(SMALL.vision, position_grid=grid))
    config = recipe(wide, path=str(sources["hf"]), vision=str(sources[kind]))
    started, starts = init_from.initial_model(config, on_eight())
    table = np.asarray(model.vision.positions[...])
    expected = bilinear(bilinear(table, grid).transpose(1, 0, 2), grid).transpose(1, 0, 2)
    np.testing.assert_allclose(started.vision.positions[...], expected, atol=1e-5)
    assert starts[0].resized == {"vision/positions": (6, grid)}
    assert f"vision/positions resized from 6 x 6 to {grid} x {grid} (bilinear)" in describe(starts, config)[0]


def test_the_method_of_resizing_is_a_choice(sources):
    wide = dataclasses.replace(SMALL, vision=dataclasses.replace(SMALL.vision, position_grid=4))
    tables = []
    for resize in ({}, {"resize": "bicubic"}, {"resize_antialias": True}):
        config = recipe(wide, path=str(sources["hf"]), vision=str(sources["timm"]), **resize)
        started, _ = init_from.initial_model(config, on_eight())
        tables.append(np.asarray(started.vision.positions[...]))
    assert np.abs(tables[0] - tables[1]).max() > 0.01 and np.abs(tables[0] - tables[2]).max() > 0.01


@pytest.fixture(scope="module")
def new_rows():
    """Of the embedding and of the head, as a run without sources has them."""

    def rows(key):
        decoder = make_model(LARGE, FLOAT32, key).decoder
        return decoder.embedding[64:], decoder.head_kernel[:, 64:]

    return jax.jit(rows)(jax.random.key(CONFIG.seed))


@pytest.mark.parametrize("kind", ["hf", "text", "converted_text", "run"])
def test_new_embedding_rows_are_allowed_by_name_only(kind, sources, model, new_rows):
    path = str(sources[kind])
    with pytest.raises(CheckpointError, match=r"\(64, 32\) \(expected \(74, 32\)\).*init_from.new_embedding_rows"):
        plan_start(recipe(LARGE, decoder=path))
    config = recipe(LARGE, path=str(sources["hf"]), decoder=path, new_embedding_rows=True)
    started, starts = init_from.initial_model(config, on_eight())
    np.testing.assert_array_equal(started.decoder.embedding[:64], model.decoder.embedding[...])
    np.testing.assert_array_equal(started.decoder.embedding[64:], new_rows[0])
    np.testing.assert_array_equal(started.decoder.head_kernel[:, :64], model.decoder.head_kernel[...])
    np.testing.assert_array_equal(started.decoder.head_kernel[:, 64:], new_rows[1])
    assert starts[2].new_rows == {"decoder/embedding": 10, "decoder/head_kernel": 10}
    assert "10 new rows of decoder/embedding random" in describe(starts, config)[2]


def test_a_smaller_vocabulary_is_no_new_row(sources):
    small = dataclasses.replace(SMALL, decoder=dataclasses.replace(SMALL.decoder, vocab_size=48))
    with pytest.raises(CheckpointError, match=r"model.embed_tokens.weight \(64, 32\) \(expected \(48, 32\)\)"):
        plan_start(recipe(small, decoder=str(sources["text"]), new_embedding_rows=True))


def changed(part, **fields):
    return dataclasses.replace(SMALL, **{part: dataclasses.replace(getattr(SMALL, part), **fields)})


@pytest.mark.parametrize(
    ("source", "wanted", "message"),
    [
        ({"projector": "text"}, SMALL, r"init_from.projector=.*text.* has no weights for .*, only for decoder"),
        ({"path": "timm"}, SMALL, r"init_from.path=.*timm.* has no weights for .*, only for vision"),
        ({"vision": "converted_text"}, SMALL, r"init_from.vision=.* has no weights for .*, only for decoder"),
        (
            {"decoder": "text"},
            changed("decoder", mlp_dim=64),
            r"init_from.decoder=.*model.layers.0.mlp.down_proj.weight \(32, 48\) \(expected \(32, 64\)\)",
        ),
        (
            {"vision": "timm"},
            changed("vision", mlp_dim=64),
            r"blocks.1.mlp.fc1.weight \(48, 32\) \(expected \(64, 32\)\)",
        ),
        (
            {"decoder": "run"},
            changed("decoder", mlp_dim=64),
            r"decoder/blocks/mlp/up_kernel \(2, 32, 48\) \(expected \(2, 32, 64\)\)",
        ),
        ({"decoder": "text"}, changed("decoder", num_layers=3), r"missing: .*model.layers.2.mlp.up_proj.weight"),
        ({"decoder": "hf"}, changed("decoder", num_layers=1), r"unexpected: .*model.layers.1.mlp.up_proj.weight"),
        ({"projector": "hf"}, dataclasses.replace(SMALL, projector_bias=True), r"missing: vit_large_projector.bias"),
        ({"vision": "timm"}, changed("vision", num_heads=4), r"vision.num_heads is 2, the recipe's 4"),
        ({"vision": "hf"}, changed("vision", num_heads=4), r"vision.num_heads is 2, the recipe's 4"),
        ({"decoder": "text"}, changed("decoder", qk_norm=False), r"unexpected: .*q_norm.weight"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(source, wanted, message, sources):
    config = recipe(wanted, **{part: str(sources[kind]) for part, kind in source.items()})
    with pytest.raises(CheckpointError, match=message):
        plan_start(config)


def test_what_is_no_source_is_named(tmp_path, sources):
    with pytest.raises(CheckpointError, match=r"init_from.decoder='nowhere': no such.*--init-from.decoder"):
        plan_start(recipe(decoder="nowhere"))
    with pytest.raises(CheckpointError, match=r"init_from.path='nowhere'.*--init-from.path"):
        plan_start(recipe(path="nowhere"))
    with pytest.raises(CheckpointError, match="init_from.path=.*no such|no complete checkpoint"):
        plan_start(recipe(path=str(tmp_path)))
    tensors = load_file(sources["timm_file"])
    save_file({**tensors, "pos_embed": np.zeros((1, 37, 32), np.float32)}, tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match=r"not a Perception Encoder.*pos_embed has shape \(1, 37, 32\)"):
        plan_start(recipe(vision=str(tmp_path)))
    save_file({**tensors, "cls_token": np.zeros((1, 1, 32), np.float32)}, tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match="unexpected: cls_token"):
        plan_start(recipe(vision=str(tmp_path / "odd.safetensors")))


def test_figures_that_differ_are_told(sources):
    other = changed("decoder", rope_theta=5e5, norm_eps=1e-5)
    config = recipe(other, vision=str(sources["timm"]), decoder=str(sources["text"]))
    lines = "\n".join(describe(plan_start(config), config))
    assert "model.vision.activation is 'quick_gelu', 'gelu' in the source" in lines
    assert "images.mean is (0.48145466, 0.4578275, 0.40821073), (0.5, 0.5, 0.5) in the source" in lines
    assert "model.decoder.rope_theta is 500000.0, 1000000.0 in the source" in lines
    assert "projector  random values" in lines


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_the_activation_goes_through_config_json(activation):
    model = changed("vision", activation=activation)
    fields = config_json(ModelSpec(model, CONFIG.images), None, None)
    assert fields["vision_config"]["hidden_act"] == activation
    assert config_from_hf(fields)[0].vision.activation == activation


def test_headers_are_all_that_a_dry_run_reads(sources, monkeypatch):
    monkeypatch.setattr(init_from, "read_parameters", None)
    monkeypatch.setattr(init_from, "restore_parameters", None)
    base = dataclasses.replace(recipe(), tokenizer=tiny.tokenizer, model=changed("decoder", vocab_size=512))
    named_here = InitConfig(vision=str(sources["timm"]), projector=str(sources["run"]), decoder="Qwen3-8B")
    config = dataclasses.replace(base, init_from=named_here)
    page = dry_run(config, config)
    assert "projector  from " in page and "(run): " in page and "(timm): " in page
    assert "decoder    from Qwen3-8B, which was not found and not checked" in page
    misfit = dataclasses.replace(config, init_from=InitConfig(decoder=str(sources["text"])))
    with pytest.raises(CheckpointError, match="model.embed_tokens.weight"):
        dry_run(misfit, misfit)


# In a run ------------------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def kill(*_, **__):
    raise Killed


def test_a_run_says_and_stores_its_start_and_never_starts_again(tmp_path, quick_runs, randomized, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "stepjax")
    model = randomized(abstract_model(tiny.model, FLOAT32))
    source = write_hf(tmp_path / "source", model, spec=ModelSpec(tiny.model, tiny.images))
    sources = InitConfig(vision=str(source), decoder=str(source))
    config = dataclasses.replace(tiny, out=str(tmp_path / "runs"), init_from=sources)
    directory = tmp_path / "runs" / "tiny"
    began, start = [], init_from.initial_model
    monkeypatch.setattr(init_from, "initial_model", lambda *a: began.append(1) or start(*a))

    for _ in range(2):  # killed before its first checkpoint, a run starts again
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(loop, "Meter", kill)
            loop.pretrain(config)
    assert len(began) == 2
    said = caplog.text
    assert "projector  random values" in said and f"decoder    from {source} (Hugging Face): " in said
    stored = json.loads((directory / "init_from.json").read_text())
    assert stored["decoder"]["read"] == str(source) and "decoder/embedding" in stored["decoder"]["loaded"]
    assert stored["projector"]["loaded"] == [] and "projector/kernel" in stored["projector"]["random"]

    optimizer = make_optimizer(config.optimizer, lambda step: 0.1, abstract_model(config.model, FLOAT32))
    state = new_state(model, optimizer)
    with Checkpointer(directory / "checkpoints", keep=1, config=to_json(config)) as checkpointer:
        checkpointer.save(4, state, {}, wait=True)
    shutil.rmtree(source)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop, "Loader", kill)  # which comes after the state
        loop.pretrain(config)
    with pytest.raises(CheckpointError, match="init_from.decoder"):
        loop.pretrain(dataclasses.replace(config, init_from=InitConfig()))
    assert len(began) == 2


def test_a_missing_source_is_one_line_and_leaves_nothing(tmp_path, capsys):
    from run_files import RECIPE

    out = tmp_path / "runs"
    assert main(["pretrain", str(RECIPE), "--out", str(out), "--init-from.decoder", "nowhere"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not out.exists()
