"""`stepjax pacore run` against an endpoint: its files, what it goes on with, and kills at any instant."""

import asyncio
import contextlib
import json
import multiprocessing
import random
import signal
import subprocess
import sys
import time

import pytest
from upstream import Upstream, answering, serving, text_of

from stepjax.cli import main
from stepjax.pacore.journal import CALLS

ENDPOINT = ("--upstream.url", "http://x", "--upstream.model", "m")
OPTIONS = ("--schedule", "4,2", "--backoff-seconds", "0.005")


class Endpoint(Upstream):
    """Answers by seed and prompt alone, after a moment; one that is not good says nothing now and then."""

    def __init__(self, *, delay=0.0, is_good=True, **options):
        super().__init__(self.said, stall_seconds=0.05, **options)
        self.delay, self.is_good = delay, is_good
        self.most = None  # requests that are answered; more wait until it is None again

    def said(self, body):
        kind = random.Random(f"{body['seed']} {text_of(body['messages'])}")
        text = f"{body['seed'] % 1000}, so \\boxed{{{kind.randrange(4)}}}"
        match kind.randrange(12) if not self.is_good else 2:
            case 0:
                return {"content": "", "reasoning": "hm"}
            case 1:
                return {"content": None, "reasoning": "so long a", "finish_reason": "length"}
            case 2 | 3:
                return {"content": f"half a pair \ud83d\u2028 {text}"}
        return {"content": text, "reasoning": "hm " * kind.randrange(5)}

    async def _chat(self, request):
        body = await request.json()
        await asyncio.sleep(self.delay * (1 + body["seed"] % 3))
        while self.most is not None and len(self.bodies) >= self.most:
            await asyncio.sleep(0.01)
        return await super()._chat(request)

    @property
    def seeds(self):
        return [body["seed"] for body in self.bodies]


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "problems.jsonl"
    records = [
        {"messages": [{"role": "user", "content": f"Question {i}"}], "ground_truth": str(i % 4), "category": "x"}
        for i in range(6)
    ]
    del records[5]["ground_truth"]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def arguments(problems, out, upstream, *options):
    return ["pacore", "run", str(problems), "--out", str(out), "--upstream.url", upstream.url, *OPTIONS, *options]


def files(out):
    return (out / "results.jsonl").read_bytes(), (out / "summary.json").read_bytes()


def rows(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_bytes().split(b"\n")[:-1]]


def test_results_and_summary(problems, tmp_path, capsys):
    out = tmp_path / "out"
    with serving(Endpoint()) as upstream:
        assert main(arguments(problems, out, upstream, "--samples", "2")) == 0
    shown = capsys.readouterr()
    made = rows(out)
    assert [(row["id"], row["sample"]) for row in made] == [(f"req_{i}", s) for i in range(6) for s in range(2)]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["is_complete"] and summary["answers"] == 12 and summary["scored_problems"] == 5
    for row in made:
        assert row["conversation"][0]["role"] == "user" and row["extra"] == {"category": "x"}
        assert [len(round_) for round_ in row["round_responses"]] == [4, 2, 1]
        lost = sum(row["losses"][0].values())
        assert len(row["responses"]) == 4 - lost
        if row["answered_by"] == "synthesis":
            assert row["final_response"] == row["round_responses"][2][0]["content"] and row["chosen"] == [2, 0]
        assert row["correct"] is (
            None if row["id"] == "req_5" else f"{{{int(row['id'][-1]) % 4}}}" in row["final_response"]
        )
    right = sum(bool(row["correct"]) for row in made)
    assert summary["accuracy"] == pytest.approx(right / 10) and f"{10 * right:.1f} % of 5" in shown.out
    assert summary["output_tokens"] == sum(row["usage"]["output_tokens"] for row in made) > 0
    assert [each["calls"] for each in summary["rounds"]] == [48, 24, 12]
    assert summary["output_tokens"] == sum(each["output_tokens"] for each in summary["rounds"])
    timing = json.loads((out / "timing.json").read_text())
    assert timing["drawn_calls"] == 84 and timing["answers_per_hour"] > 0
    for content in files(out):
        assert b"seconds" not in content and b"cached" not in content, "times and caches are timing.json's"


def test_what_a_server_says_of_tokens_does_not_end_a_run(problems, tmp_path, capsys):
    """And a model's name for how it ended does not reach the terminal."""
    with serving(Upstream()) as upstream:
        odd = {"prompt_tokens": "7", "completion_tokens": -3}
        upstream.responds = lambda body: answering(body, usage=odd, content="\x1b[2J 42", finish_reason="abort")
        command = arguments(problems, tmp_path / "out", upstream)
        for _ in range(2):
            assert main(command) == 0
        assert "abort" in capsys.readouterr().out and upstream.bodies
    assert all(row["usage"]["prompt_tokens"] == 0 for row in rows(tmp_path / "out"))


