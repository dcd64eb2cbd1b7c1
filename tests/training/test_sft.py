"""Fine-tuning: the loop of pretraining on conversations; with adapters, on a model that stays as it is."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from run_files import read_metrics, without_speed
from safetensors.numpy import load_file, save_file
from tiny_sft import config as SFT

import stepjax
from stepjax.cli import main
from stepjax.config import InitConfig, JsonlSource, LoraConfig, MeshConfig
from stepjax.data.mixture import Sample
from stepjax.data.packing import RowBudget, pack
from stepjax.data.records import JsonlRecords
from stepjax.errors import CheckpointError
from stepjax.interop.load import load_run
from stepjax.models.step_vl import init_model
from stepjax.processing.processor import Processor
from stepjax.sharding import make_mesh, named_leaves
from stepjax.training.checkpoint import Checkpointer, read_meta, stored_parameters
from stepjax.training.loop import pretrain
from stepjax.training.losses import cross_entropy_sum, next_tokens
from stepjax.training.step import loss_sum

pytest_plugins = ("tiny_run",)

ROOMY = dataclasses.replace(SFT.batch, tokens=256, global_views=4, crops=48)
LORA = LoraConfig(rank=2, targets=("attention/[qv]_kernel", "mlp/down_kernel"))


def arrays(model) -> dict[str, np.ndarray]:
    return {name: np.asarray(jax.tree.leaves(leaf)[0]) for name, leaf in named_leaves(model).items()}


# Conversations -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    """A file of conversations with no, one and two images, some of whose turns are not trained."""
    folder = tmp_path_factory.mktemp("data")
    pixels = np.random.default_rng(0).integers(0, 255, (3, 40, 80, 3), np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{index}.png")

    def say(role, content, **more):
        return {"role": role, "content": content, **more}

    records = [
        [say("user", "1 + 1?"), say("assistant", "3", train=False), say("user", "No."), say("assistant", "2")],
        [
            say("user", [{"type": "image", "image": "0.png"}, {"type": "text", "text": "?"}]),
            say("assistant", "A strip"),
        ],
        [
            say("system", "Compare."),
            say("user", [{"type": "image", "image": "1.png"}, {"type": "image", "image": "2.png"}]),
            say("assistant", "Not the same", reasoning_content="look"),
        ],
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in records))
    return folder / "data.jsonl"


@pytest.fixture(scope="module")
def processor():
    return Processor.from_config(SFT.images, SFT.tokenizer)


def batch_of(rows):
    budget = RowBudget.of(ROOMY, SFT.images)
    packed = [pack(row, budget) for row in rows]
    names = {key: "{}_B{}".format(*key.rsplit("_", 1)) for key in packed[0]}
    return {name: jnp.asarray(np.stack([row[key] for row in packed])) for key, name in names.items()}


def samples(path, processor):
    records = JsonlRecords("data", path)
    return [Sample(processor.process(records[i]), 0) for i in range(len(records))]


def test_only_trained_turns_have_gradients(conversations, processor):
    """Of the hidden states, by the loss itself: exactly those that predict a trained token, its end included."""
    batch = batch_of([samples(conversations, processor)])
    targets_BT, weights_BT = next_tokens(batch["tokens_BT"], batch["loss_weights_BT"])
    rng = np.random.default_rng(0)
    width, vocabulary = SFT.model.decoder.width, SFT.model.decoder.vocab_size
    hidden_BTD = jnp.asarray(rng.standard_normal((*targets_BT.shape, width)), jnp.float32)
    head_DV = jnp.asarray(rng.standard_normal((width, vocabulary)), jnp.float32)
    gradient_BTD = jax.grad(
        lambda hidden_BTD: cross_entropy_sum(hidden_BTD, head_DV, targets_BT, weights_BT, z_loss=1e-2, chunk=64)[0]
    )(hidden_BTD)
    tokens_T = np.asarray(batch["tokens_BT"])[0]
    predicts_T = np.abs(np.asarray(gradient_BTD)[0]).max(axis=-1) > 0
    stretches = np.split(np.flatnonzero(predicts_T) + 1, np.flatnonzero(np.diff(np.flatnonzero(predicts_T)) > 1) + 1)
    decode = processor.tokenizer.decode
    texts = [decode(tokens_T[stretch].tolist(), False) for stretch in stretches]
    assert texts == ["2<|im_end|>", "A strip<|im_end|>", "<think>\nlook\n</think>\nNot the same<|im_end|>"]


def test_packed_conversations_with_images_have_the_losses_of_unpacked_ones(conversations, processor):
    model = init_model(dataclasses.replace(SFT.model, init_range=0.3), SFT.numerics, seed=2)
    config = dataclasses.replace(SFT, data=dataclasses.replace(SFT.data, sources=SFT.data.sources[:1]))
    loss = jax.jit(lambda model, batch: loss_sum(model, batch, config=config)[0])
    each = samples(conversations, processor)
    alone = [float(loss(model, batch_of([[sample], []]))) for sample in each]
    packed = float(loss(model, batch_of([each, []])))
    assert min(alone) > 1
    np.testing.assert_allclose(packed, sum(alone), rtol=1e-5)
    swapped = float(loss(model, batch_of([each[::-1], []])))
    np.testing.assert_allclose(packed, swapped, rtol=1e-5)


# Runs ----------------------------------------------------------------------------------------------------------------


def started_from(run, out, **changes):
    return dataclasses.replace(SFT, init_from=InitConfig(path=str(run.directory)), out=str(out), **changes)


def test_fine_tuning_is_the_loop_of_pretraining_from_a_models_parameters(
    finished_run, conversations, tmp_path, quick_runs
):
    source = JsonlSource(name="conversations", weight=1.0, path=str(conversations))
    config = started_from(finished_run, tmp_path, data=dataclasses.replace(SFT.data, sources=(source,)))
    outcome = pretrain(config)
    rows = read_metrics(tmp_path / "tiny_sft")
    assert [row["step"] for row in rows] == list(range(1, 9)) and rows[-1]["loss"] < rows[0]["loss"]
    before = arrays(stepjax.load(finished_run.directory)[0])
    assert rows[0]["update_norm"] == 0, "warm-up starts from zero"
    norm = np.sqrt(sum(np.square(array, dtype=np.float64).sum() for array in before.values()))
    np.testing.assert_allclose(rows[0]["param_norm"], norm, rtol=1e-4)
    after = arrays(outcome.model)
    assert all(np.abs(after[name] - before[name]).max() > 0 for name in before)
    model, _, saved = load_run(tmp_path / "tiny_sft")
    assert saved == config and read_meta(tmp_path / "tiny_sft/checkpoints")["config"]["kind"] == "sft"
    for name, array in arrays(model).items():
        np.testing.assert_array_equal(array, after[name])


@pytest.fixture(scope="module")
def lora_run(finished_run, tmp_path_factory):
    """A run with adapters, unbroken: its configuration and outcome."""
    from tiny_run import _quick_runs

    config = started_from(finished_run, tmp_path_factory.mktemp("lora"), lora=LORA)
    with _quick_runs():
        return config, pretrain(config)


def test_only_adapters_are_trained_and_saved(finished_run, lora_run):
    config, outcome = lora_run
    directory = outcome.directory
    targets = [f"decoder/blocks/{name}_kernel" for name in ("attention/q", "attention/v", "mlp/down")]
    _, stored = stored_parameters(directory / "checkpoints")
    assert sorted(stored) == sorted(f"{name}/{part}" for name in targets for part in "ab")
    before, after = arrays(stepjax.load(finished_run.directory)[0]), arrays(outcome.model)
    for name, array in after.items():
        if name not in targets:
            np.testing.assert_array_equal(array, before[name], err_msg=name)
        else:
            update = (array - before[name])[0]
            rows = update.reshape(-1, update.shape[-1]) if "down" in name else update.reshape(update.shape[0], -1)
            assert np.linalg.matrix_rank(rows, tol=1e-5) == LORA.rank, name
    rows = read_metrics(directory)
    assert rows[-1]["loss"] < rows[0]["loss"]
    plain = read_metrics(finished_run.directory)
    assert set(rows[0]) == set(plain[0])


def test_a_broken_run_with_adapters_goes_on_as_an_unbroken_one(finished_run, lora_run, tmp_path, quick_runs, caplog):
    unbroken, outcome = lora_run
    evaluation = dataclasses.replace(unbroken.evaluation, every=4)
    config = dataclasses.replace(unbroken, out=str(tmp_path), evaluation=evaluation)

    def kill(model, processor, step):
        assert step == 4
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(config, on_evaluation=kill)
    with caplog.at_level("INFO"):
        again = pretrain(config)
    assert "resumed at step 4" in caplog.text
    rows, whole = read_metrics(again.directory), read_metrics(outcome.directory)
    assert [without_speed(row) for row in rows] == [without_speed(row) for row in whole]
    expected = arrays(outcome.model)
    for name, array in arrays(again.model).items():
        np.testing.assert_array_equal(array, expected[name])


def test_a_run_with_adapters_is_read_like_any_other(lora_run, conversations, capsys, quick_runs):
    _, outcome = lora_run
    expected = arrays(outcome.model)
    for mesh in (None, make_mesh(MeshConfig())):
        model, _ = stepjax.load(outcome.directory, mesh=mesh)
        for name, array in arrays(model).items():
            np.testing.assert_allclose(array, expected[name], rtol=0, atol=1e-6)
    assert len(model.decoder.blocks.mlp.down_kernel[...].sharding.device_set) == 8
    half = dataclasses.replace(SFT.numerics, param_dtype="bfloat16")
    model, _ = stepjax.load(outcome.directory, numerics=half)
    assert {array.dtype.name for array in arrays(model).values()} == {"bfloat16"}
    question = ["--prompt", "1 + 1?", "--max-tokens", "3"]
    assert main(["generate", str(outcome.directory), *question]) == 0
    assert capsys.readouterr().out.strip()
    assert main(["eval", str(outcome.directory), "--data", str(conversations), "--examples", "1"]) == 0
    assert "data" in capsys.readouterr().out


def test_adapters_are_never_added_to_another_model(finished_run, lora_run, tmp_path, quick_runs):
    """Not at resume, nor when the run is loaded: nothing else would show it."""
    config, outcome = lora_run
    other = tmp_path / "tiny"
    shutil.copytree(finished_run.directory, other)
    directory = tmp_path / "tiny_sft"
    shutil.copytree(outcome.directory, directory)
    changed = dataclasses.replace(config, init_from=InitConfig(path=str(other)), out=str(tmp_path))
    meta = read_meta(directory / "checkpoints")
    # As if it had been trained on the copy, which then is trained anew.
    shutil.rmtree(directory)
    pretrain(changed)
    step = max(int(path.name) for path in (other / "checkpoints").glob("[0-9]*"))
    model = init_model(SFT.model, SFT.numerics, seed=5)
    config_json = read_meta(other / "checkpoints")["config"]
    shutil.rmtree(other)
    with Checkpointer(other / "checkpoints", keep=1, config=config_json) as checkpointer:
        checkpointer.save(step, {"model": model}, {}, wait=True)
    more = dataclasses.replace(changed.checkpoint, every=2)
    for read in (lambda: stepjax.load(directory), lambda: pretrain(dataclasses.replace(changed, checkpoint=more))):
        with pytest.raises(CheckpointError, match="is not the model that these adapters were trained on"):
            read()
    shutil.rmtree(other)
    with pytest.raises(CheckpointError, match=r"holds adapters and needs the model .*no such file"):
        stepjax.load(directory)
    assert meta["base"] and set(meta["base"]) == set(arrays(model))


def test_a_run_does_not_start_from_adapters_alone(lora_run, tmp_path, quick_runs):
    config, outcome = lora_run
    start = dataclasses.replace(config, init_from=InitConfig(path=str(outcome.directory)), out=str(tmp_path))
    with pytest.raises(CheckpointError, match="holds only adapters: merge them with `stepjax convert .* DIR`"):
        pretrain(start)


# Conversion ----------------------------------------------------------------------------------------------------------


def test_conversion_merges_the_adapters(lora_run, tmp_path, capsys):
    _, outcome = lora_run
    assert main(["convert", str(outcome.directory), str(tmp_path / "hf")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    expected = arrays(outcome.model)
    for name, array in arrays(stepjax.load(tmp_path / "hf")[0]).items():
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=1e-6)


def test_adapters_are_written_as_peft_stores_them(lora_run, finished_run, tmp_path, capsys):
    config, outcome = lora_run
    assert main(["convert", str(outcome.directory), str(tmp_path / "peft"), "--adapters"]) == 0
    fields = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert (fields["peft_type"], fields["r"], fields["lora_alpha"]) == ("LORA", 2, 16.0)
    assert fields["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    assert fields["base_model_name_or_path"] == str(finished_run.directory)
    tensors = load_file(tmp_path / "peft/adapter_model.safetensors")
    width = config.model.decoder.width
    assert tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (2, width)
    assert tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"].shape == (32, 2)
    assert tensors["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"].shape == (2, 64)
    assert len(tensors) == 6
    assert main(["convert", str(finished_run.directory), str(tmp_path / "none"), "--adapters"]) == 1
    assert "has no adapters: leave out --adapters" in capsys.readouterr().err
    with_part = ["--adapters", "--part", "decoder"]
    assert main(["convert", str(outcome.directory), str(tmp_path / "part"), *with_part]) == 1
    assert "does not go with --part" in capsys.readouterr().err


def test_a_peft_adapter_that_does_not_fit_is_refused(lora_run, finished_run, tmp_path, capsys):
    """What fits is merged: tests/parity/test_lora_vs_peft.py."""
    _, outcome = lora_run
    base, peft = tmp_path / "base", tmp_path / "peft"
    assert main(["convert", str(finished_run.directory), str(base)]) == 0
    assert main(["convert", str(outcome.directory), str(peft), "--adapters"]) == 0
    merge = ["convert", str(base), str(tmp_path / "merged"), "--merge", str(peft)]
    assert main(merge) == 0
    expected = arrays(outcome.model)
    for name, array in arrays(stepjax.load(tmp_path / "merged")[0]).items():
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=1e-6)
    fields, tensors = (
        json.loads((peft / "adapter_config.json").read_text()),
        load_file(peft / "adapter_model.safetensors"),
    )
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    missing = {name: value for name, value in tensors.items() if name != key}
    other = missing | {key.replace("layers.0", "layers.7"): tensors[key]}
    narrow = tensors | {key: tensors[key][:, 1:].copy()}
    for changed, answer in (
        (
            (fields | {"use_dora": True}, tensors),
            "only plain LoRA is merged; this is 'LORA' of r=2, lora_alpha=16.0, use_dora",
        ),
        ((fields | {"peft_type": "IA3"}, tensors), "only plain LoRA is merged; this is 'IA3'"),
        ((fields, missing), "do not fit model.layers.0.self_attn.q_proj.weight"),
        ((fields, narrow), "do not fit model.layers.0.self_attn.q_proj.weight"),
        ((fields, other), f"has no place for {key.replace('layers.0', 'layers.7')}"),
    ):
        (peft / "adapter_config.json").write_text(json.dumps(changed[0]))
        save_file(changed[1], peft / "adapter_model.safetensors")
        capsys.readouterr()
        assert main([*merge, "--overwrite"]) == 1
        assert answer in capsys.readouterr().err
    assert main(["convert", str(finished_run.directory), str(tmp_path / "x"), "--merge", str(peft)]) == 1
    assert "is for a Hugging Face directory" in capsys.readouterr().err
