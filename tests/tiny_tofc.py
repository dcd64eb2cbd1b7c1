"""The tiny recipe with a codec, on views of more tokens; --init-from.decoder names the run that it starts from."""

import dataclasses

from tiny_recipe import config as tiny

from stepjax.config import (
    BatchConfig,
    EvaluationConfig,
    ImageConfig,
    InitConfig,
    LoggingConfig,
    ModelConfig,
    Phase,
    ScheduleConfig,
    SftConfig,
    TofcConfig,
    VisionConfig,
)

STEPS = 12
batch = BatchConfig(rows=2, tokens=256, global_views=3, crops=24)
fields = {field.name: getattr(tiny, field.name) for field in dataclasses.fields(tiny)}
config = SftConfig(
    **fields
    | {
        "name": "tiny_tofc",
        "model": ModelConfig(
            vision=VisionConfig(width=16, num_layers=1, num_heads=2, mlp_dim=32, patch_size=7, position_grid=12),
            decoder=tiny.model.decoder,
            tofc=TofcConfig(
                width=64, bottleneck=24, global_clusters=4, crop_clusters=2, experts=2, hidden=16, rate_weight=0.1
            ),
        ),
        "init_from": InitConfig(decoder="runs/tiny"),
        "images": ImageConfig(global_size=84, crop_size=42, patch_size=7, max_side=126),
        "batch": batch,
        "schedule": ScheduleConfig(phases=(Phase(tokens=STEPS * batch.rows * batch.tokens, start=3e-3, end=3e-4),)),
        "logging": LoggingConfig(every=2),
        "evaluation": EvaluationConfig(),
    }
)
