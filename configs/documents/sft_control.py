"""Train the model of sft.py for nine minutes more, without a codec.

This is what `tofc.py` does with one: the comparison that shows what coding costs, and not what more training brings.
"""

import dataclasses
from pathlib import Path

from stepjax.config import InitConfig, Phase, ScheduleConfig, SftConfig
from stepjax.config_file import load_recipe

base = load_recipe(Path(__file__).with_name("sft.py"), SftConfig)

config = dataclasses.replace(
    base,
    name="documents_sft_control",
    init_from=InitConfig(path="runs/documents_sft"),
    schedule=ScheduleConfig(phases=(Phase(tokens=1.6e6, start=1.2e-3, end=5e-5),), warmup_tokens=4e4),
    optimizer=dataclasses.replace(base.optimizer, freeze=("vision/",)),
)
