"""Fine-tune the demo's model, stage 1: add up digits and compare, in text.

Nine tenths are text, as in the report's first stage: without images to read, a model learns in few and cheap steps to
add, to copy and to compare. The rest keeps it from forgetting how to read.
"""

import dataclasses
from pathlib import Path

from stepjax.config import BatchConfig, DataConfig, DigitsSource, EvaluationConfig, InitConfig, Phase, ScheduleConfig
from stepjax.config_file import load_recipe

base = load_recipe(Path(__file__).with_name("pretrain.py"))

config = dataclasses.replace(
    base,
    name="digits_sft_stage1",
    init_from=InitConfig(path="runs/digits"),
    data=DataConfig(
        sources=(
            DigitsSource(name="ledger", weight=0.7, task="ledger"),
            DigitsSource(name="transcribe", weight=0.3, task="transcribe"),
        ),
    ),
    batch=BatchConfig(rows=8, tokens=264, global_views=2, crops=6),
    schedule=ScheduleConfig(phases=(Phase(tokens=8e5, start=2e-3, end=2e-4),), warmup_tokens=1e5),
    evaluation=EvaluationConfig(
        sources=tuple(
            DigitsSource(name=task, weight=1.0, task=task, split="held_out") for task in ("ledger", "transcribe")
        ),
        examples=200,
        max_new_tokens=88,
    ),
)
