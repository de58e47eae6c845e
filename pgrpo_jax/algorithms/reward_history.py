"""Floor 0: moments of rewards, of a batch and of a whole run, one row for each segment.

A segment is a preference group when the rows are labelled by `preference_ids`, and the completions of a prompt when they are
labelled by `prompt_index`: the same arithmetic serves both. Moments are (count, mean, m2), m2 the sum of squared deviations
from the mean (Welford 1962), and two of them merge pairwise (Chan, Golub & LeVeque 1983), so that neither the order of the
batches nor their split over devices matters beyond rounding; what was merged can be taken out again. Rewards may weigh less than 1:
`effective_count` is what they count for. Everything follows the dtype of the rewards.

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
        `RewardHistory` of zeros, of weight 1: count [K] int32, the others [K] `dtype`.

    Raises:
        ValueError: where K is below 1.
    """
    if num_preference_groups < 1:
        raise ValueError(f"num_preference_groups is {num_preference_groups}, must be at least 1: set task.num_preference_groups")
    return RewardHistory(
        count=jnp.zeros(num_preference_groups, jnp.int32),
        weight=jnp.ones(num_preference_groups, dtype),
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
    rewards: chex.Array, ids: chex.Array, mask: chex.Array, num_segments: int,
    *, weights: chex.Array | None = None, axis_name: str | None = None,
) -> RewardHistory:
    """Moments of the rewards of each segment.

    The first mean only serves as an offset: deviations are taken from it, averaged again and corrected, so that float32
    keeps the deviation of rewards such as 1e6 + noise, and equal rewards have exactly themselves as mean.

    Args:
        rewards: [B] float. Masked rows may hold anything, NaN included.
        ids: [B] int, the segment of each row; rows outside [0, S) count nowhere.
        mask: [B] bool, False on rows that do not count.
        num_segments: S.
        weights: [B] float in [0, 1], what each reward counts for; None = 1. A row of weight 0, or of one
            too small for a normal number, counts nowhere, as if masked.
        axis_name: mapped axis whose devices share the segments, or None.

    Returns:
        `RewardHistory` with S rows: count int32, the others in the dtype of the rewards; zeros, of weight 1, for a segment without rows.
    """
    chex.assert_rank([rewards, ids, mask], 1)
    chex.assert_type(rewards, float)
    if weights is not None:
        mask = mask & (weights >= jnp.finfo(rewards.dtype).tiny)  # below, what is divided by may have been flushed to 0

    def total(values: chex.Array) -> chex.Array:
        return segment_sum(values, ids, mask, num_segments, axis_name=axis_name)

    def weighted(values: chex.Array) -> chex.Array:
        return values if weights is None else values * weights

    count = total(jnp.ones_like(ids, dtype=jnp.int32))
    rewards_seen = jnp.maximum(count, 1).astype(rewards.dtype)
    weight = jnp.ones_like(rewards_seen) if weights is None else jnp.where(count > 0, total(weights) / rewards_seen, 1)
    divisor = rewards_seen * weight
    offset = total(weighted(rewards)) / divisor
    residual = rewards - rows(offset, ids, mask)
    correction = total(weighted(residual)) / divisor
    deviation = residual - rows(correction, ids, mask)
    return RewardHistory(count=count, weight=weight, mean=offset + correction, m2=total(weighted(deviation * deviation)))


def effective_count(history: RewardHistory) -> chex.Array:
    """Returns [S] float, what the rewards of each segment count for: their number times their mean weight."""
    return history.count.astype(history.mean.dtype) * history.weight


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
    chex.assert_type([a.count, a.weight, a.mean, a.m2], [jnp.int32, float, float, float])
    added = jnp.minimum(b.count, _MAX_COUNT - a.count)
    count = a.count + added
    # The products n_a·n_b overflow int32 long before the counts do: weights are floats.
    weight_a, weight_b = effective_count(a), effective_count(b)
    fraction_b = weight_b / jnp.where(weight_a + weight_b > 0, weight_a + weight_b, 1)
    both = (a.count > 0) & (b.count > 0)
    delta = jnp.where(both, b.mean - a.mean, 0)
    return RewardHistory(
        count=count,
        weight=jnp.where(both, _mean_weight(a, b, added), jnp.where(a.count > 0, a.weight, b.weight)),
        mean=jnp.where(a.count > 0, a.mean + delta * fraction_b, b.mean),
        m2=a.m2 + b.m2 + delta * delta * weight_a * fraction_b,
    )


