"""Pretrain a small STEP3-VL from scratch to read worn pages, on two cores. No run has gone to its end yet.

A page is a thumbnail and 16 crops of 16 x 16 patches, which become 4 x 4 tokens. A patch is about as wide as a stroke.
Most records are smaller pages at the same scale, down to a single digit: with those a model learns to look.
"""

from stepjax.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    DecoderConfig,
    DocumentsSource,
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

images = ImageConfig(global_size=32, crop_size=64, patch_size=4, max_side=256)

config = PretrainConfig(
    name="documents",
    model=ModelConfig(
        vision=VisionConfig(
            width=64,
            num_layers=3,
            num_heads=2,
            mlp_dim=192,
            patch_size=4,
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
            max_positions=1024,
        ),
        init_range=0.1,
    ),
    images=images,
    tokenizer=TokenizerConfig(path="demo", generation_starts_thinking=False),
    data=DataConfig(
        sources=(
            DocumentsSource(name="digit", weight=0.4, task="all", side=32),
            DocumentsSource(name="small", weight=0.35, task="all", side=64),
            DocumentsSource(name="medium", weight=0.15, task="all", side=128),
            DocumentsSource(name="page", weight=0.1, task="all"),
        ),
    ),
    batch=BatchConfig(rows=4, tokens=1408, global_views=14, crops=30),
    schedule=ScheduleConfig(
        phases=(Phase(tokens=11e6, start=3e-3, end=6e-4), Phase(tokens=3e6, start=6e-4, end=5e-5)),
        warmup_tokens=3e5,
    ),
    optimizer=OptimizerConfig(weight_decay=0.05),
    mesh=MeshConfig(data=-1, fsdp=1),  # a copy for every device; on a CPU stepjax makes one for every core
    numerics=NumericsConfig(compute_dtype="float32", remat="none", loss_chunk=512),
    checkpoint=CheckpointConfig(every=500),
    logging=LoggingConfig(every=20),
    evaluation=EvaluationConfig(
        sources=tuple(
            DocumentsSource(name=task, weight=1.0, task=task, split="held_out") for task in ("read", "count", "point")
        ),
        examples=400,
        max_new_tokens=12,
    ),
)
