"""Pretrain a small STEP3-VL from scratch to read worn pages, on two cores, in less than an hour.

A page is a view at a quarter of its size and four crops of 16 x 16 patches, which become 4 x 4 tokens: one for each of
its cells. A field is as wide as a crop, so none is cut in two. Pages of 64 pixels are a view without crops, at the
scale of the crops; half of the records are such, because a model learns from them what to look at and they cost little.
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

images = ImageConfig(global_size=64, crop_size=128, patch_size=8, max_side=256)

config = PretrainConfig(
    name="documents",
    model=ModelConfig(
        vision=VisionConfig(
            width=64,
            num_layers=3,
            num_heads=2,
            mlp_dim=192,
            patch_size=8,
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
            DocumentsSource(name="small", weight=0.5, task="all", side=64),
            DocumentsSource(name="medium", weight=0.25, task="all", side=128),
            DocumentsSource(name="pages", weight=0.25, task="all"),
        ),
    ),
    batch=BatchConfig(rows=4, tokens=1024, global_views=8, crops=10),
    schedule=ScheduleConfig(
        phases=(Phase(tokens=20e6, start=3e-3, end=6e-4), Phase(tokens=4.6e6, start=6e-4, end=5e-5)),
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
