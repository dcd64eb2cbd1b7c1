"""Teach the model of sft_text.py to read, count and point on worn pages: a quarter of an hour on two cores.

A page is a thumbnail of 8 x 8 patches and one crop of 32 x 32. They become 4 and 64 tokens, one for each cell of the
page. Transcripts teach the model to look, because every character is about a place that is known, and a page has 64.
"""

import dataclasses
from pathlib import Path

from stepjax.config import (
    BatchConfig,
    DataConfig,
    DocumentsSource,
    EvaluationConfig,
    InitConfig,
    Phase,
    ScheduleConfig,
    SftConfig,
)
from stepjax.config_file import load_recipe

base = load_recipe(Path(__file__).with_name("sft_text.py"), SftConfig)

config = dataclasses.replace(
    base,
    name="documents_sft",
    init_from=InitConfig(path="runs/documents_sft_text"),
    data=DataConfig(
        sources=(
            DocumentsSource(name="read", weight=0.4, task="read"),
            DocumentsSource(name="count", weight=0.3, task="count"),
            DocumentsSource(name="point", weight=0.3, task="point"),
        ),
    ),
    batch=BatchConfig(rows=4, tokens=688, global_views=4, crops=4),
    schedule=ScheduleConfig(
        phases=(Phase(tokens=1.9e6, start=2e-3, end=1e-3), Phase(tokens=0.7e6, start=1e-3, end=1e-4)),
        warmup_tokens=6e4,
    ),
    evaluation=EvaluationConfig(
        sources=tuple(
            DocumentsSource(name=task, weight=1.0, task=task, split="held_out") for task in ("read", "count", "point")
        ),
        examples=400,
        max_new_tokens=96,
    ),
)
