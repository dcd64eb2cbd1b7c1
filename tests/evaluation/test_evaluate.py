"""Asking a model questions: the answers of the tiny run, whatever the batches."""

import dataclasses
import json
import logging
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_recipe import config as tiny

from stepjax.cli import main
from stepjax.config import EvaluationConfig, JsonlSource, MeshConfig
from stepjax.data.records import open_source
from stepjax.errors import ConfigError, RecordError
from stepjax.evaluation import evaluate as evaluate_module
from stepjax.evaluation.evaluate import evaluate
from stepjax.evaluation.scoring import chance_level
from stepjax.inference.request import Completion
from stepjax.interop.load import load_run
from stepjax.rewards.verify import is_right
from stepjax.sharding import make_mesh, shardings

pytest_plugins = ("tiny_run",)


@pytest.fixture(scope="module")
def model_and_processor(finished_run):
    model, processor, _ = load_run(finished_run.directory)
    return model, processor


def test_the_report_holds_every_question_and_counts_the_right_ones(model_and_processor, quick_runs, caplog):
    caplog.set_level(logging.INFO, "stepjax")
    report = evaluate(*model_and_processor, tiny.evaluation, seed=0)
    assert [result.name for result in report.results] == ["transcribe", "arithmetic"]
    assert len(report.items) == 8
    for i, (source, result) in enumerate(zip(tiny.evaluation.sources, report.results, strict=True)):
        items = report.items[4 * i : 4 * i + 4]
        assert [item.record["id"] for item in items] == [f"digits/{source.task}/held_out/{j}" for j in range(4)]
        assert all(item.correct == is_right(item.record, item.text) for item in items)
        assert all((item.image is None) == (source.task == "arithmetic") for item in items)
        assert (result.correct, result.total) == (sum(item.correct for item in items), 4)
        assert result.chance == chance_level(source)
        assert caplog.messages[i] == f"evaluated {source.name}: {result.correct}/4 right"


def test_batches_do_not_change_the_answers(model_and_processor, quick_runs):
    whole = evaluate(*model_and_processor, tiny.evaluation, seed=0)
    split = evaluate(*model_and_processor, dataclasses.replace(tiny.evaluation, batch_size=3), seed=0)
    assert [item.text for item in split.items] == [item.text for item in whole.items]
    assert split.results == whole.results


def test_copies_of_the_model_answer_on_one_device(small_model):
    """Copies on all devices would each compute the same answers; shards need all devices."""

    def on(devices, **axes):
        mesh = make_mesh(MeshConfig(**axes), jax.devices()[:devices])
        return jax.device_put(small_model, shardings(small_model, mesh))

    mesh = evaluate_module._one_device(on(2, data=2, fsdp=1))
    assert mesh is not None and list(mesh.devices.flat) == jax.devices()[:1]
    assert evaluate_module._one_device(on(2, fsdp=2)) is None
    assert evaluate_module._one_device(on(1)) is None


def test_right_answers_are_counted(model_and_processor, monkeypatch):
    """With an oracle in the model's place, which knows all but one and is cut off in its reasoning at another."""
    model, processor = model_and_processor
    source = tiny.evaluation.sources[1]
    records = evaluate_module.open_source(source, 3)
    known = [records[i]["answer"]["text"] for i in range(4)]  # the prompt has opened <think>
    answers = iter([f"hm</think>{text}" for text in known[:3]] + ["hm</think>no idea", known[3]])

    class Oracle:
        def __init__(self, *_, **__):
            pass

        def generate(self, prompts, params):
            return [[Completion("request", 0, text=next(answers), finish_reason="stop")] for _ in prompts]

    monkeypatch.setattr(evaluate_module, "Engine", Oracle)
    config = EvaluationConfig(sources=(source,), examples=5, batch_size=2)
    report = evaluate(model, processor, config, seed=3)
    assert (report.results[0].correct, report.results[0].total) == (3, 5)
    assert [item.correct for item in report.items] == [True] * 3 + [False] * 2


