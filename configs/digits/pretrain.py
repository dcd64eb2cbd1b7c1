"""Pretrain a small STEP3-VL from scratch, fully unfrozen, on images of real handwritten digits, on a laptop's CPU.

The proportions match the 10B model at about one tenth of the pixels: a global view of 8 x 8 patches becomes 4 tokens, a
crop of 4 x 4 becomes one, and a strip of digits is cut into about one crop per digit. Transcription has most of the
weight: the model must first learn that the image shows the digits, and its short strips teach that fastest.
"""

from stepjax.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    DecoderConfig,
    DigitsSource,
    EvaluationConfig,
    ImageConfig,
    LoggingConfig,
    MeshConfig,
    ModelConfig,
    NumericsConfig,
    OptimizerConfig,
    Phase,
    PretrainConfig,
    ScheduleConfig,
    TokenizerConfig,
    VisionConfig,
)

images = ImageConfig(global_size=80, crop_size=40, patch_size=10, max_side=320, thin_side=8)

config = PretrainConfig(
    name="digits",
    model=ModelConfig(
        vision=VisionConfig(
            width=64,
            num_layers=3,
            num_heads=2,
            mlp_dim=192,
            patch_size=10,
            position_grid=images.global_grid,
            layer_scale_init=1.0,
        ),
        decoder=DecoderConfig(
            vocab_size=384,
            width=96,
            num_layers=3,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            mlp_dim=256,
            max_positions=2048,  # more than the questions need, because PaCoRe lists many answers in one prompt
        ),
        init_range=0.1,
    ),
    images=images,
    tokenizer=TokenizerConfig(path="demo", generation_starts_thinking=False),
    data=DataConfig(
        sources=(
            DigitsSource(name="transcribe", weight=0.8, task="transcribe"),
            DigitsSource(name="count", weight=0.06, task="count"),
            DigitsSource(name="add", weight=0.05, task="add"),
            DigitsSource(name="point", weight=0.05, task="point"),
            DigitsSource(name="arithmetic", weight=0.04, task="arithmetic"),
        ),
    ),
    batch=BatchConfig(rows=16, tokens=128, global_views=4, crops=9),
    schedule=ScheduleConfig(
        phases=(Phase(tokens=2.0e6, start=3e-3, end=6e-4), Phase(tokens=0.5e6, start=6e-4, end=5e-5)),
        warmup_tokens=1e5,
    ),
    optimizer=OptimizerConfig(weight_decay=0.05),
    mesh=MeshConfig(data=-1, fsdp=1),  # a copy for every device; on a CPU stepjax makes one for every core
    numerics=NumericsConfig(compute_dtype="float32", remat="none", loss_chunk=512),
    checkpoint=CheckpointConfig(every=500),
    logging=LoggingConfig(every=20),
    evaluation=EvaluationConfig(
        sources=tuple(
            DigitsSource(name=task, weight=1.0, task=task, split="held_out")
            for task in ("transcribe", "count", "add", "point", "arithmetic")
        ),
        examples=400,
        max_new_tokens=12,
    ),
)
