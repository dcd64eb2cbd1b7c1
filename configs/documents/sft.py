"""Teach the model of sft_transcripts.py to answer questions about worn pages: half an hour on two cores.

The encoder is frozen: it sees what it needs to, and without its backward pass a step has twice as many pages. To find a
field by its label takes many answers to learn; every page asks all its questions.
"""

import dataclasses
from pathlib import Path

from stepjax.config import (
    BatchConfig,
    DataConfig,
    DocumentsSource,
    InitConfig,
    OptimizerConfig,
    Phase,
    ScheduleConfig,
    SftConfig,
)
from stepjax.config_file import load_recipe

base = load_recipe(Path(__file__).with_name("sft_transcripts.py"), SftConfig)

config = dataclasses.replace(
    base,
    name="documents_sft",
    init_from=InitConfig(path="runs/documents_sft_transcripts"),
    data=DataConfig(
        sources=(
            DocumentsSource(name="transcribe", weight=0.05, task="transcribe"),
            DocumentsSource(name="all", weight=0.95, task="all"),
        ),
    ),
    batch=BatchConfig(rows=16, tokens=544, global_views=2, crops=2),
    schedule=ScheduleConfig(
        phases=(Phase(tokens=6.2e6, start=2e-3, end=9e-4), Phase(tokens=1.1e6, start=9e-4, end=5e-5)),
        warmup_tokens=5e4,
    ),
    optimizer=OptimizerConfig(weight_decay=0.05, freeze=("vision/",)),
)
