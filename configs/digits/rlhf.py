"""Reinforcement learning from preferences, after rlvr.py: a judge compares the answers to a receipt, two at a time.

The judge is the model of sft.py, which learned to tell which of two answers has more right digits. It is asked in both
orders, and an answer's reward is the share of its comparisons that it wins, less half a point if its verdict is false,
as in rlvr.py.
"""

import dataclasses
from pathlib import Path

from stepjax.config import DataConfig, InitConfig
from stepjax.config_file import load_recipe
from stepjax.data.receipts import PREFER
from stepjax.post_training.config import RLConfig
from stepjax.rewards.config import JudgeConfig, RewardConfig, RewardTerm

rlvr = load_recipe(Path(__file__).with_name("rlvr.py"), RLConfig)

config = dataclasses.replace(
    rlvr,
    name="digits_rlhf",
    init_from=InitConfig(path="runs/digits_rlvr"),
    iterations=20,
    data=DataConfig(sources=rlvr.data.sources[:1]),  # the judge knows receipts only
    reward=RewardConfig(
        terms=(RewardTerm("preference"), RewardTerm("receipt_verdict", weight=0.5)),
        judge=JudgeConfig(run="runs/digits_sft", preference=PREFER, max_tokens=4, opponents=4),
    ),
    rollout=dataclasses.replace(rlvr.rollout, prompts=8, samples=8),
    loss=dataclasses.replace(rlvr.loss, kl=0.02),  # a judge can be talked to: stay near the policy that it was shown
)
