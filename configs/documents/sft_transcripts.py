"""Teach the digits demo to see worn pages: the first of two stages, twelve minutes on two cores.

    make pretrain && stepjax sft configs/documents/sft_transcripts.py && stepjax sft configs/documents/sft.py

A page is a thumbnail of 8 x 8 patches and one crop of 32 x 32. They become 4 and 64 tokens, one for each cell of the
page. Transcripts teach the model to look: where each character stands is known, and a page has 64 of them. Questions
alone do not: a page has about ten answers, and a model that sees nothing yet does not find out where they are.
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
)
from stepjax.config_file import load_recipe

digits = load_recipe(Path(__file__).parents[1] / "digits" / "pretrain.py")

changes: dict[str, Any] = dict(
    name="documents_sft_transcripts",
    init_from=InitConfig(path="runs/digits"),
    images=ImageConfig(global_size=80, crop_size=320, patch_size=10, max_side=320),
    data=DataConfig(
        sources=(
            DocumentsSource(name="transcribe", weight=0.5, task="transcribe"),
            DocumentsSource(name="all", weight=0.5, task="all"),
        ),
    ),
    batch=BatchConfig(rows=4, tokens=832, global_views=4, crops=4),
    schedule=ScheduleConfig(phases=(Phase(tokens=2.2e6, start=2e-3, end=1.5e-3),), warmup_tokens=1e5),
    checkpoint=CheckpointConfig(every=250),
    evaluation=EvaluationConfig(
        sources=tuple(
            DocumentsSource(name=task, weight=1.0, task=task, split="held_out") for task in ("read", "count", "point")
        ),
        examples=400,
        max_new_tokens=12,
    ),
)

config = SftConfig(**(vars(digits) | changes))
