"""Reading what a run of the tiny recipe leaves."""

import json
from pathlib import Path

RECIPE = Path(__file__).parent / "tiny_recipe.py"
PRETRAIN_ONLY = Path(__file__).parent / "tiny_pretrain_only.py"


def read_metrics(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def without_speed(row: dict) -> dict:
    """What must not depend on when or where a step was taken."""
    return {key: value for key, value in row.items() if not key.startswith("speed/")}


def steps_saved(directory: Path) -> list[int]:
    return sorted(int(path.name) for path in (directory / "checkpoints").glob("*") if path.name.isdigit())
