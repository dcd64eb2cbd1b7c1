"""A recipe that trains for 16 steps of milliseconds: what the tests of the loop and of the command line run."""

from stepjax.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    DecoderConfig,
    DigitsSource,
    EvaluationConfig,
    ImageConfig,
    LoggingConfig,
    ModelConfig,
    NumericsConfig,
    Phase,
    PretrainConfig,
    ScheduleConfig,
    VisionConfig,
)

config = PretrainConfig(
    name="tiny",
    model=ModelConfig(
        vision=VisionConfig(width=16, num_layers=1, num_heads=2, mlp_dim=32, patch_size=14, position_grid=4),
        decoder=DecoderConfig(
            vocab_size=512,
            width=32,
            num_layers=1,
            num_heads=2,
            num_kv_heads=1,
            head_dim=16,
            mlp_dim=64,
            max_positions=512,
        ),
    ),
    images=ImageConfig(global_size=56, crop_size=28, patch_size=14, max_side=112),
    data=DataConfig(
        sources=(
            DigitsSource(name="transcribe", weight=0.5, task="transcribe"),
            DigitsSource(name="arithmetic", weight=0.5, task="arithmetic"),
        ),
        open_rows=2,
    ),
    batch=BatchConfig(rows=2, tokens=128, global_views=3, crops=24),
    schedule=ScheduleConfig(phases=(Phase(tokens=16 * 2 * 128, start=3e-3, end=3e-4),), warmup_tokens=2 * 2 * 128),
    numerics=NumericsConfig(compute_dtype="float32", remat="none", loss_chunk=128),
    checkpoint=CheckpointConfig(every=4),
    logging=LoggingConfig(every=2),
    evaluation=EvaluationConfig(
        sources=(
            DigitsSource(name="transcribe", weight=1.0, task="transcribe", split="held_out"),
            DigitsSource(name="arithmetic", weight=1.0, task="arithmetic", split="held_out"),
        ),
        examples=4,
        max_new_tokens=4,
        batch_size=4,
    ),
)
