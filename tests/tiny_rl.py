"""A reinforcement-learning recipe with iterations of milliseconds, after tiny_recipe.py."""

from tiny_recipe import config as tiny

from stepjax.config import BatchConfig, CheckpointConfig, DataConfig, DigitsSource, LoggingConfig, TokenizerConfig
from stepjax.post_training.config import CriticConfig, PolicyLossConfig, RLConfig, RolloutConfig, UpdateConfig

config = RLConfig(
    name="tiny_rl",
    model=tiny.model,
    images=tiny.images,
    tokenizer=TokenizerConfig(path="demo", generation_starts_thinking=False),
    data=DataConfig(
        sources=(
            DigitsSource(name="count", weight=0.5, task="count"),
            DigitsSource(name="arithmetic", weight=0.5, task="arithmetic"),
        ),
    ),
    batch=BatchConfig(rows=2, tokens=192, global_views=4, crops=32),
    iterations=4,
    rollout=RolloutConfig(
        prompts=4,
        samples=4,
        max_tokens=6,
        max_sequences=4,
        page_size=16,
        prefill_tokens=64,
        decode_steps=2,
    ),
    loss=PolicyLossConfig(kl=0.01),
    policy=UpdateConfig(learning_rate=1e-3, minibatches=2, warmup=2),
    critic=CriticConfig(update=UpdateConfig(learning_rate=1e-3, minibatches=2), warmup_iterations=1),
    numerics=tiny.numerics,
    checkpoint=CheckpointConfig(every=1),
    logging=LoggingConfig(every=1),
)
