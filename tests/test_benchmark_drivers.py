"""benchmarks/gpu.py: a stage's time runs out, partial results are kept, and the wheels suit the requirements.
benchmarks/all.py: goes on after a failure.
"""

import importlib.util
import json
import os
import re
import sys
import time
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402

STAGE = """
import sys, time
for i in range(3):
    print("figures: " + '{"done": %d}' % i, flush=True)
print("a line of the program's own")
{end}
"""


def supervise(end: str, seconds: float = 60) -> tuple[gpu.Figures, list[gpu.Figures]]:
    written: list[gpu.Figures] = []
    command = [sys.executable, "-c", STAGE.replace("{end}", end)]
    return gpu.supervise(command, seconds, dict(os.environ), written.append), written


def test_figures_are_written_as_they_come():
    figures, written = supervise("")
    assert [each["done"] for each in written] == [0, 1, 2] and all(each["unfinished"] for each in written)
    assert figures["done"] == 2 and not {"unfinished", "cut", "failed"} & figures.keys()


def test_a_stage_out_of_time_is_killed_with_its_children_and_keeps_its_figures(tmp_path):
    child = tmp_path / "child"
    end = (
        f"import subprocess; p = subprocess.Popen(['sleep', '600']); open({str(child)!r}, 'w').write(str(p.pid))\n"
        "time.sleep(600)"
    )
    figures, _ = supervise(end, 15)  # a busy machine takes seconds to start it
    assert figures["done"] == 2 and figures["cut"].startswith("after 15 s") and "failed" not in figures
    state = Path(f"/proc/{child.read_text()}/stat")
    deadline = time.monotonic() + 30
    while (is_alive := _is_alive(state)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_alive


def _is_alive(state: Path) -> bool:
    try:
        return state.read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_stage_that_fails_keeps_its_figures_and_says_why():
    figures, _ = supervise("raise ValueError('out of memory')")
    assert figures["done"] == 2 and "out of memory" in figures["failed"]


def test_stages_share_the_time_and_pass_on_what_they_leave(tmp_path, monkeypatch, capsys):
    """Numerics takes none of its half, so attention may use it all; then nothing is left."""
    limits = []

    def take(command, seconds, environment, write):
        assert environment["STEPJAX_GPU_DRY"] == "1"
        limits.append(seconds)
        write({"first": 1, "unfinished": True})
        assert json.loads((tmp_path / "gpu_numerics.json").read_text())["first"] == 1
        return {"platform": "cpu", "first": 1} | ({"failed": "why"} if "attention" in command else {})

    monkeypatch.setattr(gpu, "supervise", take)
    monkeypatch.setattr(gpu, "STAGES", {"numerics": ("gpu_kernels.py", 30), "attention": ("gpu_kernels.py", 10)})
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry", "--seconds", "100", "--out", str(tmp_path)])
    assert gpu.main() == 1, "a stage failed"
    assert limits == [pytest.approx(75, abs=5), pytest.approx(100, abs=5)]
    written = json.loads((tmp_path / "gpu_numerics.json").read_text())
    assert set(written) == {"machine", "platform", "first"}
    assert {"versions", "load", "card", "cpu"} <= written["machine"].keys()
    assert "FAILED: attention" in capsys.readouterr().out


def test_wheels_are_pinned_and_meet_the_requirements():
    lines = (ROOT / "benchmarks" / "gpu_wheels.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [Requirement(text) for text in project["dependencies"] + project["optional-dependencies"]["full"]]
    ours = {requirement.name: requirement.specifier for requirement in wanted}
    assert {"grain", "pydantic", "tyro"} <= ours.keys() & pins.keys()
    for name in ours.keys() & pins.keys():
        assert pins[name] in ours[name], name


def test_remaking_figures_goes_on_after_a_failure_and_skips_halves(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("all_benchmarks", ROOT / "benchmarks" / "all.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert {"packing", "decode", "sampling"} <= module.scripts().keys() and "gpu" not in module.scripts()

    writes = "if 0: machine.write('', {})\n"
    for name, body in {"a_fails": "raise SystemExit(3)", "b_half": "", "c_works": "open('made', 'w')"}.items():
        (tmp_path / f"{name}.py").write_text(writes + body)
    (tmp_path / "machine.py").write_text("")
    monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.setattr(module, "NEEDS", {"b_half": "no_such_package"})
    monkeypatch.setattr(sys, "argv", ["all.py"])
    assert module.main() == 1
    outcomes = dict(re.findall(r"^(\w+) +\d+ s  (.*)$", capsys.readouterr().out, re.MULTILINE))
    assert outcomes == {
        "a_fails": "FAILED with status 3",
        "b_half": "skipped: no_such_package is not installed",
        "c_works": "done",
    }
    assert (tmp_path.parent / "made").exists()
