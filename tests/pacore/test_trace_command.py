"""`stepjax pacore trace`: outcomes made again from a run's directory, and the pages of a run."""

import json
import random
import re

import pytest
from upstream import Upstream, serving, text_of

from stepjax.cli import main
from stepjax.pacore.journal import Journal, outcomes
from stepjax.pacore.trace import page_name


class Endpoint(Upstream):
    """Answers by seed and prompt alone, and cites; some answers are empty or cut off."""

    def __init__(self, **options):
        super().__init__(self.said, stall_seconds=0.05, **options)

    def said(self, body):
        kind = random.Random(f"{body['seed']} {text_of(body['messages'])}")
        match kind.randrange(12):
            case 0:
                return {"content": "", "reasoning": "hm"}
            case 1:
                return {"content": None, "reasoning": "so long a", "finish_reason": "length"}
        return {"content": f"By Reference 2 it is \\boxed{{{kind.randrange(3)}}}", "reasoning": "hm, Reference 1"}


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "problems.jsonl"
    records = [
        {"id": name, "messages": [{"role": "user", "content": f"Question {name}"}], "ground_truth": str(i % 3)}
        for i, name in enumerate(("req_0", "a/b <c>", "REQ_0", "\u53c2\u8003", "last"))
    ]
    records[1]["responses"] = ["an earlier answer", "another one"]
    del records[4]["ground_truth"]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def made(monkeypatch):
    """What runs come to, as they know it themselves."""
    seen = {}
    append = Journal.append_outcome

    def append_outcome(self, outcome, matching):
        seen[outcome.problem.id, outcome.sample] = outcome
        append(self, outcome, matching)

    monkeypatch.setattr(Journal, "append_outcome", append_outcome)
    return seen


def run(problems, out, *options, **endpoint):
    with serving(Endpoint(**endpoint)) as upstream:
        given = ["--out", str(out), "--upstream.url", upstream.url, "--backoff-seconds", "0.005", *options]
        return main(["pacore", "run", str(problems), *given])


@pytest.mark.parametrize(
    "options",
    [
        ("--schedule", "6,3", "--samples", "2", "--use-responses"),
        ("--schedule", "none"),
        ("--schedule", "5", "--agreement", "0.4"),
        (
            "--schedule",
            "6,3",
            "--max-tokens",
            "20",
            "--upstream.max-context",
            "430",
            "--upstream.tokenizer",
            "TOKENIZER",
        ),
        (
            "--schedule",
            "6",
            "--max-tokens",
            "20",
            "--upstream.max-context",
            "380",
            "--upstream.tokenizer",
            "TOKENIZER",
            "--overflow",
            "drop",
        ),
        ("--schedule", "5", "--order", "length", "--retries", "0", "--no-fallback"),
        ("--method", "majority", "--width", "4"),
        ("--method", "best-of-n", "--width", "3", "--scorer", "longest"),
        ("--method", "sequential", "--width", "3"),
        ("--method", "rsa", "--width", "4", "--references", "2", "--loops", "3"),
    ],
    ids=" ".join,
)
def test_outcomes_are_read_from_the_directory(problems, tmp_path, made, tokenizer_file, options):
    options = [tokenizer_file if option == "TOKENIZER" else option for option in options]
    assert run(problems, tmp_path / "run", *options) == 0
    problems.unlink()
    read = list(outcomes(tmp_path / "run"))
    assert len(read) == len(made) >= 5 and all(made[each.problem.id, each.sample] == each for each in read)
    if "--upstream.max-context" in options:
        rounds = [round_ for each in read for round_ in each.rounds]
        lost = any(round_.losses.get("did_not_fit") for round_ in rounds)
        assert lost if "drop" in options else any(round_.cut_references for round_ in rounds)


