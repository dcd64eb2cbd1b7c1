"""Remakes every figure that a CPU can make, one script after the other: `make benchmarks`.

    python benchmarks/all.py [--only NAME ...] [--list]

Runs each script of this folder that writes to results/ with its default options, goes on after a failure, and says at
the end how long each took and which failed. A script without the package it compares with is skipped, since it would
overwrite its figures with half of them; name it in --only to run it all the same. Use a quiet machine. Together they
take hours: the demo trains, and libtpu compiles for four chips. gpu.py is for machines with a GPU (`make gpu`).
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
NEEDS = {
    "attention_schedules": "tokamax",
    "decode": "llama_cpp",
    "linear_cross_entropy": "tokamax",
    "plan_vs_maxtext": "maxtext",
    "rl_vs_trl": "trl",
    "tofc": "pillow_jxl",
    "train_step_vs_pytorch": "torch",
}


def scripts() -> dict[str, Path]:
    """The benchmarks by name: the scripts that write results."""
    return {
        path.stem: path
        for path in sorted(HERE.glob("*.py"))
        if path.name != Path(__file__).name and "machine.write(" in path.read_text()
    }


def main() -> int:
    found = scripts()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=found, metavar="NAME", help=", ".join(found))
    parser.add_argument("--list", action="store_true", help="print the names and what they need")
    args = parser.parse_args()
    if args.list:
        print("\n".join(f"{name:24}{NEEDS.get(name, '')}" for name in found))
        return 0
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    outcomes: list[tuple[str, float, str]] = []
    for name in args.only or found:
        needed = NEEDS.get(name)
        if needed and not args.only and importlib.util.find_spec(needed) is None:
            outcomes.append((name, 0.0, f"skipped: {needed} is not installed"))
            continue
        print(f"=== {name}", flush=True)
        began = time.monotonic()
        status = subprocess.run([sys.executable, str(found[name])], env=environment, cwd=HERE.parent).returncode
        outcomes.append((name, time.monotonic() - began, "done" if status == 0 else f"FAILED with status {status}"))
    print()
    for name, seconds, outcome in outcomes:
        print(f"{name:24}{seconds:8.0f} s  {outcome}")
    return 1 if any(outcome.startswith("FAILED") for *_, outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
