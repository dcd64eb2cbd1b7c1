"""STEP3-VL-10B supervised fine-tuning, the second of two stages (arXiv 2601.09668, section 3.1).

Stated by the report, and set here
    32 rows of 128k tokens a step, 36 B tokens of text and multimodal conversations 1 : 1; learning rate from 1e-4 to
    1e-5 by a cosine after 200 steps of warm-up.

Not resolved
    schedule   the report gives one schedule for both stages. Here each stage is a run with its own schedule; lower
               schedule.phases.0.start to continue where the first stage ended.
    optimizer  whether its moments carry over from the first stage is not stated; here they are reset.
    mixture    as in sft_stage1.py, which has all other settings.

The run starts from the first stage's last checkpoint; --init-from.path takes another one.

Rows have the first stage's slots, so a step is the first stage's program: 41.2 of 95.7 GiB a device on v5p-128. With
half of the examples multimodal, a row may run out of views before it runs out of tokens: measure your mixture, raise
batch.global_views and batch.crops, and plan again.
"""

import dataclasses
from pathlib import Path

from stepjax.config import ArrayRecordSource, InitConfig, Phase, SftConfig
from stepjax.config_file import load_recipe

stage1 = load_recipe(Path(__file__).with_name("sft_stage1.py"), SftConfig)

config = dataclasses.replace(
    stage1,
    name="step3_vl_10b_sft_stage2",
    init_from=InitConfig(path="runs/step3_vl_10b_sft_stage1"),
    data=dataclasses.replace(
        stage1.data,
        sources=(
            ArrayRecordSource(name="text", weight=0.5, paths=("data/sft2-text-00000.array_record",)),
            ArrayRecordSource(name="multimodal", weight=0.5, paths=("data/sft2-multimodal-00000.array_record",)),
        ),
    ),
    schedule=dataclasses.replace(stage1.schedule, phases=(Phase(tokens=36e9, start=1e-4, end=1e-5),)),
)
