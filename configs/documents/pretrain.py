"""Pretrain a small STEP3-VL from scratch to read worn pages, on two cores.

A page is a global view at half its size and four crops, which hold half a row of slots each: a field is never cut in
two. A view of 16 x 16 patches becomes 4 x 4 tokens, and a token of a crop sees one or two digits. Attention within five
small views costs a third of that within one view of 32 x 32 patches.
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
    data=DataConfig(sources=(DocumentsSource(name="pages", weight=1.0, task="all"),)),
    batch=BatchConfig(rows=8, tokens=320, global_views=1, crops=4),
    schedule=ScheduleConfig(
        phases=(Phase(tokens=14e6, start=3e-3, end=6e-4), Phase(tokens=3.5e6, start=6e-4, end=5e-5)),
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
