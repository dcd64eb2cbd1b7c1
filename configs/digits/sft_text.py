"""Fine-tune the demo's model on ledgers, receipts in words: adding, copying, checking, and what messages of others are.

The first of two stages: nine examples of text to one with an image; sft.py is the second. Adding is the hardest part: a
sum modulo 10 of two digits tells nothing of either alone, so it takes a while until attention finds both. The next
hardest is to find the message that says "ok" among several; short ledgers teach it first.
"""

import dataclasses
from pathlib import Path

from stepjax.config import (
    BatchConfig,
    DataConfig,
    DigitsSource,
    EvaluationConfig,
    InitConfig,
    Phase,
    ScheduleConfig,
    SftConfig,
)
from stepjax.config_file import load_recipe

second = load_recipe(Path(__file__).with_name("sft.py"), SftConfig)

config = dataclasses.replace(
    second,
    name="digits_sft_text",
    init_from=InitConfig(path="runs/digits"),
    data=DataConfig(
        sources=(
            DigitsSource(name="ledger", weight=0.5, task="ledger"),
            DigitsSource(name="ledger_synthesis", weight=0.4, task="ledger_synthesis"),
            DigitsSource(name="printed", weight=0.05, task="printed"),
            DigitsSource(name="transcribe", weight=0.05, task="transcribe"),
        ),
    ),
    batch=BatchConfig(rows=2, tokens=1152, global_views=6, crops=36),
    schedule=ScheduleConfig(phases=(Phase(tokens=3.8e6, start=1.5e-3, end=8e-4),), warmup_tokens=5e4),
    evaluation=EvaluationConfig(
        sources=(DigitsSource(name="ledger", weight=1.0, task="ledger", split="held_out"),),
        examples=200,
        max_new_tokens=136,
    ),
)
