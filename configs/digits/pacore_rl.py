"""PaCoRe's reinforcement learning, after rlhf.py: synthesise the messages of several answers to a receipt into one.

An episode is one synthesis. Its messages come from a cache that the starting model drew once:

    stepjax pacore cache configs/digits/rlvr.py --init-from.path runs/digits_rlhf --cache runs/digits_cache.jsonl \\
        --problems 1000 --above 0 --below 0.9

The filter leaves out problems that nearly every answer solves, or none: there the messages decide nothing.

SFT has taught most of it: syntheses of eight messages are right on 50 % of 500 held-out receipts before any
reinforcement learning, on 56 % after RLVR and RLHF, and on 59 % after this recipe; of sixteen, on 52, 55 and 60 %.
"""

import dataclasses
from pathlib import Path

from stepjax.config import BatchConfig, DataConfig, InitConfig, SynthesisSource
from stepjax.config_file import load_recipe
from stepjax.post_training.config import RLConfig

rlvr = load_recipe(Path(__file__).with_name("rlvr.py"), RLConfig)

config = dataclasses.replace(
    rlvr,
    name="digits_pacore",
    iterations=40,
    init_from=InitConfig(path="runs/digits_rlhf"),
    data=DataConfig(
        sources=(
            SynthesisSource(
                name="synthesis",
                weight=1.0,
                path="runs/digits_cache.jsonl",
                references=(2, 16),
                template="short",
                images="after",  # as in the examples of sft.py
            ),
        ),
    ),
    batch=BatchConfig(rows=2, tokens=1152, global_views=1, crops=16),  # a prompt has up to 540 tokens
    rollout=dataclasses.replace(rlvr.rollout, prompts=32, max_tokens=144),
)