def test_pages_and_their_table(problems, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(problems, out, "--schedule", "4,2", "--samples", "2") == 0
    capsys.readouterr()
    assert main(["pacore", "trace", str(out)]) == 0
    assert "10 pages, and a table of them in" in capsys.readouterr().out
    files = {file.name for file in (out / "traces").iterdir()}
    assert len(files) == 11 and len({name.lower() for name in files}) == 11
    table = (out / "traces" / "index.html").read_text()
    links = re.findall(r'"page":"([^"]+\.html)"', table)
    assert set(links) == files - {"index.html"} and r"a/b \u003cc\u003e" in table and "<c>" not in table
    assert "default-src 'none'" in table
    page = (out / "traces" / page_name("a/b <c>", 1)).read_text()
    assert "a/b &lt;c&gt;, sample 1" in page and "By " in page

    assert main(["pacore", "trace", str(out), "--problem", "last", "--out", str(tmp_path / "one")]) == 0
    assert {file.name for file in (tmp_path / "one").iterdir()} == {"last.html", "last.sample-1.html"}
    assert main(["pacore", "trace", str(out), "--problem", "last", "--no-reasoning"]) == 0
    small = (out / "traces" / "last.html").read_text()
    assert "hm, " not in small and "hm, " in (tmp_path / "one" / "last.html").read_text()


def test_a_run_that_goes_on_meanwhile(problems, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(problems, out, "--schedule", "3") == 0
    lines = (out / "calls.jsonl").read_bytes().splitlines(keepends=True)
    lost = next(i for i, line in enumerate(lines) if b'"problem":"last"' in line)
    (out / "calls.jsonl").write_bytes(b"".join([*lines[:lost], *lines[lost + 1 :]]) + b'{"problem":"la')
    before = (out / "calls.jsonl").read_bytes()
    assert main(["pacore", "trace", str(out)]) == 0
    shown = capsys.readouterr()
    assert "4 pages" in shown.out
    assert (out / "calls.jsonl").read_bytes() == before, "a run may be writing there"
    forgotten = {"problem": "req_0", "sample": 0, "forgotten": [[1, 0]]}
    (out / "calls.jsonl").write_bytes(b"".join([*lines, json.dumps(forgotten).encode() + b"\n"]))
    assert main(["pacore", "trace", str(out), "--problem", "req_0"]) == 1
    assert "--problem req_0" in capsys.readouterr().err


def test_a_problem_that_failed_has_a_page(problems, tmp_path, monkeypatch):
    monkeypatch.setattr(Endpoint, "said", lambda self, body: {"content": "", "reasoning": "hm"})
    assert run(problems, tmp_path / "run", "--schedule", "2", "--retries", "0") == 1
    assert main(["pacore", "trace", str(tmp_path / "run")]) == 0
    assert "round 1 left no message (2 empty)" in (tmp_path / "run" / "traces" / "req_0.html").read_text()
    assert (tmp_path / "run" / "traces" / "index.html").read_text().count('"error":true') == 5


def test_mistakes_are_named(problems, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["pacore", "trace"])
    assert "DIR" in capsys.readouterr().err
    assert main(["pacore", "trace", str(tmp_path)]) == 1
    assert "is not a run" in capsys.readouterr().err
    assert run(problems, tmp_path / "run", "--schedule", "none") == 0
    assert main(["pacore", "trace", str(tmp_path / "run"), "--problem", "nobody"]) == 1
    assert "--problem nobody" in capsys.readouterr().err
    (tmp_path / "run" / "run.json").write_text("{}")
    assert main(["pacore", "trace", str(tmp_path / "run")]) == 1
    assert "another version" in capsys.readouterr().err


def test_names_of_pages():
    ids = [
        "req_0",
        "REQ_0",
        "a/b",
        "a b",
        "a_b",
        "..",
        "",
        "index",
        "x" * 300,
        "x" * 301,
        "\ud800",
        "-x",
        "a_b.sample-1",
    ]
    names = [page_name(each, sample) for each in ids for sample in (0, 1)]
    assert len({name.lower() for name in names}) == len(names) and all(len(name) < 100 for name in names)
    assert all(re.fullmatch(r"[a-z0-9_-][a-z0-9._-]*\.html", name) for name in names)