def test_answers_that_cannot_be_compared_are_counted_apart(problems, tmp_path, capsys):
    records = [json.loads(line) for line in problems.read_text().splitlines()]
    records[0]["ground_truth"] = r"\frac{"
    problems.write_text("".join(json.dumps(record) + "\n" for record in records))
    with serving(Endpoint()) as upstream:
        assert main(arguments(problems, tmp_path / "out", upstream, "--schedule", "none")) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["unjudged"] == 1 and summary["scored_problems"] == 4
    row = rows(tmp_path / "out")[0]
    assert row["correct"] is None and row["unjudged"] and "not judged" in capsys.readouterr().out


def test_results_are_problems_again(problems, tmp_path):
    with serving(Endpoint()) as upstream:
        assert main(arguments(problems, tmp_path / "first", upstream)) == 0
        again = arguments(tmp_path / "first" / "results.jsonl", tmp_path / "second", upstream, "--use-responses")
        asked = len(upstream.bodies)
        assert main(again) == 0
    first, second = rows(tmp_path / "first"), rows(tmp_path / "second")
    assert [row["conversation"] for row in first] == [row["conversation"] for row in second]
    assert [row["extra"] for row in second] == [{"category": "x"}] * 6
    assert all("Reference 1:" in text_of(body["messages"]) for body in upstream.bodies[asked:])


def test_a_run_goes_on_with_other_limits_but_not_with_another_seed(problems, tmp_path, capsys):
    out = tmp_path / "out"
    with serving(Endpoint()) as upstream:
        assert main(arguments(problems, out, upstream)) == 0
        before, asked = files(out), len(upstream.bodies)
        assert main(arguments(problems, out, upstream, "--retries", "1", "--concurrent-problems", "1")) == 0
        assert files(out) == before and len(upstream.bodies) == asked
        capsys.readouterr()
        assert main(arguments(problems, out, upstream, "--seed", "1", "--top-p", "0.9")) == 1
        error = capsys.readouterr().err
        assert "config.seed was 0, now 1" in error and "config.sampling.top_p was 1.0" in error
        assert main(arguments(problems, out, upstream, "--samples", "2")) == 0, "more samples may be added"
        assert [row for row in rows(out) if row["sample"] == 0] == [
            json.loads(line) for line in before[0].split(b"\n")[:-1]
        ]


def test_a_problem_that_fails_stops_no_other_and_is_tried_again_on_request(problems, tmp_path, capsys):
    out, is_down = tmp_path / "out", True

    class Failing(Endpoint):
        def fault(self, body):
            return "status 500" if is_down and "Question 2" in str(body["messages"]) else None

    with serving(Failing()) as upstream:
        command = arguments(problems, out, upstream, "--retries", "0")
        assert main(command) == 0
        made = rows(out)
        assert [row["error"] is not None for row in made] == [False, False, True, False, False, False]
        assert "round 1 left no message (4 error)" in made[2]["error"] and made[2]["correct"] is False
        assert made[2]["losses"] == [{"error": 4}] and made[2]["final_response"] is None
        assert "failed" in capsys.readouterr().out
        asked, is_down = len(upstream.bodies), False
        assert main(command) == 0 and len(upstream.bodies) == asked
        assert main([*command, "--retry-failed"]) == 0
        assert [row["error"] for row in rows(out)] == [None] * 6
        assert all("Question 2" in str(body["messages"]) for body in upstream.bodies[asked:])
        assert [row for row in rows(out) if row["id"] != "req_2"] == [row for row in made if row["id"] != "req_2"]


@pytest.mark.parametrize(
    "options, label",
    [
        (("--method", "single"), "single"),
        (("--method", "majority", "--width", "3"), "majority@3"),
        (("--method", "best-of-n", "--width", "3", "--scorer", "longest"), "best of 3 by longest"),
        (("--method", "sequential", "--width", "2"), "sequential@2"),
        (("--method", "rsa", "--width", "3", "--references", "2", "--loops", "2"), "RSA N=3 K=2 T=2"),
    ],
)
def test_every_method_runs(problems, tmp_path, options, label):
    with serving(Endpoint()) as upstream:
        assert main(arguments(problems, tmp_path / "out", upstream, *options)) == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["method"] == label


