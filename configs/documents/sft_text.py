"""Teach the digits demo to answer questions about the transcript of a page: the first of two stages, on text alone.

    make pretrain && stepjax sft configs/documents/sft_text.py && stepjax sft configs/documents/sft.py

It takes ten minutes on two cores. A step has about a hundred questions; the second stage takes six for as many.
"""

from pathlib import Path
from typing import Any

from stepjax.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    DocumentsSource,
    EvaluationConfig,
    ImageConfig,
    InitConfig,
    Phase,
    ScheduleConfig,
    SftConfig,
    TokenizerConfig,
)
from stepjax.config_file import load_recipe

digits = load_recipe(Path(__file__).parents[1] / "digits" / "pretrain.py")

changes: dict[str, Any] = dict(
    name="documents_sft_text",
    init_from=InitConfig(path="runs/digits"),
    tokenizer=TokenizerConfig(path="demo"),  # generation starts with reasoning
    images=ImageConfig(global_size=80, crop_size=320, patch_size=10, max_side=320),
    data=DataConfig(
        sources=(
            DocumentsSource(name="read", weight=0.35, task="read", as_text=True),
            DocumentsSource(name="count", weight=0.35, task="count", as_text=True),
            DocumentsSource(name="point", weight=0.3, task="point", as_text=True),
        ),
    ),
    batch=BatchConfig(rows=48, tokens=360, global_views=0, crops=0),
    schedule=ScheduleConfig(
        phases=(Phase(tokens=1.2e7, start=3e-3, end=1e-3), Phase(tokens=8e6, start=2e-3, end=3e-4)), warmup_tokens=2e5
    ),
    checkpoint=CheckpointConfig(every=250),
    evaluation=EvaluationConfig(
        sources=tuple(
            DocumentsSource(name=task, weight=1.0, task=task, split="held_out", as_text=True)
            for task in ("read", "count", "point")
        ),
        examples=200,
        max_new_tokens=96,
    ),
)

config = SftConfig(**(vars(digits) | changes))