def _mean_weight(a: RewardHistory, b: RewardHistory, added: chex.Array) -> chex.Array:
    """[S] mean weight of the rewards of `a` and `added` ones of `b`.

    By the difference of the weights, so that 1 and 1 are exactly 1 however many rewards there are, and from the side with more rewards:
    from the other one, a few rewards of weight 1 beside many of next to none would cancel to nothing but rounding.
    """
    b_is_more = added > a.count
    more, fewer = jnp.where(b_is_more, b.weight, a.weight), jnp.where(b_is_more, a.weight, b.weight)
    share_of_fewer = jnp.minimum(added, a.count).astype(more.dtype) / jnp.maximum(a.count + added, 1).astype(more.dtype)
    return more + (fewer - more) * share_of_fewer


def remove(history: RewardHistory, part: RewardHistory) -> RewardHistory:
    """Takes a part out of a history that it was merged into, as if it had never been seen (Welford's update run backwards).

    Exact but for rounding: to remove a part whose mean lies far from the rest's loses the digits that its removal cancels, and m2 is
    held at 0 from below. Removing everything leaves an empty history, to the bit.

    Args:
        history: moments with S rows, on the host; only what no memory has discounted since can be taken out.
        part: moments with S rows, the same rewards with the same weights as when they were merged.

    Returns:
        `RewardHistory` with S rows.

    Raises:
        ValueError: the part has more rewards than the history.
    """
    chex.assert_trees_all_equal_shapes_and_dtypes(history, part)
    for row in range(history.count.shape[0]):
        if part.count[row] > history.count[row]:
            raise ValueError(
                f"row {row} has {history.count[row]} rewards, {part.count[row]} can not be taken out of it: "
                "give the rewards that were merged into this history"
            )
    count = history.count - part.count
    whole, gone = effective_count(history), effective_count(part)
    rest = whole - gone
    empty = count == 0
    divisor = jnp.where(empty | (rest <= 0), 1, rest)
    mean = history.mean - (part.mean - history.mean) * gone / divisor
    delta = part.mean - mean
    m2 = history.m2 - part.m2 - delta * delta * rest * gone / jnp.where(whole > 0, whole, 1)
    touched = part.count > 0
    weight = rest / jnp.maximum(count, 1).astype(rest.dtype)
    return RewardHistory(
        count=count,
        weight=jnp.where(empty, 1, jnp.where(touched & (history.weight != part.weight), weight, history.weight)),
        mean=jnp.where(empty, 0, jnp.where(touched, mean, history.mean)),
        m2=jnp.where(empty, 0, jnp.where(touched, jnp.maximum(m2, 0), history.m2)),
    )


def affine(history: RewardHistory, scale: chex.Array, offset: chex.Array) -> RewardHistory:
    """Moments of scale · R + offset: a reward that is redefined does not cost its history.

    Args:
        history: moments with S rows.
        scale: scalar or [S] float.
        offset: scalar or [S] float, reward units.
    """
    return history.replace(mean=history.mean * scale + offset, m2=history.m2 * scale * scale)


def joined(history: RewardHistory) -> RewardHistory:
    """Moments of the parts along the first axis together, merged in their order: [W, S] rows -> [S]."""
    empty = jax.tree.map(lambda x: jnp.zeros_like(x[0]), history)
    return jax.lax.scan(_joined_with, empty.replace(weight=jnp.ones_like(empty.weight)), history)[0]


def _joined_with(total: RewardHistory, part: RewardHistory) -> tuple[RewardHistory, None]:
    return merge(total, part), None


def pooled(history: RewardHistory) -> RewardHistory:
    """Moments of all segments together, [1] row, merged in their order."""
    return joined(jax.tree.map(lambda x: x[:, None], history))


def std(history: RewardHistory, *, floor: float = 0.0, sample: bool = False) -> chex.Array:
    """Standard deviation, sqrt(m2 / n), not below the floor; n is the effective count.

    Args:
        history: moments with S rows.
        floor: smallest deviation returned, reward units.
        sample: divide by n − 1 instead (0 where n is at most 1).

    Returns:
        [S] float; the floor where there is no reward.
    """
    count = effective_count(history)
    if sample:
        deviation = jnp.where(count > 1, jnp.sqrt(history.m2 / jnp.where(count > 1, count - 1, 1)), 0)
    else:
        deviation = jnp.sqrt(history.m2 / jnp.where(count > 0, count, 1))
    return jnp.maximum(deviation, floor)
