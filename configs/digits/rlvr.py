"""Reinforcement learning with verifiable rewards, after sft.py, on receipts and, a fifth, smudged ledgers.

An answer whose digits are all right earns 1, else 0; half a point is lost by saying "ok" of a wrong answer or "bad" of
a right one. Without that, "bad" dies out: 92 % of the wrong answers said so before and 52 % after 80 iterations.

The update is GRPO's without the division by the group's deviation, strictly on-policy, with DAPO's bounds: sixteen
answers to a receipt are compared with each other, and prompts whose answers are all right or all wrong teach nothing.

From the model of sft.py it raises mean@8 at temperature 1 from 33 to 44 % on 500 held-out receipts; greedy answers stay
where they were (49 %). Most of that is gained in the first 20 iterations.
"""

import dataclasses
from pathlib import Path

from stepjax.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    DigitsSource,
    EvaluationConfig,
    InitConfig,
    LoggingConfig,
    OptimizerConfig,
    PretrainConfig,
)
from stepjax.config_file import load_recipe
from stepjax.post_training.config import (
    AdvantageConfig,
    PolicyLossConfig,
    RLConfig,
    RolloutConfig,
    UpdateConfig,
)
from stepjax.rewards.config import RewardConfig, RewardTerm

sft = load_recipe(Path(__file__).with_name("sft.py"), PretrainConfig)
[receipts] = (each for each in sft.data.sources if each.name == "receipt")
assert isinstance(receipts, DigitsSource)
ledgers = DigitsSource(name="smudged", weight=0.2, task="smudged")

config = RLConfig(
    name="digits_rlvr",
    model=sft.model,
    init_from=InitConfig(path="runs/digits_sft"),
    images=sft.images,
    tokenizer=sft.tokenizer,
    data=DataConfig(sources=(dataclasses.replace(receipts, weight=0.8), ledgers)),
    # A row holds a prompt with its image and about seven answers.
    batch=BatchConfig(rows=4, tokens=512, global_views=1, crops=24),
    iterations=64,
    rollout=RolloutConfig(
        prompts=40,
        samples=16,
        max_tokens=136,  # three readings of ten digits have 131
        max_sequences=128,
        page_size=32,
        prefill_tokens=512,
        decode_steps=4,
    ),
    reward=RewardConfig(terms=(RewardTerm("verifier"), RewardTerm("receipt_verdict", weight=0.5))),
    advantages=AdvantageConfig(estimator="grpo", divide_by_std=False, whiten=False),
    loss=PolicyLossConfig(aggregation="token"),
    # The noise of a batch's gradient is as large as the gradient at 1,500 answers: larger steps walk at random.
    policy=UpdateConfig(learning_rate=1e-4, warmup=5, decay="cosine"),
    optimizer=OptimizerConfig(weight_decay=0.0, beta2=0.99),
    numerics=sft.numerics,
    mesh=sft.mesh,
    checkpoint=CheckpointConfig(every=25),
    logging=LoggingConfig(every=1),
    evaluation=EvaluationConfig(
        sources=tuple(dataclasses.replace(each, weight=1.0, split="held_out") for each in (receipts, ledgers)),
        examples=200,
        max_new_tokens=136,
    ),
)