@pytest.mark.parametrize(
    "options, part",
    [
        ((), "neither of --model and --upstream.url"),
        (("--model", "m", *ENDPOINT), "both of --model and --upstream.url"),
        (("--upstream.url", "http://127.0.0.1:9/v1"), "--upstream.url http://127.0.0.1:9/v1"),
        ((*ENDPOINT, "--dtype", "float32"), "--dtype: no effect with --upstream.url"),
        (("--model", "m", "--upstream.no-streams"), "--upstream.streams: no effect with --model"),
        ((*ENDPOINT, "--limit", "0"), "--limit 0"),
        ((*ENDPOINT, "--template", "none.jinja"), "template 'none.jinja'"),
        ((*ENDPOINT, "--truncated", "tail"), "needs a sampler with a tokenizer"),
        ((*ENDPOINT, "--method", "best-of-n", "--scorer", "ground-truth"), "'req_5' has no ground_truth"),
        (("--model", "m", "--schedule", "2000"), "--engine.max-waiting 65536: 64 concurrent problems"),
        (("--model", "none"), "none: there is no such directory"),
    ],
)
def test_mistakes_are_one_line(problems, tmp_path, capsys, options, part):
    assert main(["pacore", "run", str(problems), "--out", str(tmp_path / "out"), *options]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("stepjax pacore run: ") and part in lines[-1]
    assert sum("stepjax pacore run: " in line for line in lines) == 1


@pytest.mark.parametrize(
    "options, part",
    [
        (("--upstream.url", "ftp://x"), "upstream 'ftp://x'"),
        (("--schedule", "4,x"), "schedule '4,x'"),
        (("--upstream.body", "[]"), "'[]' is not a JSON object"),
        (("--upstream.api-key", "k"), "Unrecognized options: --upstream.api-key"),
        (("--samples", "0"), "samples=0"),
        (("--n", "2"), "n=2: must be 1"),
    ],
)
def test_options_that_cannot_be_used_are_named(problems, tmp_path, capsys, options, part):
    with pytest.raises(SystemExit) as stop:
        main(["pacore", "run", str(problems), "--out", str(tmp_path / "out"), *options])
    assert stop.value.code == 2 and part in " ".join(capsys.readouterr().err.replace("\u2502", " ").split())


def test_usage(capsys):
    assert main(["pacore"]) == 2 and main(["pacore", "--help"]) == 0 and main(["pacore", "rum"]) == 2
    assert "no verb 'pacore rum'; did you mean 'pacore run'?" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["pacore", "run"])
    assert stop.value.code == 2


# Interruptions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_it_in_order(problems, tmp_path, number, status):
    out = tmp_path / "out"
    with serving(Endpoint()) as upstream:
        upstream.most = 12
        command = [
            sys.executable,
            "-m",
            "stepjax.cli",
            *arguments(problems, out, upstream, "--concurrent-problems", "2"),
        ]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        _wait(lambda: len(_journaled(out)) >= 6, process)
        process.send_signal(number)
        _, error = process.communicate(timeout=30)
        assert process.returncode == status and "Rerun the same command to resume" in error and "Traceback" not in error
        assert json.loads((out / "summary.json").read_text())["is_complete"] is False
        drawn, asked, upstream.most = _journaled(out), len(upstream.bodies), None
        assert main(arguments(problems, out, upstream)) == 0
        assert drawn and not drawn & set(upstream.seeds[asked:])
        assert main(arguments(problems, tmp_path / "whole", upstream)) == 0
    assert files(out) == files(tmp_path / "whole")


def test_killed_at_twenty_instants_it_ends_the_same(problems, tmp_path):
    """Real processes, killed as the kernel kills. All but two are forked of one that has imported what they need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["stepjax.pacore.command", "openai"])
    generator = random.Random(0)
    options = ("--samples", "2", "--upstream.max-concurrent", "6", "--concurrent-problems", "3")
    with serving(Endpoint(delay=0.01, is_good=False, fault_share=0.15)) as upstream:

        def command(out):
            return arguments(problems, out, upstream, *options)

        def start(out, *, is_fresh=False):
            if is_fresh:
                return _Fresh([sys.executable, "-m", "stepjax.cli", *command(out)])
            process = context.Process(target=main, args=(command(out),))
            process.start()
            return process

        reference = tmp_path / "reference"
        begin = time.monotonic()
        whole = start(reference)
        whole.join(60)
        seconds = time.monotonic() - begin
        expected = files(reference)
        all_seeds = set(upstream.seeds)

        kills, number, lives = 0, 0, []
        while kills < 20 or not lives[-1]:
            out = tmp_path / f"run{number}"
            drawn, asked = _journaled(out), len(upstream.bodies)
            process = start(out, is_fresh=kills in (3, 9))
            if kills < 20:
                longest = 2.0 if kills in (3, 9) else seconds / 4
                process.join(generator.uniform(0.02, longest))
                process.kill()  # of one that has ended, this does nothing
            process.join(60)
            seeds = upstream.seeds[asked:]
            assert not drawn & set(seeds), "what the journal has was asked again"
            assert set(seeds) <= all_seeds, "what no uninterrupted run would ask was asked"
            lives.append(process.exitcode == 0)
            if lives[-1]:
                assert files(out) == expected
                number += 1
            else:
                assert process.exitcode == -signal.SIGKILL
                kills += 1
    assert kills == 20


class _Fresh:
    """A process with an interpreter of its own, which is used as those of multiprocessing are."""

    def __init__(self, command):
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.kill = self._process.kill

    def join(self, seconds):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    @property
    def exitcode(self):
        return self._process.returncode


def _journaled(out):
    """Seeds of the trajectories whose lines are whole."""
    path = out / CALLS
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    records = map(json.loads, lines)
    return {record["trajectory"]["rollout"]["seed"] for record in records if "trajectory" in record}


def _wait(condition, process):
    end = time.monotonic() + 60
    while not condition():
        assert process.poll() is None and time.monotonic() < end, "it does not happen"
        time.sleep(0.01)
