"""Floor 0: advantages of completions from their rewards: GRPO (arXiv:2402.03300) and P-GRPO (arXiv:2603.10009).

    GRPO          A_i = (R_i − μ_G) / (σ_G + ε)              μ_G, σ_G: the completions of the same prompt
    P-GRPO        Ã_i = (R_i − μ_p) / (max(σ_p, floor) + ε)   μ_p, σ_p: all past rewards of the user's preference group p
    Corollary 3.1 Ã_i = scale_i·A_i + bias_i

One advantage a completion; the objective copies it to the completion's tokens. Deviations are population deviations.

Letters: B completions on this device, P prompts, K preference groups. `axis_name` names a mapped axis (pmap, shard_map) over
which the completions are spread, those of one prompt on any devices; `prompt_index` counts prompts over all of them. Every
function runs the same eagerly, under jit (also on sharded inputs), shard_map and pmap, in the dtype of the rewards. Masked
rows may hold anything and get advantage 0; a kept row with an id out of range counts in no statistics and gets NaN from them.
"""

from typing import Callable

import chex
import jax.numpy as jnp

from pgrpo_jax.algorithms import reward_history
from pgrpo_jax.structs import RewardHistory


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Diagnostics:
    """What the estimators report, one row for each preference group; the same on every device.

    Attributes:
        batch_count: [K] int32, completions of the batch.
        batch_mean: [K] float, their mean reward; 0 without completions.
        batch_std: [K] float, population deviation of their rewards; 0 without completions.
        advantage_scale: [K] float, mean over these completions of the scale of Corollary 3.1, about σ_G/σ_p. It and the next
            say what P-GRPO does, or would do, to GRPO's advantages; both are 0 without completions and while the history is
            cold (then GRPO's advantage is used as it is).
        bias: [K] float, mean over these completions of the bias term of Corollary 3.1, (μ_G − μ_p)/σ_p.
        history_count: [K] int32, past rewards, this batch not included.
        history_mean: [K] float, their mean μ_p; 0 without rewards.
        history_std: [K] float, their population deviation σ_p, before the floor; 0 without rewards.
    """

    batch_count: chex.Array
    batch_mean: chex.Array
    batch_std: chex.Array
    advantage_scale: chex.Array
    bias: chex.Array
    history_count: chex.Array
    history_mean: chex.Array
    history_std: chex.Array


def _standardise(
    rewards: chex.Array, ids: chex.Array, mask: chex.Array, moments: RewardHistory, *, epsilon: float, std_floor: float
) -> chex.Array:
    """(R − mean) / (max(std, floor) + ε) by segment, [B]; 0 where the divisor is 0 and on masked rows."""
    chex.assert_equal_shape([rewards, ids, mask])
    chex.assert_trees_all_equal_dtypes(rewards, moments.mean, moments.m2)
    chex.assert_type(rewards, float)
    mean = reward_history.rows(moments.mean, ids, mask)
    divisor = reward_history.rows(reward_history.std(moments, floor=std_floor) + epsilon, ids, mask)
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
    return _standardise(rewards, prompt_index, mask, moments, epsilon=epsilon, std_floor=0.0)


def preference_history(
    rewards: chex.Array, preference_ids: chex.Array, mask: chex.Array, history: RewardHistory, *, epsilon: float, std_floor: float
) -> chex.Array:
    """P-GRPO (arXiv:2603.10009): rewards standardised against the past rewards of their preference group.

    Args:
        rewards: [B] float.
        preference_ids: [B] int, the preference group of each completion's user, in [0, K).
        mask: [B] bool, False on rows that only pad.
        history: moments with K rows, same dtype as the rewards; mean and deviation are 0 where there is no reward yet.
        epsilon: added to the deviation, reward units.
        std_floor: smallest deviation, reward units. Where it, epsilon and the deviation are all 0 the advantage is 0.

    Returns:
        [B] advantages; 0 on masked rows.
    """
    return _standardise(rewards, preference_ids, mask, history, epsilon=epsilon, std_floor=std_floor)


