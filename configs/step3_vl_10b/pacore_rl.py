"""STEP3-VL-10B, PaCoRe reinforcement learning (arXiv 2601.09668, section 3.2; 2601.05593, sections 2.2 and 3.1).

Stated by the reports, and set here
    500 iterations of 64 prompts x 16 answers, prompt and answer within 64k tokens; an episode is one synthesis of 16 to
    24 messages, drawn from a cache of 24 answers a problem; PPO with GAE, gamma = lambda = 1, strictly on-policy.

Not resolved
    rates, clipping, critic, loss and optimizer   not stated for this stage: as in rlvr.py, but with one update.
    lengths    how the 64k tokens divide between prompt and answer: here 40k for the answer.
    views      as in rlvr.py.

The caches come from `stepjax pacore cache` with the recipe rlvr.py and the model after rlhf.py: 24 answers a problem,
and the problems that fewer than 9 of 24 solve, but some (mathematics), or fewer than 15 (code); --messages 16.
"""

import dataclasses
from pathlib import Path

from stepjax.config import DataConfig, InitConfig, SynthesisSource
from stepjax.config_file import load_recipe
from stepjax.post_training.config import RLConfig

rlvr = load_recipe(Path(__file__).with_name("rlvr.py"), RLConfig)

config = dataclasses.replace(
    rlvr,
    name="step3_vl_10b_pacore",
    init_from=InitConfig(path="runs/step3_vl_10b_rlhf"),
    data=DataConfig(
        sources=(
            SynthesisSource(name="mathematics", weight=0.5, path="data/pacore-mathematics.jsonl"),
            SynthesisSource(name="code", weight=0.5, path="data/pacore-code.jsonl"),
        ),
        bad_records="skip",
    ),
    iterations=500,
    rollout=dataclasses.replace(
        rlvr.rollout, prompts=64, max_tokens=40_960, max_prompt_tokens=rlvr.batch.tokens - 40_961
    ),
    policy=dataclasses.replace(rlvr.policy, minibatches=1),
    critic=dataclasses.replace(rlvr.critic, update=dataclasses.replace(rlvr.critic.update, minibatches=1)),
)
