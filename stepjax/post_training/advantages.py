"""From rewards to advantages, on the host, in float64.

Legend: N answers of a group (to one prompt), T tokens of an answer.
"""

from collections.abc import Sequence

import numpy as np

from stepjax.post_training.config import AdvantageConfig, Aggregation


def gae(
    reward: float, values_T: np.ndarray, mask_T: np.ndarray, *, gamma: float = 1.0, lam: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Generalised advantage estimation with the reward at the last sampled token: (advantages [T], returns [T]).

        delta_t = r_t + gamma V(s_t+1) - V(s_t),    A_t = delta_t + gamma lambda A_t+1,    return_t = A_t + V(s_t)

    With gamma = lambda = 1 that is A_t = R - V(s_t), and every return is R. Tokens outside the mask (inserted by a tool
    or an environment) are no choices: time does not pass at them, and their values count for nothing.

    Args:
        values_T: V(s_t), of the state in which token t was chosen.
        mask_T: true for the tokens that were sampled.

    Returns:
        Zero outside the mask.

    Source: Schulman et al., 1506.02438, eq. 11 to 16.
    """
    place_S = np.flatnonzero(mask_T)
    values_S = np.asarray(values_T, np.float64)[place_S]
    following_S = np.append(values_S[1:], 0.0)
    rewards_S = np.zeros(len(place_S))
    rewards_S[-1:] = reward
    deltas_S = rewards_S + gamma * following_S - values_S
    advantages_S = np.zeros(len(place_S))
    later = 0.0
    for t in reversed(range(len(place_S))):
        later = deltas_S[t] + gamma * lam * later
        advantages_S[t] = later
    advantages_T, returns_T = np.zeros(len(mask_T)), np.zeros(len(mask_T))
    advantages_T[place_S], returns_T[place_S] = advantages_S, advantages_S + values_S
    return advantages_T, returns_T


def group_advantages(rewards: Sequence[float], config: AdvantageConfig) -> np.ndarray:
    """The advantage of every answer of a group, the same for all its tokens. A group of one has advantage 0.

    grpo    (R - mean of the group) / standard deviation of the group       2402.03300, section 4.1.2
    rloo    R - mean of the others                                          2402.14740, eq. 7
    """
    rewards_N = np.asarray(rewards, np.float64)
    count = len(rewards_N)
    if count < 2:
        return np.zeros(count)
    centred_N = rewards_N - rewards_N.mean()
    if config.estimator == "rloo":
        return centred_N * count / (count - 1)
    return centred_N / max(rewards_N.std(), config.least_std) if config.divide_by_std else centred_N


def overlong_penalty(num_tokens: int, limit: int, config: AdvantageConfig) -> float:
    """0 up to `limit` - `overlong_tokens`, then linearly down to -1 at the limit (DAPO, eq. 13)."""
    if config.overlong != "penalty":
        return 0.0
    return -min(max(num_tokens - (limit - config.overlong_tokens), 0) / config.overlong_tokens, 1.0)


def is_mixed(rewards_N: Sequence[float | None]) -> bool:
    """Whether some but not all of the answers with a reward have the best one: only those groups teach GRPO."""
    known = [reward for reward in rewards_N if reward is not None]
    return len(known) > 1 and max(known) > min(known)


def moments(advantages: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> np.ndarray:
    """Count, sum and sum of squares over all masked tokens; those of several processes add up."""
    totals = np.zeros(3)
    for advantages_T, mask_T in zip(advantages, masks, strict=True):
        masked = advantages_T[mask_T]
        totals += len(masked), masked.sum(), np.square(masked).sum()
    return totals


def whitened(advantages_T: np.ndarray, mask_T: np.ndarray, totals: np.ndarray, least_std: float) -> np.ndarray:
    """Advantages of mean 0 and standard deviation 1 over the tokens that `moments` counted; 0 outside the mask."""
    count, total, squares = totals
    mean = total / max(count, 1)
    std = np.sqrt(max(squares / max(count, 1) - mean**2, 0.0))
    return np.where(mask_T, (advantages_T - mean) / max(std, least_std), 0.0)


def token_weights(
    mask_T: np.ndarray, aggregation: Aggregation, *, tokens: float, answers: float, longest: int
) -> np.ndarray:
    """The weight of every token in the loss (see `losses`).

    Args:
        tokens, answers: of the whole optimiser step, over all processes.
        longest: most tokens an answer may have.
    """
    own = float(mask_T.sum())
    match aggregation:
        case "token":
            each = 1 / max(tokens, 1)
        case "sequence":
            each = 1 / max(own * answers, 1)
        case "constant":
            each = 1 / (longest * max(answers, 1))
    return np.where(mask_T, each, 0.0).astype(np.float32)
