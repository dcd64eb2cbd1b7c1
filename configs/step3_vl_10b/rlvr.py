"""draft"""

from stepjax.config import (
    ArrayRecordSource,
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    InitConfig,
    LoggingConfig,
    ModelConfig,
    NumericsConfig,
    OptimizerConfig,
    TokenizerConfig,
)
from stepjax.post_training.config import (
    AdvantageConfig,
    CriticConfig,
    PolicyLossConfig,
    RLConfig,
    RolloutConfig,
    UpdateConfig,
)
from stepjax.rewards.config import RewardConfig, RewardTerm

ANSWER, ROW = 24_576, 57_344

config = RLConfig(
    name="step3_vl_10b_rlvr",
    model=ModelConfig(),
    init_from=InitConfig(path="runs/step3_vl_10b_sft_stage2"),
    tokenizer=TokenizerConfig(path="data/tokenizer.json"),
    data=DataConfig(
        sources=(
            ArrayRecordSource(name="perception", weight=0.5, paths=("data/rlvr-perception-00000.array_record",)),
            ArrayRecordSource(name="reasoning", weight=0.5, paths=("data/rlvr-reasoning-00000.array_record",)),
        ),
        bad_records="skip",
    ),
    # A row for each of 64 chips: two of the longest answers with their prompt, or more of shorter ones.
    batch=BatchConfig(rows=64, tokens=ROW, global_views=4, crops=32),
    iterations=600,
    rollout=RolloutConfig(
        prompts=512,
        samples=16,
        temperature=1.0,
        max_tokens=ANSWER,
        max_prompt_tokens=ROW - 2 * (ANSWER + 1),
        tensor=4,  # the chips of a host
        max_sequences=128,
        page_size=128,
        cache_tokens=1_310_720,
        prefill_tokens=2048,
        decode_steps=8,
    ),
    reward=RewardConfig(terms=(RewardTerm("verifier"),)),
    advantages=AdvantageConfig(estimator="gae", gamma=1.0, lam=1.0, whiten=True),
    loss=PolicyLossConfig(aggregation="token", correction="truncate", correction_bounds=(0.0, 8.0)),
    policy=UpdateConfig(learning_rate=2e-6, minibatches=4),
    critic=CriticConfig(trunk="own", update=UpdateConfig(learning_rate=5e-6, minibatches=4), warmup_iterations=10),
    optimizer=OptimizerConfig(
        beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.01, clip_norm=1.0, freeze=("vision/", "projector/")
    ),
    numerics=NumericsConfig(param_dtype="float32", compute_dtype="bfloat16", remat="full", loss_chunk=2048),
    checkpoint=CheckpointConfig(every=20, keep=3),
    logging=LoggingConfig(every=1),
)
