"""The command line: every mistake is answered with one line and a status, and what is no mistake is not hidden."""

import json
import os
import signal
import subprocess
import sys

import pytest
from PIL import Image
from run_files import RECIPE

import stepjax
from stepjax.cli import VERBS, main
from stepjax.evaluation.command import Eval
from stepjax.inference.request import Delta, SamplingParams
from stepjax.training.checkpoint import Checkpointer, read_meta

pytest_plugins = ("tiny_run",)


def assert_one_line(capsys, status, *parts, verb):
    """The answer to a user's mistake."""
    assert status == 1
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert lines[-1].startswith(f"stepjax {verb}: ") and "Traceback" not in captured.err
    assert sum(line.startswith("stepjax ") for line in lines) == 1
    for part in parts:
        assert part in lines[-1]


# Usage ---------------------------------------------------------------------------------------------------------------


def test_help_of_all_verbs_fits_a_screen(capsys):
    assert main([]) == 2
    usage = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == usage
    lines = usage.splitlines()
    assert len(lines) <= 32 and max(map(len, lines)) <= 100
    for verb in VERBS:
        (line,) = [line for line in lines if line.startswith(f"  {verb:<15}")]
        assert len(line.split()) > len(verb.split()) + 3, "says what it does"


def test_help_of_a_group_lists_its_verbs(capsys):
    assert main(["pacore"]) == 2
    usage = capsys.readouterr().out
    assert main(["pacore", "--help"]) == 0
    assert capsys.readouterr().out == usage
    assert usage.startswith("usage: stepjax pacore ...") and all(f"  pacore {v} " in usage for v in ("run", "trace"))


