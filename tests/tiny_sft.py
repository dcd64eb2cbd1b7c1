"""The tiny recipe as fine-tuning; --init-from.path names the run that it starts from."""

import dataclasses

from tiny_recipe import config as tiny

from stepjax.config import EvaluationConfig, InitConfig, Phase, ScheduleConfig, SftConfig

fields = {field.name: getattr(tiny, field.name) for field in dataclasses.fields(tiny)}
config = SftConfig(
    **fields
    | {
        "name": "tiny_sft",
        "init_from": InitConfig(path="runs/tiny"),
        "schedule": ScheduleConfig(
            phases=(Phase(tokens=8 * tiny.tokens_per_step, start=3e-3, end=3e-4),),
            warmup_tokens=2 * tiny.tokens_per_step,
        ),
        "evaluation": EvaluationConfig(),
    }
)
