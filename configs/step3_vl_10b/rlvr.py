"""STEP3-VL-10B, reinforcement learning with verifiable rewards (arXiv 2601.09668, section 3.2).

Stated by the report, and set here
    600 iterations of 512 prompts x 16 answers of at most 24k tokens, sampled at temperature 1; PPO with GAE, gamma =
    lambda = 1, a value loss of half the squared error, 4 minibatches an iteration; importance weights of the sampler
    truncated at 8; learning rates 2e-6 of the policy and 5e-6 of the critic. The vision encoder is frozen.

Not resolved
    clipping   the report's variant "omits standard importance sampling" without saying what replaces the ratio, and
               gives no bounds: here the clipped ratio, 0.2 and 0.28, with the dual clip at 3.
    critic     its trunk, start and warm-up are not stated: here a copy of the policy, trained whole, alone in the first
               ten iterations, with 4 minibatches as the policy has and its change clipped at 0.5.
    loss       KL and entropy terms are not stated: none. Advantages are whitened, as in Open-Reasoner-Zero.
    projector  only the decoder is updated, says the PaCoRe report; so it is frozen as well.
    truncated  how answers without an end are treated is not stated: they are scored as they are.
    optimizer  not restated: as in pretraining, at constant rates.
    rewards    each record names its verifier. The report also has a model judge reasoning: add the term "judge" and
               --reward.judge.url.
    prompts    placeholders for your own. The report kept those that some but not all of 24 answers solve; keep_mixed
               would do that while it trains.
    views      how many images a prompt has is not stated; 4 global views and 32 crops a row are our guess.

The run starts from the second stage of fine-tuning; --init-from.path takes another run or a Hugging Face directory.

By `stepjax plan configs/step3_vl_10b/rlvr.py --topology v5p-128 --answer-tokens 4096` an iteration takes 738 s, and
6,547 s if all answers are the longest. The critic's gradient needs 95.1 of 95.7 GiB: the engines' caches fill what the
trainer leaves.
"""

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

ANSWER = 24_576

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
    batch=BatchConfig(rows=64, tokens=65_536, global_views=4, crops=32),
    iterations=600,
    rollout=RolloutConfig(
        prompts=512,
        samples=16,
        temperature=1.0,
        max_tokens=ANSWER,
        max_prompt_tokens=8192,
        tensor=4,  # the chips of a host
        max_sequences=128,
        page_size=128,
        cache_tokens=1_228_800,
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