def test_every_verb_is_a_dataclass_of_options_that_does_not_import_jax():
    program = "import sys, dataclasses, importlib; from stepjax.cli import VERBS\n"
    program += f"for path in {list(VERBS.values())}:\n    module, name = path.split(':')\n"
    program += "    assert dataclasses.is_dataclass(getattr(importlib.import_module(module), name))\n"
    program += "assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"stepjax {stepjax.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["pretrian"], "stepjax: no verb 'pretrian'; did you mean 'pretrain'?\n"),
        (["pacore", "rum"], "stepjax: no verb 'pacore rum'; did you mean 'pacore run'?\n"),
        (["dance"], f"stepjax: no verb 'dance'; choose from {', '.join(VERBS)}\n"),
        (["\x1b[2J"], f"stepjax: no verb '\\x1b[2J'; choose from {', '.join(VERBS)}\n"),
    ],
)
def test_an_unknown_verb_is_answered_with_the_nearest(arguments, answer, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr().err == answer


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["pretrain", "--help"], "--dry-run"),
        (["pretrain", str(RECIPE), "--help"], "--optimizer.weight-decay FLOAT"),
        (["pretrain", "--help", str(RECIPE)], "stepjax pretrain RECIPE --help"),
        (["eval", "--help"], "--split {None,train,held_out}"),
        (["generate", "--help"], "--prompt STR"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_help_of_a_verb_lists_its_options(arguments, field, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 0
    assert field in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["pretrain", str(RECIPE), "--checkpont.every", "3"], "--checkpoint.every"),
        (["pretrain", str(RECIPE), "--optimizer.lerning-rate", "3"], "--optimizer.learning-rate-scales"),
        (["pretrain"], "RECIPE"),
        (["eval", "runs/x", "--exmples", "3"], "--examples"),
        (["eval", "runs/x", "--split", "test"], "held_out"),
        (["generate", "runs/x", "--promt", "hello"], "--prompt"),
        (["generate", "runs/x"], "--prompt"),
        (["generate", "runs/x", "--prompt", "a", "--max-tokens", "0"], "max_tokens=0: must be at least 1"),
        (["generate", "runs/x", "--prompt", "a", "--temperature", "-1"], "temperature=-1.0: must be 0 or more"),
        (["eval"], "RUN"),
        (["pretrain", str(RECIPE), "--seed", "99999999999999999999"], "seed=99999999999999999999: must be from 0"),
        (["serve", "m", "--port", "99999"], "--port 99999: must be"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_usage_is_answered_with_what_was_meant(arguments, answer, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert answer in capsys.readouterr().err


# Recipes -------------------------------------------------------------------------------------------------------------


def test_recipes_that_cannot_be_used(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(RECIPE.parent.parent)
    assert_one_line(
        capsys,
        main(["pretrain", "configs/digits.py"]),
        "'configs/digits.py'",
        "configs/digits/pretrain.py",
        verb="pretrain",
    )
    for other in ("README.md", "configs", "configs/digits"):
        assert_one_line(capsys, main(["pretrain", other]), f"{other!r} is not a recipe file", verb="pretrain")
    recipe = tmp_path / "recipe.py"
    recipe.write_text("import sys\nsys.exit(3)\n")
    assert_one_line(capsys, main(["pretrain", str(recipe)]), "recipe.py, line 2 fails: SystemExit: 3", verb="pretrain")
    recipe.write_text("raise RuntimeError('no data today')\n")
    assert_one_line(
        capsys, main(["pretrain", str(recipe)]), "recipe.py, line 1", "RuntimeError: no data today", verb="pretrain"
    )
    recipe.write_text("settings = 1\n")
    assert_one_line(
        capsys, main(["pretrain", str(recipe)]), "`config` must be of class PretrainConfig", verb="pretrain"
    )


def test_a_recipe_is_run_by_the_verb_of_its_kind(tmp_path, capsys):
    assert_one_line(capsys, main(["sft", str(RECIPE)]), "`config` must be of class SftConfig", verb="sft")
    stage = str(RECIPE.parent.parent / "configs/step3_vl_10b/sft_stage1.py")
    assert_one_line(capsys, main(["pretrain", stage]), f"run `stepjax sft {stage}`", verb="pretrain")
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from stepjax.config import *\nfrom tiny_recipe import config as tiny\n"
        "config = SftConfig(**{field.name: getattr(tiny, field.name) for field in dataclasses.fields(tiny)})\n"
    )
    assert_one_line(capsys, main(["sft", str(recipe)]), "init_from.path=None: name the run or model", verb="sft")


def test_dry_run_prints_a_page_and_writes_nothing(tmp_path, capsys):
    arguments = ["pretrain", str(RECIPE), "--dry-run", "--out", str(tmp_path), "--seed", "5"]
    assert main(arguments) == 0
    page = capsys.readouterr().out
    assert "parameters  79,248" in page and "seed: 0 -> 5" in page and f"would live in {tmp_path}/tiny" in page
    assert not list(tmp_path.iterdir())


# Training ------------------------------------------------------------------------------------------------------------


def test_a_run_is_trained_evaluated_and_drawn(finished_run):
    assert f"override  out: 'runs' -> '{finished_run.out}'" in finished_run.stdout
    assert "tiny, step 16\n" in finished_run.stdout
    for task in ("transcribe", "arithmetic"):
        (line,) = [line for line in finished_run.stdout.splitlines() if line.startswith(task)]
        assert "/4" in line
    table = json.loads((finished_run.directory / "evaluation.json").read_text())
    assert table["title"] == "step 16"
    assert [(row["name"], row["total"]) for row in table["results"]] == [("transcribe", 4), ("arithmetic", 4)]
    for row in table["results"]:
        assert row["accuracy"] == row["correct"] / row["total"]
    with Image.open(finished_run.directory / "contact_sheet.png") as sheet:
        assert sheet.format == "PNG" and min(sheet.size) > 300


def test_a_finished_run_is_evaluated_again_and_not_trained(finished_run, capsys, quick_runs):
    metrics = (finished_run.directory / "metrics.jsonl").read_bytes()
    assert main(["pretrain", str(RECIPE), "--out", str(finished_run.out)]) == 0
    captured = capsys.readouterr()
    assert "nothing to train" in captured.err
    assert captured.out == finished_run.stdout
    assert (finished_run.directory / "metrics.jsonl").read_bytes() == metrics


def test_another_configuration_is_refused(finished_run, capsys, quick_runs):
    status = main(["pretrain", str(RECIPE), "--out", str(finished_run.out), "--schedule.phases.0.start", "0.1"])
    assert_one_line(capsys, status, "schedule.phases.0.start: 0.003 -> 0.1", "--name", verb="pretrain")


def test_divergence_is_one_line(tmp_path, capsys, quick_runs):
    diverging = ["--schedule.phases.0.start", "1e30", "--schedule.warmup-tokens", "0", "--optimizer.clip-norm", "None"]
    status = main(["pretrain", str(RECIPE), "--out", str(tmp_path), *diverging])
    assert_one_line(capsys, status, "not finite at step 2 (checked steps 1 to 2)", verb="pretrain")


def test_an_output_that_cannot_be_made_is_one_line(tmp_path, capsys, quick_runs):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "below", tmp_path / "file", "/proc/none"):
        status = main(["pretrain", str(RECIPE), "--out", str(out)])
        assert_one_line(capsys, status, f"{out}/tiny cannot be made or written: ", "--out", verb="pretrain")
    (tmp_path / "tiny" / "checkpoints").mkdir(parents=True)
    (tmp_path / "tiny" / "metrics.jsonl").mkdir()
    status = main(["pretrain", str(RECIPE), "--out", str(tmp_path)])
    assert_one_line(capsys, status, f"{tmp_path}/tiny/metrics.jsonl: Is a directory", "saved is none", verb="pretrain")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_with_its_status(tmp_path, capsys, monkeypatch, number, status, quick_runs):
    save = Checkpointer.save

    def save_and_signal(self, step, *args, **kwargs):
        if step == 4:
            os.kill(os.getpid(), number)
        return save(self, step, *args, **kwargs)

    monkeypatch.setattr(Checkpointer, "save", save_and_signal)
    assert main(["pretrain", str(RECIPE), "--out", str(tmp_path)]) == status
    captured = capsys.readouterr()
    assert f"{number.name}: saved step 5 in " in captured.err and "Rerun the same command to resume" in captured.err
    assert "accuracy" not in captured.out


# A trained run -------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy_of_run(finished_run, tmp_path):
    """A run that may be written to: its checkpoints are shared."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(finished_run.directory / "checkpoints")
    return tmp_path / "run"


def test_eval_scores_as_many_questions_as_asked_of_a_split(copy_of_run, capsys, quick_runs):
    assert main(["eval", str(copy_of_run), "--examples", "2", "--split", "train"]) == 0
    assert "tiny, train data\n" in capsys.readouterr().out
    table = json.loads((copy_of_run / "evaluation.json").read_text())
    assert [row["total"] for row in table["results"]] == [2, 2]
    assert (copy_of_run / "contact_sheet.png").exists()


def test_eval_agrees_with_the_evaluation_of_the_run(copy_of_run, finished_run, capsys, quick_runs):
    assert main(["eval", str(copy_of_run)]) == 0
    mine, run = (json.loads((d / "evaluation.json").read_text()) for d in (copy_of_run, finished_run.directory))
    assert mine["results"] == run["results"]


def test_generate_answers_text_and_images(copy_of_run, tmp_path, capsys, quick_runs):
    arguments = ["generate", str(copy_of_run), "--prompt", "What is 1 + 1?", "--max-tokens", "4"]
    assert main(arguments) == 0
    greedy = capsys.readouterr()
    assert greedy.out.endswith("\n")
    assert main(arguments) == 0
    assert capsys.readouterr() == greedy
    for name in ("a.png", "b.png"):
        Image.new("RGB", (30, 15), "white").save(tmp_path / name)
    assert main([*arguments, "--image", str(tmp_path / "a.png"), str(tmp_path / "b.png"), "--temperature", "1"]) == 0


def test_generate_tells_several_samples_apart_and_what_was_cut_off(copy_of_run, capsys, monkeypatch):
    class Samples:
        has_work = True

        def __init__(self, *_, donate):
            assert donate  # nothing else uses the model

        def submit(self, prompt, params):
            assert params == SamplingParams(n=2, temperature=0.5, top_p=0.9, seed=3, max_tokens=7)

        def step(self):
            self.has_work = False
            return [
                Delta("a", 1, text="so", finish_reason="length"),
                Delta("a", 0, text="a c"),
                Delta("a", 0, text="at", finish_reason="stop"),
            ]

    monkeypatch.setattr("stepjax.inference.engine.Engine", Samples)
    options = ["--n", "2", "--temperature", "0.5", "--top-p", "0.9", "--seed", "3", "--max-tokens", "7"]
    assert main(["generate", str(copy_of_run), "--prompt", "?", *options]) == 0
    captured = capsys.readouterr()
    assert captured.out == "[1] a cat\n[2] so\n" and "cut off after --max-tokens 7" in captured.err


def test_what_eval_and_generate_cannot_use(copy_of_run, tmp_path, capsys, quick_runs):
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    ask = ["--prompt", "What is it?"]
    for verb, rest in (("eval", []), ("generate", ask)):
        assert_one_line(capsys, main([verb, str(tmp_path / "none"), *rest]), "none", verb=verb)
        assert_one_line(capsys, main([verb, str(tmp_path / "empty"), *rest]), "no complete checkpoint", verb=verb)
    assert_one_line(capsys, main(["eval", str(copy_of_run), "--examples", "0"]), "--examples 0", verb="eval")
    generate = ["generate", str(copy_of_run), *ask]
    missing, text = tmp_path / "missing.png", tmp_path / "text.png"
    text.write_text("not a picture")
    for arguments, part in {
        ("--image", str(missing)): "no such file",
        ("--image", str(text)): "not an image in a known format",
        ("--image", str(tmp_path)): "image 0",
        ("--max-tokens", "1000"): "context of 512",
        ("--logprobs", "1"): "--logprobs 1: this command prints only text",
    }.items():
        assert_one_line(capsys, main([*generate, *arguments]), part, verb="generate")


def test_a_checkpoint_of_another_version_is_refused_by_the_field(finished_run, tmp_path, capsys, monkeypatch):
    old = {"config": {"name": "old", "epochs": 3}}
    monkeypatch.setattr("stepjax.interop.orbax_directory.read_meta", lambda path: read_meta(path) | old)
    assert_one_line(capsys, main(["eval", str(finished_run.directory)]), "data: Field required", verb="eval")


# What is no user's mistake -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("surprise", "status", "line", "has_traceback"),
    [
        (KeyboardInterrupt(), 130, "stepjax eval: stopped by SIGINT", False),
        (
            OSError(28, "No space left on device", "a/b"),
            1,
            "stepjax eval: a/b cannot be read or written: No space",
            False,
        ),
        (PermissionError(13, "Permission denied"), 1, "stepjax eval: a file cannot be read or written: Perm", False),
        (MemoryError(), 1, "stepjax eval: out of memory", False),
        (RuntimeError("why"), 1, "stepjax eval: internal error, please report it: RuntimeError: why", True),
        (AssertionError(), 1, "stepjax eval: internal error, please report it: AssertionError: ", True),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_surprises_end_with_a_status_and_a_line(monkeypatch, capsys, surprise, status, line, has_traceback):
    """A fault of ours keeps its traceback, which a report of it needs."""

    def fail(_):
        raise surprise

    monkeypatch.setattr(Eval, "run", fail)
    assert main(["eval", "runs/x"]) == status
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith(line)
    assert ("Traceback" in said) == has_traceback


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    """As in `stepjax ... | head`."""
    program = "import sys; sys.argv = ['stepjax', 'eval', 'x']; from stepjax.evaluation.command import Eval; "
    program += "from stepjax.cli import main; Eval.run = lambda _: print('x' * 100_000) or 0; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait(60) == 1 and process.stderr.read() == ""
    process.stderr.close()
