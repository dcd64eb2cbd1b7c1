"""Fine-tune the demo's model, stage 2: read receipts of 8 to 10 worn digits, add them up, compare with the printed check.

Half of the receipts that it learns from are misprints, so that "ok" has to be earned. A quarter of them are illegible:
only there does it pay to copy the digits from the reasoning to the answer instead of reading them once more, and an
answer that is read once more need not be the one that was checked. A share of the old tasks keeps them from being
forgotten.
"""

import dataclasses
from pathlib import Path

from stepjax.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    DigitsSource,
    EvaluationConfig,
    InitConfig,
    Phase,
    ScheduleConfig,
)
from stepjax.config_file import load_recipe

base = load_recipe(Path(__file__).with_name("pretrain.py"))

DEGRADATION = 0.45  # of the receipts

OLD_TASKS = ("transcribe", "count", "add", "point", "arithmetic")

config = dataclasses.replace(
    base,
    name="digits_sft_stage2",
    init_from=InitConfig(path="runs/digits_sft_stage1"),
    data=DataConfig(
        sources=(
            DigitsSource(name="receipt", weight=0.3, task="receipt", degradation=DEGRADATION),
            DigitsSource(name="misprint", weight=0.3, task="misprint", degradation=DEGRADATION),
            DigitsSource(name="illegible_receipt", weight=0.1, task="receipt", degradation=1.0),
            DigitsSource(name="illegible_misprint", weight=0.1, task="misprint", degradation=1.0),
            DigitsSource(name="ledger", weight=0.1, task="ledger"),
            *(DigitsSource(name=task, weight=0.02, task=task) for task in OLD_TASKS),
        ),
    ),
    batch=BatchConfig(rows=8, tokens=264, global_views=3, crops=23),
    schedule=ScheduleConfig(
        phases=(Phase(tokens=1.0e6, start=1.2e-3, end=5e-5),),
        warmup_tokens=1e5,
    ),
    checkpoint=CheckpointConfig(every=125),
    evaluation=EvaluationConfig(
        sources=(
            DigitsSource(name="receipt", weight=1.0, task="receipt", split="held_out", degradation=DEGRADATION),
            *(DigitsSource(name=task, weight=1.0, task=task, split="held_out") for task in OLD_TASKS),
        ),
        examples=200,
        max_new_tokens=88,
    ),
)
