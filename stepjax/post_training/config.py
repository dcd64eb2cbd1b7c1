"""The configuration of `stepjax rl`. The defaults follow the STEP3-VL and PaCoRe reports where these say something.

Stated: PPO with GAE, gamma = lambda = 1; sampling at temperature 1; importance weights of the sampler truncated at 8;
strictly on-policy updates for 64 x 16 episodes. Not stated, hence options: the clip bounds, the critic's start and
size of its updates, KL, entropy, and what replaces the ratio where it is omitted.
"""

import dataclasses
import math
from typing import Literal

from stepjax.config import BatchConfig, RunConfig
from stepjax.errors import ConfigError, require, require_not_negative, require_positive
from stepjax.rewards.config import RewardConfig

Estimator = Literal["gae", "grpo", "rloo"]
Aggregation = Literal["token", "sequence", "constant"]
Correction = Literal["none", "truncate", "mask"]
KLForm = Literal["k1", "k2", "k3", "unbiased"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How the answers of an iteration are sampled."""

    prompts: int = 512  # prompts of an iteration
    samples: int = 16  # answers to each; they share the prompt in sampling and in training
    temperature: float = 1.0  # also of the trainer's log-probabilities
    # A filter would make the sampled distribution another one than the trainer's: it must stay off.
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_tokens: int = 24_576  # of an answer
    max_prompt_tokens: int | None = None  # longer prompts are skipped and counted, never cut; None: what a row holds
    # Keep the prompts of which some but not all answers are right, and sample more prompts in place of the others.
    keep_mixed: bool = False
    max_rounds: int = 3  # of sampling in an iteration; afterwards it trains on the prompts it has
    one_step_off: bool = False  # sample the next iteration's answers while this one trains
    # The engine
    tensor: int = 1  # devices of an engine; each process has as many engines as its devices allow
    max_sequences: int = 64  # sequences decoded together by an engine
    page_size: int = 64
    cache_tokens: int | None = None  # of an engine; None: max_sequences answers of full length
    prefill_tokens: int = 512
    decode_steps: int = 8

    def __post_init__(self):
        require_positive("rollout", self, "prompts", "samples", "max_tokens", "max_rounds", "tensor", "max_sequences")
        require(
            "rollout", self, temperature=(self.temperature > 0, "must be positive: the trainer needs probabilities")
        )
        for name, off in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)):
            remedy = f"must be {off} (off): filtered samples have other probabilities than the trainer computes"
            require("rollout", self, **{name: (getattr(self, name) == off, remedy)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdvantageConfig:
    """From rewards to advantages; formulas in stepjax.post_training.advantages."""

    estimator: Estimator = "gae"
    gamma: float = 1.0
    lam: float = 1.0  # GAE's lambda
    divide_by_std: bool = True  # GRPO: by the group's standard deviation; Dr.GRPO does not
    whiten: bool = True  # over all tokens of the iteration
    least_std: float = 0.01  # floor of a standard deviation
    # Answers cut off at the limit: trained on as they are scored; not trained on; or penalised as in DAPO.
    overlong: Literal["keep", "mask", "penalty"] = "keep"
    overlong_tokens: int = 0  # penalty: it grows from 0 to 1 over this many tokens before the limit

    def __post_init__(self):
        for name in ("gamma", "lam"):
            require("advantages", self, **{name: (0 <= getattr(self, name) <= 1, "must be from 0 to 1")})
        require_positive("advantages", self, "least_std")
        is_set = self.overlong != "penalty" or self.overlong_tokens > 0
        require("advantages", self, overlong_tokens=(is_set, "must be positive with overlong='penalty'"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyLossConfig:
    """The policy's loss; formulas in stepjax.post_training.losses."""

    ratio: Literal["token", "sequence"] = "token"  # "sequence": GSPO, whose clip bounds are 3e-4 and 4e-4
    clip_low: float = 0.2
    clip_high: float = 0.28  # above clip_low: DAPO's clip-higher
    dual_clip: float | None = 3.0  # bound of the loss, in |advantage|, where the advantage is negative
    aggregation: Aggregation = "token"
    correction: Correction = "truncate"  # of what the sampler's and the trainer's probabilities differ in
    correction_bounds: tuple[float, float] = (0.0, 8.0)  # "truncate" uses the upper one
    kl: float = 0.0  # coefficient of the divergence from the model that the run started from
    kl_form: KLForm = "unbiased"
    entropy: float = 0.0  # coefficient of the entropy bonus

    def __post_init__(self):
        require_positive("loss", self, "clip_low", "clip_high")
        require_not_negative("loss", self, "kl", "entropy")
        require("loss", self, dual_clip=(self.dual_clip is None or self.dual_clip > 1, "must be above 1, or None"))
        low, high = self.correction_bounds
        require("loss", self, correction_bounds=(0 <= low < high, "must be a lower and a higher bound"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateConfig:
    """The optimiser's steps of an iteration."""

    learning_rate: float = 1e-6
    warmup: int = 0  # iterations over which the rate rises from zero
    decay: Literal["constant", "cosine"] = "constant"  # "cosine": to zero at the last iteration
    minibatches: int = 1  # optimiser steps of a pass over the iteration's answers; 1: strictly on-policy
    passes: int = 1

    def __post_init__(self):
        require_positive("update", self, "learning_rate", "minibatches", "passes")
        require_not_negative("update", self, "warmup")

    @property
    def steps(self) -> int:
        """Of an iteration."""
        return self.minibatches * self.passes


@dataclasses.dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """The value function; only with the estimator "gae"."""

    trunk: Literal["own", "shared"] = "own"  # a copy of the policy, or a head on the policy itself
    update: UpdateConfig = UpdateConfig(learning_rate=5e-6, minibatches=4, passes=1)
    coefficient: float = 0.5  # shared: of the value loss within the policy's
    clip: float | None = 0.5  # of a value's change in an iteration; None: off
    warmup_iterations: int = 0  # at the start of the run the critic trains alone

    def __post_init__(self):
        require_positive("critic", self, "coefficient")
        require_not_negative("critic", self, "warmup_iterations")
        require("critic", self, clip=(self.clip is None or self.clip > 0, "must be positive, or None"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLConfig(RunConfig):
    """Everything that defines a run of `stepjax rl`.

    `data.sources` are the prompts: the last assistant turn of a record, if it ends with one, is left out.
    `batch` is one call of the trainer: an iteration takes as many calls as its answers fill.
    """

    batch: BatchConfig
    iterations: int
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    advantages: AdvantageConfig = AdvantageConfig()
    loss: PolicyLossConfig = PolicyLossConfig()
    policy: UpdateConfig = UpdateConfig()
    critic: CriticConfig = CriticConfig()
    shown_prompts: int = 4  # of every iteration, on the page of samples

    def __post_init__(self):
        super().__post_init__()
        require_positive("", self, "iterations")
        require_not_negative("", self, "shown_prompts")
        require("batch", self.batch, accumulation=(self.batch.accumulation == 1, "must be 1: calls are accumulated"))
        if self.advantages.estimator != "gae" and self.rollout.samples < 2:
            raise ConfigError(
                f"rollout.samples={self.rollout.samples}: advantages.estimator={self.advantages.estimator!r} compares "
                "the answers to a prompt; sample at least 2"
            )
        if self.critic.trunk == "shared" and self.has_critic and self.critic.update.steps != self.policy.steps:
            raise ConfigError(
                f"critic.update: a shared trunk takes the policy's {self.policy.steps} steps an iteration; set "
                "critic.update.minibatches and passes to those of policy"
            )
        room = self.batch.tokens - 1 - self.rollout.max_tokens
        if room < 1:
            raise ConfigError(
                f"rollout.max_tokens={self.rollout.max_tokens}: with its prompt an answer does not fit a row; raise "
                f"batch.tokens={self.batch.tokens}"
            )

    @property
    def has_critic(self) -> bool:
        return self.advantages.estimator == "gae"

    @property
    def needs_scores(self) -> bool:
        """Whether log-probabilities or values are needed before the update. The old log-probabilities alone are not, if
        nothing is updated between sampling and training: they are those of the update itself.
        """
        return self.has_critic or self.loss.kl > 0 or self.policy.steps > 1

    def prompts_of_process(self, processes: int) -> int:
        """Each process's share of an iteration.

        Raises:
            ConfigError: the prompts cannot be divided.
        """
        if self.rollout.prompts % processes:
            raise ConfigError(f"rollout.prompts={self.rollout.prompts}: must be divisible by {processes} processes")
        return self.rollout.prompts // processes

    @property
    def max_prompt_tokens(self) -> int:
        """A prompt and one answer fit a row, whose answer repeats the prompt's last token."""
        most = self.batch.tokens - self.rollout.max_tokens
        return most if self.rollout.max_prompt_tokens is None else min(most, self.rollout.max_prompt_tokens)

    @property
    def num_steps(self) -> int:
        return self.iterations

    @property
    def tokens_per_step(self) -> int:
        return self.rollout.prompts * self.rollout.samples * self.rollout.max_tokens


def warmed(update: UpdateConfig, iterations: int, steps: int):
    """The learning rate as a function of the optimiser's step."""
    import jax.numpy as jnp

    def rate(count):
        iteration = jnp.asarray(count, jnp.float32) / steps
        shape = 1.0
        if update.decay == "cosine":
            shape = 0.5 * (1 + jnp.cos(math.pi * jnp.clip(iteration / iterations, 0, 1)))
        if update.warmup:
            shape = shape * jnp.minimum((iteration + 1 / steps) / update.warmup, 1.0)
        return update.learning_rate * shape

    return rate
