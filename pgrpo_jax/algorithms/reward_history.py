"""Floor 0: moments of rewards, of a batch and of a whole run, one row for each segment.

A segment is a preference group when the rows are labelled by `preference_ids`, and the completions of a prompt when they are
labelled by `prompt_index`: the same arithmetic serves both. Moments are (count, mean, m2), m2 the sum of squared deviations
from the mean (Welford 1962), and two of them merge pairwise (Chan, Golub & LeVeque 1983), so that neither the order of the
batches nor their split over devices matters beyond rounding. Everything follows the dtype of the rewards.

Letters: B rows, S segments, K preference groups. `axis_name` names a mapped axis (pmap, shard_map) whose devices each hold
some of the rows; with it, results cover the rows of all devices and are equal on each.
"""

import chex
import jax
import jax.numpy as jnp

from pgrpo_jax.structs import RewardHistory

_MAX_COUNT = 2**31 - 1  # int32


def init(num_preference_groups: int, dtype: jnp.dtype = jnp.float32) -> RewardHistory:
    """Returns the history of a run that has seen no reward.

    Args:
        num_preference_groups: K, at least 1.
        dtype: floating dtype of the rewards that will be merged.

    Returns:
        `RewardHistory` of zeros: count [K] int32, mean and m2 [K] `dtype`.

    Raises:
        ValueError: where K is below 1.
    """
    if num_preference_groups < 1:
        raise ValueError(f"num_preference_groups is {num_preference_groups}, must be at least 1: set task.num_preference_groups")
    return RewardHistory(
        count=jnp.zeros(num_preference_groups, jnp.int32),
        mean=jnp.zeros(num_preference_groups, dtype),
        m2=jnp.zeros(num_preference_groups, dtype),
    )


def segment_sum(
    values: chex.Array, ids: chex.Array, mask: chex.Array, num_segments: int, *, axis_name: str | None = None
) -> chex.Array:
    """Sums the values of each segment, over the rows that the mask keeps.

    Written as compare-and-add, not as a scatter: a scatter adds in no fixed order on a GPU, and a resumed run must repeat
    every bit.

    Args:
        values: [B], any numeric dtype. Masked rows may hold anything, NaN included.
        ids: [B] int, the segment of each row. A row whose id lies outside [0, S) belongs to no segment.
        mask: [B] bool, False on rows that do not count.
        num_segments: S.
        axis_name: mapped axis to sum over as well, or None.

    Returns:
        [S] sums, dtype of `values`; 0 for a segment without rows.
    """
    chex.assert_rank([values, ids, mask], 1)
    chex.assert_equal_shape([values, ids, mask])
    chex.assert_type([ids, mask], [int, bool])
    member = mask[:, None] & (ids[:, None] == jnp.arange(num_segments, dtype=ids.dtype)[None, :])
    sums = jnp.sum(jnp.where(member, values[:, None], 0), axis=0, dtype=values.dtype)
    return sums if axis_name is None else jax.lax.psum(sums, axis_name)


def rows(values: chex.Array, ids: chex.Array, mask: chex.Array) -> chex.Array:
    """Spreads one value of each segment back over the rows: values[ids], 0 on masked rows.

    A kept row whose id lies outside [0, S) gets NaN (True for booleans), so that a wrong id shows in the loss instead of
    borrowing another segment's statistics.

    Args:
        values: [S] float or bool.
        ids: [B] int, the segment of each row.
        mask: [B] bool, False on rows that do not count.

    Returns:
        [B], dtype of `values`.
    """
    chex.assert_rank([values, ids, mask], 1)
    chex.assert_equal_shape([ids, mask])
    size = values.shape[0]
    # A negative index would wrap around to the last segments; `size` is out of range and takes the fill value.
    index = jnp.where(mask, jnp.where(ids < 0, size, ids), 0)
    spread = jnp.asarray(values).at[index].get(mode="fill")
    return jnp.where(mask, spread, jnp.zeros_like(spread))


def batch_moments(
    rewards: chex.Array, ids: chex.Array, mask: chex.Array, num_segments: int, *, axis_name: str | None = None
) -> RewardHistory:
    """Moments of the rewards of each segment.

    The first mean only serves as an offset: deviations are taken from it, averaged again and corrected, so that float32
    keeps the deviation of rewards such as 1e6 + noise, and equal rewards have exactly themselves as mean.

    Args:
        rewards: [B] float. Masked rows may hold anything, NaN included.
        ids: [B] int, the segment of each row; rows outside [0, S) count nowhere.
        mask: [B] bool, False on rows that do not count.
        num_segments: S.
        axis_name: mapped axis whose devices share the segments, or None.

    Returns:
        `RewardHistory` with S rows: count int32, mean and m2 in the dtype of the rewards; zeros for a segment without rows.
    """
    chex.assert_rank([rewards, ids, mask], 1)
    chex.assert_type(rewards, float)

    def total(values: chex.Array) -> chex.Array:
        return segment_sum(values, ids, mask, num_segments, axis_name=axis_name)

    count = total(jnp.ones_like(ids, dtype=jnp.int32))
    divisor = jnp.maximum(count, 1).astype(rewards.dtype)
    offset = total(rewards) / divisor
    residual = rewards - rows(offset, ids, mask)
    correction = total(residual) / divisor
    deviation = residual - rows(correction, ids, mask)
    return RewardHistory(count=count, mean=offset + correction, m2=total(deviation * deviation))


def merge(a: RewardHistory, b: RewardHistory) -> RewardHistory:
    """Moments of the union of two disjoint sets of rewards (Chan, Golub & LeVeque 1983, pairwise update).

    With δ = mean_b − mean_a and n = n_a + n_b: mean = mean_a + δ·n_b/n, m2 = m2_a + m2_b + δ²·n_a·n_b/n. Merging with an
    empty side returns the other side unchanged, to the bit.

    Args:
        a: moments with S rows.
        b: moments with S rows, same dtype.

    Returns:
        `RewardHistory` with S rows. Counts stop at 2**31 − 1 instead of wrapping around.
    """
    chex.assert_trees_all_equal_shapes_and_dtypes(a, b)
    chex.assert_type([a.count, a.mean, a.m2], [jnp.int32, float, float])
    added = jnp.minimum(b.count, _MAX_COUNT - a.count)
    count = a.count + added
    # The products n_a·n_b overflow int32 long before the counts do: weights are floats.
    weight_a, weight_b = a.count.astype(a.mean.dtype), b.count.astype(a.mean.dtype)
    fraction_b = weight_b / jnp.maximum(weight_a + weight_b, 1)
    both = (a.count > 0) & (b.count > 0)
    delta = jnp.where(both, b.mean - a.mean, 0)
    return RewardHistory(
        count=count,
        mean=jnp.where(a.count > 0, a.mean + delta * fraction_b, b.mean),
        m2=a.m2 + b.m2 + delta * delta * weight_a * fraction_b,
    )


def std(history: RewardHistory, *, floor: float = 0.0) -> chex.Array:
    """Population standard deviation, sqrt(m2 / count), not below the floor.

    Args:
        history: moments with S rows.
        floor: smallest deviation returned, reward units.

    Returns:
        [S] float; the floor where there is no reward.
    """
    divisor = jnp.maximum(history.count, 1).astype(history.m2.dtype)
    return jnp.maximum(jnp.sqrt(history.m2 / divisor), floor)
