"""Decoding STEP3-VL-10B on one TPU chip, in bfloat16 and with int8 weights, as planned: no TPU needed.

    python benchmarks/plan_int8.py

One token for every sequence, each with a full cache of 8,192 tokens. Writes results/plan_int8.json.
"""

import dataclasses
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # a plan uses no device

import machine

from stepjax.config import MeshConfig
from stepjax.config_file import load_recipe
from stepjax.planning.plan import make_plan
from stepjax.planning.topologies import find

RECIPE = Path(__file__).parents[1] / "configs" / "step3_vl_10b" / "pretrain.py"
CASES = (("v6e:1x1", 1), ("v6e:1x1", 8), ("v5e:1x1", 1), ("v5e:1x1", 4))  # chip, sequences


def main() -> None:
    recipe, figures = load_recipe(RECIPE), []
    print(f"{'chip':<10}{'sequences':>10}{'weights':>10}{'GiB':>8}{'of':>8}{'ms':>8}{'tokens/s':>10}")
    for chip, rows in CASES:
        batch = dataclasses.replace(recipe.batch, rows=rows, accumulation=1, tokens=8192)
        config = dataclasses.replace(recipe, batch=batch, mesh=MeshConfig(fsdp=1))
        for weights in (None, "int8"):
            plan = make_plan(config, find(chip, 1), kind="decode", weights=weights)
            step_ms = None if plan.estimate is None else 1e3 * plan.estimate.seconds
            name = weights or "bfloat16"
            found = {"chip": chip, "sequences": rows, "weights": name, "hbm_gib": plan.hbm_gib, "step_ms": step_ms}
            figures.append(found | {"hbm_limit_gib": plan.limit_gib, "tokens_per_second": plan.tokens_per_second})
            line = f"{chip:<10}{rows:>10}{name:>10}{plan.hbm_gib:>8.1f}{plan.limit_gib:>8.1f}"
            fast = "  does not fit" if step_ms is None else f"{step_ms:>8.1f}{plan.tokens_per_second:>10.0f}"
            print(line + fast, flush=True)
    path = machine.write("plan_int8", {"cache_tokens": 8192, "plans": figures})
    print(f"written to {path.relative_to(Path(__file__).parent.parent)}")


if __name__ == "__main__":
    main()