def corollary(
    prompt_index: chex.Array, preference_ids: chex.Array, mask: chex.Array, prompts: RewardHistory, history: RewardHistory,
    *, epsilon: float, std_floor: float,
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

    Returns:
        ([B] scale, [B] bias), 0 on masked rows.
    """
    mean = reward_history.rows(prompts.mean, prompt_index, mask)
    # The bias term is the P-GRPO advantage of a completion that earns the mean reward of its prompt.
    bias = preference_history(mean, preference_ids, mask, history, epsilon=epsilon, std_floor=std_floor)
    numerator = reward_history.rows(reward_history.std(prompts) + epsilon, prompt_index, mask)
    divisor = reward_history.rows(reward_history.std(history, floor=std_floor) + epsilon, preference_ids, mask)
    scale = jnp.where(divisor == 0, 0, numerator / jnp.where(divisor == 0, 1, divisor))
    return scale, bias


def grpo(
    rewards: chex.Array, prompt_index: chex.Array, preference_ids: chex.Array, mask: chex.Array, history: RewardHistory,
    *, num_prompts: int, epsilon: float, std_floor: float, min_count: int, axis_name: str | None = None,
) -> tuple[chex.Array, RewardHistory, Diagnostics]:
    """GRPO's advantages (arXiv:2402.03300); the history is kept as an instrument only.

    Args, Returns: as `p_grpo`; here `std_floor` and `min_count` touch only the diagnostics.
    """
    own, _, merged, diagnostics = _both(
        rewards, prompt_index, preference_ids, mask, history,
        num_prompts=num_prompts, epsilon=epsilon, std_floor=std_floor, min_count=min_count, axis_name=axis_name,
    )
    return own, merged, diagnostics


def p_grpo(
    rewards: chex.Array, prompt_index: chex.Array, preference_ids: chex.Array, mask: chex.Array, history: RewardHistory,
    *, num_prompts: int, epsilon: float, std_floor: float, min_count: int, axis_name: str | None = None,
) -> tuple[chex.Array, RewardHistory, Diagnostics]:
    """P-GRPO's advantages (arXiv:2603.10009), GRPO's while the history is cold, and the history with this batch merged once.

    The baseline is the history *before* the batch, hence independent of the rewards it is subtracted from. A preference
    group is cold while it has fewer than `min_count` past rewards.

    Args:
        rewards: [B] float.
        prompt_index: [B] int, in [0, P).
        preference_ids: [B] int, the preference group of each completion's user, in [0, K).
        mask: [B] bool, False on rows that only pad.
        history: moments of all past rewards, K rows, same dtype as the rewards; the same on every device.
        num_prompts: P, over all devices.
        epsilon: added to every deviation, reward units.
        std_floor: smallest deviation of a history, reward units.
        min_count: past rewards a history needs before it is used; at least one, whatever the value.
        axis_name: mapped axis the completions are spread over, or None.

    Returns:
        ([B] advantages, 0 on masked rows; the merged history; `Diagnostics`), the last two the same on every device.
    """
    own, against_history, merged, diagnostics = _both(
        rewards, prompt_index, preference_ids, mask, history,
        num_prompts=num_prompts, epsilon=epsilon, std_floor=std_floor, min_count=min_count, axis_name=axis_name,
    )
    warm = reward_history.rows(_warm(history, min_count), preference_ids, mask)
    return jnp.where(warm, against_history, own), merged, diagnostics


def _warm(history: RewardHistory, min_count: int) -> chex.Array:
    """[K] bool: enough past rewards to stand on; never without any."""
    return history.count >= max(min_count, 1)


def _both(
    rewards: chex.Array, prompt_index: chex.Array, preference_ids: chex.Array, mask: chex.Array, history: RewardHistory,
    *, num_prompts: int, epsilon: float, std_floor: float, min_count: int, axis_name: str | None,
) -> tuple[chex.Array, chex.Array, RewardHistory, Diagnostics]:
    """Both advantages of every completion, the merged history and the diagnostics."""
    chex.assert_equal_shape([rewards, prompt_index, preference_ids, mask])
    chex.assert_trees_all_equal_dtypes(rewards, history.mean, history.m2)
    num_preference_groups = history.count.shape[0]
    prompts = reward_history.batch_moments(rewards, prompt_index, mask, num_prompts, axis_name=axis_name)
    batch = reward_history.batch_moments(rewards, preference_ids, mask, num_preference_groups, axis_name=axis_name)
    terms = corollary(prompt_index, preference_ids, mask, prompts, history, epsilon=epsilon, std_floor=std_floor)
    # Sums first, division after: the completions of a preference group lie on several devices.
    sums = [reward_history.segment_sum(t, preference_ids, mask, num_preference_groups, axis_name=axis_name) for t in terms]
    divisor = jnp.maximum(batch.count, 1).astype(rewards.dtype)
    scale, bias = [jnp.where(_warm(history, min_count), total / divisor, 0) for total in sums]
    diagnostics = Diagnostics(
        batch_count=batch.count, batch_mean=batch.mean, batch_std=reward_history.std(batch),
        advantage_scale=scale, bias=bias,
        history_count=history.count, history_mean=history.mean, history_std=reward_history.std(history),
    )
    own = _standardise(rewards, prompt_index, mask, prompts, epsilon=epsilon, std_floor=0.0)
    against_history = preference_history(rewards, preference_ids, mask, history, epsilon=epsilon, std_floor=std_floor)
    return own, against_history, reward_history.merge(history, batch), diagnostics


Estimator = Callable[..., tuple[chex.Array, RewardHistory, Diagnostics]]
ESTIMATORS: dict[str, Estimator] = {"grpo": grpo, "p_grpo": p_grpo}
