"""The README's figures: run the demo recipe from scratch as a user does; record time and accuracy.

    python benchmarks/pretrain_digits.py [--keep DIR]

Takes as long as `make pretrain`. Writes results/pretrain_digits.json: wall times, median rates, the loss curve and
held-out accuracy, and puts the contact sheet into docs/.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine

ROOT = Path(__file__).parent.parent
CURVE_POINTS = 40
RATES = (
    "step_seconds",
    "tokens_per_second",
    "images_per_second",
    "mfu",
    "data_wait",
    "packing/tokens",
    "packing/vision",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", help="keep the run in this directory")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(arguments.keep or temporary)
        figures = run(out)
        (ROOT / "docs").mkdir(exist_ok=True)
        shutil.copy(out / "digits" / "contact_sheet.png", ROOT / "docs" / "contact_sheet.png")
    path = machine.write("pretrain_digits", figures)
    print(f"\n{figures['total_seconds']:.0f} s in all, first step after {figures['first_step_seconds']} s")
    for name, value in figures["median"].items():
        print(f"  {name:<18} {value:.4g}")
    for result in figures["evaluation"]:
        print(f"  {result['name']:<18} {100 * result['accuracy']:.1f} % (chance {100 * result['chance']:.1f} %)")
    print(f"written to {path.relative_to(ROOT)}")


def run(out: Path) -> dict:
    command = [
        sys.executable,
        "-m",
        "stepjax.cli",
        "pretrain",
        str(ROOT / "configs/digits/pretrain.py"),
        "--out",
        str(out),
    ]
    start = time.monotonic()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stderr is not None
    first_step = None
    for line in process.stderr:
        sys.stderr.write(line)
        if line.startswith("first step done"):
            first_step = round(time.monotonic() - start)
    if process.wait() != 0:
        sys.exit("the run failed")
    total = time.monotonic() - start

    rows = [json.loads(line) for line in (out / "digits" / "metrics.jsonl").read_text().splitlines()]
    summaries = [row for row in rows if "speed/step_seconds" in row]
    stride = max(1, len(rows) // CURVE_POINTS)
    curve = []
    for i in range(0, len(rows), stride):
        part = rows[i : i + stride]
        keys = [key for key in part[0] if re.match(r"loss(/source/.*)?$", key)]
        means = {key: round(statistics.fmean(row[key] for row in part if key in row), 4) for key in keys}
        curve.append({"step": part[-1]["step"], **means})
    return {
        "command": "python benchmarks/pretrain_digits.py",
        "steps": rows[-1]["step"],
        "first_step_seconds": first_step,
        "total_seconds": round(total, 1),
        "median": {key: statistics.median(row[f"speed/{key}"] for row in summaries) for key in RATES},
        "evaluation": json.loads((out / "digits" / "evaluation.json").read_text())["results"],
        "curve": curve,
    }


if __name__ == "__main__":
    main()
