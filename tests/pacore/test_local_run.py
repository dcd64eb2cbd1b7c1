"""`stepjax pacore run` with the engine in this process and a tiny model, images included."""

import json

import pytest
from PIL import Image
from tiny_checkpoint import write_tiny_checkpoint

from stepjax.cli import main
from stepjax.inference.engine import Engine
from stepjax.pacore.journal import CALLS

ENGINE = (
    *("--engine.max-sequences", "4", "--engine.max-context", "768", "--engine.page-size", "16"),
    *("--engine.prefill-tokens", "64", "--engine.max-prefix-groups", "1", "--dtype", "float32"),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    folder = tmp_path_factory.mktemp("problems")
    Image.new("RGB", (60, 40), "teal").save(folder / "teal.png")
    shown = [{"type": "image", "image": "teal.png"}, {"type": "text", "text": "What is it?"}]
    records = [
        {"problem": "What is 6 x 7?", "ground_truth": 42},
        {"messages": [{"role": "user", "content": shown}], "id": "image"},
    ]
    (folder / "problems.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder / "problems.jsonl"


@pytest.fixture(scope="module")
def command(model, problems):
    def command(out, *options):
        return [
            *("pacore", "run", str(problems), "--out", str(out), "--model", str(model), "--thinking", "False"),
            *("--max-tokens", "12", *ENGINE, *options),
        ]

    return command


def rows(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_bytes().splitlines()]


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    assert main(command(out, "--schedule", "3,2")) == 0
    return out


def test_text_and_images_go_through_all_rounds(whole, problems):
    text, image = rows(whole)
    assert text["error"] is None and text["correct"] is False and image["correct"] is None
    for row in (text, image):
        assert [len(round_) for round_ in row["round_responses"]] == [3, 2, 1] and row["final_response"]
        assert row["usage"]["output_tokens"] == sum(e["output_tokens"] for r in row["round_responses"] for e in r) > 0
    assert image["conversation"][0]["content"][0] == {"type": "image", "image": str(problems.parent / "teal.png")}
    prompts = [row["round_responses"][0][0]["prompt_tokens"] for row in (text, image)]
    assert prompts[1] >= prompts[0] + 7, "the image's features are in the prompt, and its question is shorter"
    synthesis = image["round_responses"][1][0]["prompt_tokens"]
    assert synthesis > prompts[1] + 30, "and in that of the synthesis, with the references"


def test_a_run_that_was_cut_off_ends_the_same(whole, command, tmp_path):
    lines = (whole / CALLS).read_bytes().splitlines(keepends=True)
    (tmp_path / "run.json").write_bytes((whole / "run.json").read_bytes())
    (tmp_path / CALLS).write_bytes(b"".join(lines[:5]) + lines[5][:40])
    assert main(command(tmp_path, "--schedule", "3,2")) == 0
    for name in ("results.jsonl", "summary.json"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    assert (tmp_path / CALLS).read_bytes().startswith(b"".join(lines[:5]))


def test_an_engine_that_fails_ends_the_run_and_nothing_of_it_is_journaled(
    whole, command, tmp_path, monkeypatch, capsys
):
    step, left = Engine.step, iter(range(20))

    def dying(self):
        if next(left, None) is None:
            raise RuntimeError("INTERNAL: the device is lost\nand much more")
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", dying)
        assert main(command(tmp_path, "--schedule", "3,2")) == 70
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == (
        "stepjax pacore run: the engine failed: RuntimeError: INTERNAL: the device is lost; rerun the same command to "
        "resume"
    ), said
    assert not any("Traceback" in line for line in said)
    assert all(json.loads(line).get("status") != "error" for line in (tmp_path / CALLS).read_text().splitlines())
    assert main(command(tmp_path, "--schedule", "3,2")) == 0
    for name in ("results.jsonl", "summary.json"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


def test_best_of_n_by_the_models_own_probability(command, tmp_path):
    assert main(command(tmp_path, "--method", "best-of-n", "--width", "3", "--limit", "1")) == 0
    [row] = rows(tmp_path)
    scores = [each["mean_logprob"] for each in row["round_responses"][0]]
    assert row["chosen"] == [0, scores.index(max(scores))] and row["answered_by"] == "score"
