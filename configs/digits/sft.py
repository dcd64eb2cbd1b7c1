"""Fine-tune on receipts, after sft_text.py: read 8 to 10 worn digits, add them up, and add the printed check.

The second of two stages, of which the first is mostly text, as in the report. Half of the receipts are misprints, so
that "ok" has to be earned. Some are illegible: only there does it pay to copy the digits from the reasoning to the
answer instead of reading them once more, and an answer that is read once more need not be the one that was checked.
Syntheses teach what a list of other answers is (see pacore_rl.py), and a few questions are a judge's: which of two
answers has more digits right (see rlhf.py). A share of the old tasks keeps them from being forgotten.

`degradation` sets the difficulty. Held-out receipts, 500 images (benchmarks/receipts.py):

    greedy 49 % (44 to 53)   mean@8, temperature 1: 33 % (30 to 36)   pass@8 65 %   majority@8 46 %

The model reads 92 % of the digits at temperature 0 and 87 % at temperature 1. Most of its verdicts are true: 99 % of
the right answers say "ok", 77 % of the wrong ones "bad".
"""

from pathlib import Path
from typing import Any

from stepjax.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    DigitsSource,
    EvaluationConfig,
    InitConfig,
    Phase,
    ScheduleConfig,
    SftConfig,
)
from stepjax.config_file import load_recipe

base = load_recipe(Path(__file__).with_name("pretrain.py"))

DEGRADATION = 0.45  # of the receipts

OLD_TASKS = ("transcribe", "count", "add", "point", "arithmetic")

changes: dict[str, Any] = dict(
    name="digits_sft",
    init_from=InitConfig(path="runs/digits_sft_text"),
    data=DataConfig(
        sources=(
            DigitsSource(name="ledger", weight=0.07, task="ledger"),
            DigitsSource(name="ledger_synthesis", weight=0.1, task="ledger_synthesis"),
            DigitsSource(name="receipt", weight=0.2, task="receipt", degradation=DEGRADATION),
            DigitsSource(name="misprint", weight=0.2, task="misprint", degradation=DEGRADATION),
            DigitsSource(name="printed", weight=0.1, task="printed"),
            DigitsSource(name="illegible_receipt", weight=0.07, task="receipt", degradation=1.0),
            DigitsSource(name="illegible_misprint", weight=0.07, task="misprint", degradation=1.0),
            DigitsSource(name="synthesis", weight=0.14, task="synthesis", degradation=DEGRADATION),
            DigitsSource(name="prefer", weight=0.04, task="prefer", degradation=DEGRADATION),
            DigitsSource(name="transcribe", weight=0.04, task="transcribe"),
            *(DigitsSource(name=task, weight=0.005, task=task) for task in OLD_TASKS[1:]),
        ),
    ),
    batch=BatchConfig(rows=2, tokens=1152, global_views=12, crops=68),  # the longest synthesis has 1,110 tokens
    schedule=ScheduleConfig(
        phases=(Phase(tokens=3.3e6, start=1.2e-3, end=5e-5),),
        warmup_tokens=1e5,
    ),
    checkpoint=CheckpointConfig(every=125),
    evaluation=EvaluationConfig(
        sources=(
            DigitsSource(name="receipt", weight=1.0, task="receipt", split="held_out", degradation=DEGRADATION),
            *(DigitsSource(name=task, weight=1.0, task=task, split="held_out") for task in OLD_TASKS),
        ),
        examples=100,
        max_new_tokens=136,
    ),
)

config = SftConfig(**(vars(base) | changes))
