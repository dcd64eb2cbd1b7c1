"""Versions and machine, for a benchmark's results file."""

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def version(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe() -> dict[str, Any]:
    packages = ("stepjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    return {
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
        "cpu": cpu,
        "cores": os.cpu_count(),
        "system": platform.system(),
    }


def write(name: str, figures: dict[str, Any]) -> Path:
    """Write `figures` with the machine's description to results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": describe(), **figures}, indent=1) + "\n")
    return path
