"""STEP3-VL-10B supervised fine-tuning, the first of two stages (arXiv 2601.09668, section 3.1): rows of 128k tokens.

Stated by the report, and set here
    32 rows of 128k tokens a step, 190 B tokens of text and multimodal conversations 9 : 1; learning rate from 1e-4 to
    1e-5 by a cosine after 200 steps of warm-up. The second stage is sft_stage2.py.

Not resolved
    optimizer  not restated; here as in pretraining.
    mixture    domain weights are not published, nor whether 9 : 1 counts tokens or examples; the weights below are
               probabilities of examples. The sources are placeholders for your own conversations; only the assistant's
               turns are trained on.
    views      how many images 128k tokens have is not stated; 16 global views and 64 crops a row are our guess.
    positions  the public configuration ends at 65,536 positions and names no rope scaling; here RoPE is not scaled.

The run starts from the pretraining run's last checkpoint; --init-from.path takes another run or a Hugging Face
directory.

Eight devices share a row: each computes attention for an eighth of the row and encodes an eighth of its views. By
`stepjax plan configs/step3_vl_10b/sft_stage1.py --topology v5p-128` a step takes 41.2 of 95.7 GiB a device and 40.6 s.
"""

from stepjax.config import (
    MESHES,
    ArrayRecordSource,
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    InitConfig,
    ModelConfig,
    NumericsConfig,
    OptimizerConfig,
    Phase,
    ScheduleConfig,
    SftConfig,
    TokenizerConfig,
)

GLOBAL_BATCH, SEQUENCE = 32, 131_072

config = SftConfig(
    name="step3_vl_10b_sft_stage1",
    model=ModelConfig(),
    init_from=InitConfig(path="runs/step3_vl_10b"),
    tokenizer=TokenizerConfig(path="data/tokenizer.json"),
    data=DataConfig(
        sources=(
            ArrayRecordSource(name="text", weight=0.9, paths=("data/sft-text-00000.array_record",)),
            ArrayRecordSource(name="multimodal", weight=0.1, paths=("data/sft-multimodal-00000.array_record",)),
        ),
        num_workers=1,
    ),
    # View counts are multiples of eight, the devices that share a row; four micro-batches on 64 chips.
    batch=BatchConfig(rows=GLOBAL_BATCH, tokens=SEQUENCE, global_views=16, crops=64, accumulation=4),
    mesh=MESHES["context"],
    schedule=ScheduleConfig(
        phases=(Phase(tokens=190e9, start=1e-4, end=1e-5),), warmup_tokens=200 * GLOBAL_BATCH * SEQUENCE
    ),
    optimizer=OptimizerConfig(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.01, clip_norm=1.0),
    numerics=NumericsConfig(param_dtype="float32", compute_dtype="bfloat16", remat="full", loss_chunk=2048),
    checkpoint=CheckpointConfig(every=200, keep=3),
)
