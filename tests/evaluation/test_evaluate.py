"""Asking a model questions: the answers of the tiny run, whatever the batches."""

import dataclasses

import pytest
from tiny_recipe import config as tiny

from stepjax.config import DigitsSource, EvaluationConfig, JsonlSource
from stepjax.errors import ConfigError
from stepjax.evaluation import evaluate as evaluate_module
from stepjax.evaluation.evaluate import evaluate
from stepjax.evaluation.scoring import chance_level, score
from stepjax.inference.request import Completion
from stepjax.interop.load import load_run

pytest_plugins = ("tiny_run",)


@pytest.fixture(scope="module")
def model_and_processor(finished_run):
    model, processor, _ = load_run(finished_run.directory)
    return model, processor


def test_the_report_holds_every_question_and_counts_the_right_ones(model_and_processor, quick_runs):
    messages = []
    report = evaluate(*model_and_processor, tiny.evaluation, seed=0, progress=messages.append)
    assert [result.name for result in report.results] == ["transcribe", "arithmetic"]
    assert len(report.items) == 8
    for i, (source, result) in enumerate(zip(tiny.evaluation.sources, report.results, strict=True)):
        items = report.items[4 * i : 4 * i + 4]
        assert [item.record["id"] for item in items] == [f"digits/{source.task}/held_out/{j}" for j in range(4)]
        assert all(item.correct == score(item.record, item.text) for item in items)
        assert all((item.image is None) == (source.task == "arithmetic") for item in items)
        assert (result.correct, result.total) == (sum(item.correct for item in items), 4)
        assert result.chance == chance_level(source)
        assert messages[i] == f"evaluated {source.name}: {result.correct}/4 right"


def test_batches_do_not_change_the_answers(model_and_processor, quick_runs):
    whole = evaluate(*model_and_processor, tiny.evaluation, seed=0)
    split = evaluate(*model_and_processor, dataclasses.replace(tiny.evaluation, batch_size=3), seed=0)
    assert [item.text for item in split.items] == [item.text for item in whole.items]
    assert split.results == whole.results


def test_right_answers_are_counted(model_and_processor, monkeypatch):
    """With an oracle in the model's place, which knows all but one."""
    model, processor = model_and_processor
    source = tiny.evaluation.sources[1]
    records = evaluate_module.open_source(source, 3)
    answers = iter([records[i]["answer"]["text"] for i in range(4)] + ["no idea"])

    class Oracle:
        def __init__(self, *_):
            pass

        def generate(self, prompts, params):
            return [[Completion(0, (), next(answers), "stop")] for _ in prompts]

    monkeypatch.setattr(evaluate_module, "Engine", Oracle)
    config = EvaluationConfig(sources=(source,), examples=5, batch_size=2)
    report = evaluate(model, processor, config, seed=3)
    assert (report.results[0].correct, report.results[0].total) == (4, 5)
    assert [item.correct for item in report.items] == [True] * 4 + [False]


def test_the_train_split_asks_other_questions(model_and_processor, quick_runs):
    sources = tuple(dataclasses.replace(source, split="train") for source in tiny.evaluation.sources)
    report = evaluate(*model_and_processor, dataclasses.replace(tiny.evaluation, sources=sources), seed=0)
    assert all("/train/" in item.record["id"] for item in report.items)
    assert sum(result.total for result in report.results) == 8


def test_no_sources_and_sources_that_cannot_be_scored_are_refused(model_and_processor):
    with pytest.raises(ConfigError, match=r"evaluation.sources=\(\): name at least one source"):
        evaluate(*model_and_processor, EvaluationConfig(), seed=0)
    docs = JsonlSource(name="docs", weight=1.0, path="docs.jsonl")
    with pytest.raises(ConfigError, match="evaluation.sources.docs"):
        EvaluationConfig(sources=(DigitsSource(name="a", weight=1.0, task="count"), docs))