def test_the_train_split_asks_other_questions(model_and_processor, quick_runs):
    sources = tuple(dataclasses.replace(source, split="train") for source in tiny.evaluation.sources)
    report = evaluate(*model_and_processor, dataclasses.replace(tiny.evaluation, sources=sources), seed=0)
    assert all("/train/" in item.record["id"] for item in report.items)
    assert sum(result.total for result in report.results) == 8


def test_no_sources_are_refused(model_and_processor):
    with pytest.raises(ConfigError, match=r"evaluation.sources=\(\): name at least one source"):
        evaluate(*model_and_processor, EvaluationConfig(), seed=0)


@pytest.fixture(scope="module")
def own_data(tmp_path_factory):
    """Questions with and without an image, and documents."""
    folder = tmp_path_factory.mktemp("data")
    Image.new("RGB", (40, 30), "white").save(folder / "white.png")
    image = {"type": "image", "image": "white.png"}
    records = [
        {"messages": _turns([image, {"type": "text", "text": "Colour?"}], "white")},
        {"messages": _turns("What is 1 + 1?", "two"), "answer": ["2", "two"]},
        {"text": "A document."},
        {
            "content": [
                {"type": "text", "text": "A longer document, "},
                image,
                {"type": "text", "text": "with an image"},
            ]
        },
    ]
    path = folder / "own.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def _turns(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_any_source_can_be_evaluated(model_and_processor, own_data, quick_runs, caplog):
    model, processor = model_and_processor
    source = JsonlSource(name="own", weight=1.0, path=str(own_data))
    caplog.set_level(logging.INFO, "stepjax")
    config = dataclasses.replace(tiny.evaluation, sources=(source,))
    report = evaluate(model, processor, config, seed=0)
    (result,) = report.results
    assert (result.total, result.chance, len(report.items)) == (2, None, 2)
    assert [item.image is None for item in report.items] == [False, True]

    # The loss of the documents, token by token from the logits of each alone.
    total = weight = 0.0
    for i in (2, 3):
        example = processor.process(open_source(source, 0)[i])
        hidden = jax.jit(model.__call__)(
            tokens_BT=example.tokens[None],
            positions_BT=np.arange(len(example.tokens))[None],
            feature_index_BT=example.feature_index[None],
            global_views_BGHWC=example.global_views[None],
            crops_BCHWC=example.crops[None],
        )
        logits = np.asarray(model.decoder.logits(hidden)[0], np.float64)
        chosen = jax.nn.log_softmax(logits)[np.arange(len(logits) - 1), example.tokens[1:]]
        total -= float(np.sum(chosen * example.loss_weights[1:]))
        weight += example.loss_weights.sum()
    assert result.loss == pytest.approx(total / weight, rel=1e-5)
    assert caplog.messages == [f"evaluated own: {result.correct}/2 right, loss {result.loss:.4f} on 2 documents"]


def test_a_document_longer_than_the_model_is_named(model_and_processor, tmp_path):
    (tmp_path / "long.jsonl").write_text(json.dumps({"id": "novel", "text": "word " * 5000}) + "\n")
    source = JsonlSource(name="long", weight=1.0, path=str(tmp_path / "long.jsonl"))
    with pytest.raises(RecordError, match="record 'novel' has .* tokens, and the model"):
        evaluate(*model_and_processor, EvaluationConfig(sources=(source,)), seed=0)


def test_from_the_command_line(finished_run, own_data, capsys, tmp_path, quick_runs):
    run = tmp_path / "run"
    shutil.copytree(finished_run.directory, run)
    assert main(["eval", str(run), "--data", str(own_data)]) == 0
    assert "own" in capsys.readouterr().out
    (row,) = json.loads((run / "evaluation.json").read_text())["results"]
    assert row["name"] == "own" and row["total"] == 2 and row["loss"] > 0
    assert main(["eval", str(run), "--data", str(own_data), "--split", "train"]) == 1
    assert "--split train: own has no splits" in capsys.readouterr().err
