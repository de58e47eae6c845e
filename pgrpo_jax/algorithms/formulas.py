"""Floor 0: GRPO's and P-GRPO's advantage and Corollary 3.1, each as its formula; `advantages.estimate` is the whole family.

    GRPO          A_i = (R_i − μ_G) / (σ_G + ε)              μ_G, σ_G: the completions of the same prompt
    P-GRPO        Ã_i = (R_i − μ_p) / (max(σ_p, floor) + ε)   μ_p, σ_p: all past rewards of the user's preference group p
    Corollary 3.1 Ã_i = scale_i·A_i + bias_i

Letters and conventions as in `advantages.py`.
"""

import chex
import jax.numpy as jnp

from pgrpo_jax.algorithms import reward_history
from pgrpo_jax.structs import RewardHistory


def standardise(
    rewards: chex.Array, ids: chex.Array, mask: chex.Array, moments: RewardHistory,
    *, epsilon: float, std_floor: float, sample: bool = False,
) -> chex.Array:
    """(R − mean) / (max(std, floor) + ε) by segment: what both formulas do, each with moments of its own.

    Args:
        rewards: [B] float.
        ids: [B] int, the segment of each row.
        mask: [B] bool, False on rows that only pad.
        moments: one row for each segment, same dtype as the rewards.
        epsilon: added to the deviation, reward units.
        std_floor: smallest deviation, reward units.
        sample: the deviation with n − 1.

    Returns:
        [B]; 0 where the divisor is 0 and on masked rows.
    """
    chex.assert_equal_shape([rewards, ids, mask])
    chex.assert_trees_all_equal_dtypes(rewards, moments.mean, moments.m2)
    chex.assert_type(rewards, float)
    mean = reward_history.rows(moments.mean, ids, mask)
    divisor = reward_history.rows(reward_history.std(moments, floor=std_floor, sample=sample) + epsilon, ids, mask)
    degenerate = (divisor == 0) | ~mask
    return jnp.where(degenerate, 0, (rewards - mean) / jnp.where(degenerate, 1, divisor))


def cohort(
    rewards: chex.Array, prompt_index: chex.Array, mask: chex.Array,
    *, num_prompts: int, epsilon: float, axis_name: str | None = None,
) -> chex.Array:
    """GRPO (arXiv:2402.03300, §4.1.2): rewards standardised within the completions of their prompt.

    Args:
        rewards: [B] float.
        prompt_index: [B] int, the prompt of each completion, in [0, P).
        mask: [B] bool, False on rows that only pad.
        num_prompts: P, over all devices.
        epsilon: added to the deviation, reward units. At 0, equal rewards still give 0.
        axis_name: mapped axis the completions are spread over, or None.

    Returns:
        [B] advantages; exactly 0 where all completions of a prompt earn the same, and on masked rows.
    """
    moments = reward_history.batch_moments(rewards, prompt_index, mask, num_prompts, axis_name=axis_name)
    return standardise(rewards, prompt_index, mask, moments, epsilon=epsilon, std_floor=0.0)


def preference_history(
    rewards: chex.Array, preference_ids: chex.Array, mask: chex.Array, history: RewardHistory,
    *, epsilon: float, std_floor: float, sample: bool = False,
) -> chex.Array:
    """P-GRPO (arXiv:2603.10009): rewards standardised against the past rewards of their preference group.

    Args:
        rewards: [B] float.
        preference_ids: [B] int, the preference group of each completion's user, in [0, K).
        mask: [B] bool, False on rows that only pad.
        history: moments with K rows, same dtype as the rewards; mean and deviation are 0 where there is no reward yet.
        epsilon: added to the deviation, reward units.
        std_floor: smallest deviation, reward units. Where it, epsilon and the deviation are all 0 the advantage is 0.
        sample: the deviation with n − 1.

    Returns:
        [B] advantages; 0 on masked rows.
    """
    return standardise(rewards, preference_ids, mask, history, epsilon=epsilon, std_floor=std_floor, sample=sample)


def corollary(
    prompt_index: chex.Array, preference_ids: chex.Array, mask: chex.Array, prompts: RewardHistory, history: RewardHistory,
    *, epsilon: float, std_floor: float, sample: bool = False,
) -> tuple[chex.Array, chex.Array]:
    """Corollary 3.1 (arXiv:2603.10009): what turns GRPO's advantage into P-GRPO's, Ã = scale·A + bias.

    At ε = 0, scale = σ_G/σ_p and bias = (μ_G − μ_p)/σ_p. Here both deviations are the divisors as used, ε and
    floor included, so that the identity is exact at any ε. Where a divisor is 0 the term is 0.

    Args:
        prompt_index: [B] int, in [0, P).
        preference_ids: [B] int, in [0, K).
        mask: [B] bool, False on rows that only pad.
        prompts: moments of the completions of each prompt, P rows.
        history: moments of the past rewards of each preference group, K rows.
        epsilon: as in `cohort` and `preference_history`.
        std_floor: as in `preference_history`.
        sample: deviations with n − 1.

    Returns:
        ([B] scale, [B] bias), 0 on masked rows.
    """
    mean = reward_history.rows(prompts.mean, prompt_index, mask)
    # The bias term is the P-GRPO advantage of a completion that earns the mean reward of its prompt.
    bias = preference_history(mean, preference_ids, mask, history, epsilon=epsilon, std_floor=std_floor, sample=sample)
    numerator = reward_history.rows(reward_history.std(prompts, sample=sample) + epsilon, prompt_index, mask)
    divisor = reward_history.rows(reward_history.std(history, floor=std_floor, sample=sample) + epsilon, preference_ids, mask)
    scale = jnp.where(divisor == 0, 0, numerator / jnp.where(divisor == 0, 1, divisor))
    return scale, bias
