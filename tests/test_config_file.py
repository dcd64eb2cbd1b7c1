"""Recipes on disk, overrides, differences, and the way through JSON."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
from tiny_recipe import config as tiny

from stepjax.config import (
    ArrayRecordSource,
    DataConfig,
    DigitsSource,
    InitConfig,
    JsonlSource,
    LoraConfig,
    OptimizerConfig,
    RunConfig,
    SftConfig,
)
from stepjax.config_file import differences, flat, from_json, load_recipe, override, to_json
from stepjax.errors import CheckpointError, ConfigError

ROOT = Path(__file__).parent.parent
RECIPES = [
    *(ROOT / "configs" / "digits" / f"{stage}.py" for stage in ("pretrain", "sft", "rlvr", "rlhf")),
    *(ROOT / "configs" / "documents" / f"{name}.py" for name in ("sft_text", "sft", "sft_control", "tofc")),
    *(
        ROOT / "configs" / "step3_vl_10b" / f"{stage}.py"
        for stage in ("pretrain", "sft_stage1", "sft_stage2", "rlvr", "rlhf")
    ),
]
MIXED = dataclasses.replace(
    tiny,
    data=DataConfig(
        sources=(
            DigitsSource(name="digits", weight=1, task="count"),
            JsonlSource(name="docs", weight=0.5, path="docs.jsonl"),
            ArrayRecordSource(name="shards", weight=2.0, paths=("a", "b")),
        )
    ),
    optimizer=OptimizerConfig(learning_rate_scales=(("vision/", 0.1),), freeze=("projector",), clip_norm=None),
)

_FIELDS = {field.name: getattr(tiny, field.name) for field in dataclasses.fields(tiny)}
SFT = SftConfig(**_FIELDS | {"init_from": InitConfig(path="runs/tiny")}, lora=LoraConfig(rank=4))


# Recipes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name} {path.stem}")
def test_the_recipes_load_under_the_name_of_their_folder_and_stage(path):
    stage = "" if path.stem == "pretrain" else f"_{path.stem}"
    assert load_recipe(path, RunConfig).name == path.parent.name + stage


def test_a_recipe_may_import_its_neighbours(tmp_path):
    (tmp_path / "neighbour_of_a_recipe.py").write_text("from tiny_recipe import config as base\n")
    recipe = tmp_path / "recipe.py"
    recipe.write_text("import dataclasses\nfrom neighbour_of_a_recipe import base\n"
                      "config = dataclasses.replace(base, name='other')\n")  # fmt: skip
    assert load_recipe(recipe) == dataclasses.replace(tiny, name="other")


def test_a_recipe_of_another_kind_is_refused(tmp_path):
    (tmp_path / "recipe.py").write_text("from tiny_recipe import config\n")
    with pytest.raises(ConfigError, match="`config` must be of class SftConfig; it is PretrainConfig"):
        load_recipe(tmp_path / "recipe.py", SftConfig)


def test_a_missing_recipe_is_answered_with_those_there_are(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match=r"'configs/digit' is not a recipe file; .*configs/digits/pretrain.py"):
        load_recipe("configs/digit")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"none in ./configs"):
        load_recipe("recipe.py")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n\ny = {}['rows']\n", r"recipe .*recipe.py, line 3 fails: KeyError: 'rows'"),
        ("import no_such_module\n", r"recipe .*recipe.py, line 1 fails: ModuleNotFoundError: .*no_such_module"),
        ("x = (\n", r"recipe .*recipe.py fails: SyntaxError: .*line 1"),
        ("x = 1\n", r"recipe .*recipe.py: `config` must be of class PretrainConfig; it is NoneType"),
        ("config = {}\n", r"recipe .*recipe.py: `config` must be of class PretrainConfig; it is dict"),
        ("from stepjax.config import BatchConfig\nBatchConfig(rows=0)\n", r"batch.rows=0: must be positive"),
    ],
)
def test_a_recipe_that_fails_says_where_and_why(tmp_path, text, message):
    (tmp_path / "recipe.py").write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_recipe(tmp_path / "recipe.py")
    assert "\n" not in str(error.value)


def test_an_interrupt_in_a_recipe_is_not_swallowed(tmp_path):
    (tmp_path / "recipe.py").write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load_recipe(tmp_path / "recipe.py")


# Overrides -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "difference"),
    [
        (["--seed", "7"], "seed: 0 -> 7"),
        (["--optimizer.weight-decay", "0.1"], "optimizer.weight_decay: 0.01 -> 0.1"),
        (["--optimizer.weight_decay=0.1"], "optimizer.weight_decay: 0.01 -> 0.1"),
        (["--optimizer.clip-norm", "None"], "optimizer.clip_norm: 1.0 -> None"),
        (["--optimizer.freeze", "vision", "embed"], "optimizer.freeze: () -> ('vision', 'embed')"),
        (["--optimizer.learning-rate-scales", "b", "0.1"], "optimizer.learning_rate_scales: () -> (('b', 0.1),)"),
        (["--data.sources.0.weight", "2"], "data.sources.0.weight: 0.5 -> 2.0"),
        (["--data.sources.1.task", "count"], "data.sources.1.task: 'arithmetic' -> 'count'"),
        (["--schedule.phases.0.tokens", "1e6"], "schedule.phases.0.tokens: 4096 -> 1000000.0"),
        (["--model.decoder.tie-embeddings"], "model.decoder.tie_embeddings: False -> True"),
        (["--logging.profile", "2", "4"], "logging.profile: None -> (2, 4)"),
        (["--evaluation.every", "8"], "evaluation.every: None -> 8"),
        (["--mesh.fsdp", "-1", "--mesh.data", "2"], "mesh.data: 1 -> 2"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_any_field_is_overridden_by_its_path_and_nothing_else_changes(arguments, difference):
    assert differences(override(tiny, arguments, prog="stepjax"), tiny) == [difference]


def test_the_options_are_those_of_the_recipes_class():
    assert differences(override(SFT, ["--lora.rank", "8"], prog="stepjax"), SFT) == ["lora.rank: 4 -> 8"]
    with pytest.raises(SystemExit):
        override(tiny, ["--lora.rank", "8"], prog="stepjax")


def test_no_arguments_change_nothing():
    for config in (tiny, MIXED, SFT, *(load_recipe(path, RunConfig) for path in RECIPES)):
        assert override(config, [], prog="stepjax") == config


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["--optimizer.wieght-decay", "0.1"], "--optimizer.weight-decay"),
        (["--checkpoint.every", "often"], "--checkpoint.every"),
        (["--checkpoint.every", "0"], "checkpoint.every=0: must be positive"),
        (["--numerics.remat", "lots"], "attention"),
        (["--images.patch-size", "7"], "images.patch_size=7"),
        (["--data.sources.5.weight", "2"], "--data.sources.5.weight"),
    ],
)
def test_wrong_arguments_end_with_status_2_and_a_hint(arguments, answer, capsys):
    with pytest.raises(SystemExit) as exit:
        override(tiny, arguments, prog="stepjax")
    assert exit.value.code == 2
    assert answer in capsys.readouterr().err


# JSON ----------------------------------------------------------------------------------------------------------------


def test_json_gives_back_the_same_configuration():
    for config in (tiny, MIXED, SFT, *(load_recipe(path, RunConfig) for path in RECIPES)):
        assert from_json(json.loads(json.dumps(to_json(config)))) == config


def test_json_names_the_kind_and_without_one_means_pretraining():
    assert to_json(tiny)["kind"] == "pretrain" and to_json(SFT)["kind"] == "sft"
    earlier = {name: value for name, value in to_json(tiny).items() if name != "kind"}
    assert from_json(earlier) == tiny and type(from_json(to_json(SFT))) is SftConfig
    with pytest.raises(CheckpointError, match="kind 'dance' is none of pretrain, sft"):
        from_json(to_json(tiny) | {"kind": "dance"})


def test_fields_that_are_absent_take_their_defaults():
    """So that checkpoints of earlier versions are read as long as fields are only added."""
    fields = to_json(tiny)
    del fields["loss"], fields["optimizer"]["eps"]
    assert from_json(fields) == tiny


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("batch", None, "batch: "),
        ("batch.rows", "many", "batch.rows: Input should be a valid integer"),
        ("checkpoint.every", 4.5, "checkpoint.every: Input should be a valid integer"),
        ("model.vision.num_heads", 3, "vision.num_heads=3: must divide width 16"),
        ("data.sources.0.task", "dance", "data.sources.0.DigitsSource.task: Input should be 'transcribe'"),
        ("optimizer.lion", 1, "unknown optimizer.lion"),
        ("data.sources.1.colour", "red", "unknown data.sources.1.colour"),
        ("epochs", 3, "unknown epochs"),
    ],
)
def test_fields_that_do_not_fit_are_named(path, value, message):
    fields = copy.deepcopy(to_json(tiny))
    *parents, last = path.split(".")
    place = fields
    for key in parents:
        place = place[int(key)] if isinstance(place, list) else place[key]
    place[last] = value
    with pytest.raises(CheckpointError, match="does not fit this version of stepjax") as error:
        from_json(fields)
    assert message in str(error.value)


# Differences ---------------------------------------------------------------------------------------------------------


def test_flat_names_every_field_as_the_command_line_does():
    fields = flat(MIXED)
    assert fields["data.sources.1.path"] == "docs.jsonl"
    assert fields["optimizer.learning_rate_scales"] == (("vision/", 0.1),)
    assert fields["schedule.phases.0.start"] == 3e-3
    assert not any(dataclasses.is_dataclass(value) for value in fields.values())


def test_differences_name_fields_that_appear_and_disappear():
    fewer = dataclasses.replace(tiny, data=dataclasses.replace(tiny.data, sources=tiny.data.sources[:1]))
    assert "data.sources.1.name: 'arithmetic' -> '(absent)'" in differences(fewer, tiny)
    assert "data.sources.1.name: '(absent)' -> 'arithmetic'" in differences(tiny, fewer)
    assert differences(tiny, tiny) == []
