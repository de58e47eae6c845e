"""Moments against math.fsum: offsets, empty segments, wrong ids, merging in any order."""

import math

import advantage_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pgrpo_jax.algorithms import reward_history
from pgrpo_jax.structs import RewardHistory

EXAMPLES = settings(max_examples=50, deadline=None, derandomize=True)
FINITE = st.floats(-1e3, 1e3, allow_subnormal=False)

batch_moments = jax.jit(reward_history.batch_moments, static_argnums=3)
merge = jax.jit(reward_history.merge)


def of(values, dtype=np.float32) -> RewardHistory:
    """The moments of one list of rewards, as a history of one row."""
    padded = np.zeros(8 if len(values) <= 8 else 1000, dtype)  # few shapes, few compilations
    padded[: len(values)] = values
    return batch_moments(padded, np.zeros(len(padded), np.int32), np.arange(len(padded)) < len(values), 1)


def assert_moments(history: RewardHistory, segments: list[list[float]], *, rtol: float) -> None:
    expected = np.array([oracle.moments([float(v) for v in values]) for values in segments])
    scale = 1 + max((abs(float(v)) for values in segments for v in values), default=0.0)
    np.testing.assert_array_equal(history.count, expected[:, 0])
    np.testing.assert_allclose(history.mean, expected[:, 1], rtol=0, atol=rtol * scale)
    np.testing.assert_allclose(reward_history.std(history), expected[:, 2], rtol=rtol, atol=rtol * scale)


def test_init_is_empty_and_checks_its_size():
    history = reward_history.init(3)
    assert history.count.dtype == jnp.int32 and history.mean.dtype == history.m2.dtype == jnp.float32
    assert_moments(history, [[], [], []], rtol=0)
    with pytest.raises(ValueError, match="num_preference_groups is 0, must be at least 1"):
        reward_history.init(0)


def test_masked_rows_and_wrong_ids_count_nowhere():
    rewards = np.array([1.0, 2.0, np.nan, np.inf, 50.0, 60.0, 70.0, 3.0], np.float32)
    ids = np.array([0, 0, 0, 2, -1, 3, 2**31 - 1, 2], np.int32)
    mask = np.array([True, True, False, False, True, True, True, True])
    assert_moments(batch_moments(rewards, ids, mask, 3), [[1.0, 2.0], [], [3.0]], rtol=1e-7)


def test_all_masked_is_exactly_empty():
    moments = batch_moments(np.full(4, np.nan, np.float32), np.zeros(4, np.int32), np.zeros(4, bool), 2)
    for leaf in (moments.count, moments.mean, moments.m2):
        assert np.array_equal(leaf, np.zeros(2))
    assert np.array_equal(moments.weight, np.ones(2))


@pytest.mark.parametrize("offset", [0.0, 1e6, -1e7, 1e20])
def test_float32_keeps_deviations_at_huge_offsets(offset):
    step = max(float(np.spacing(np.float32(abs(offset)))), 0.25)  # rewards that float32 holds exactly
    rewards = np.float32(offset + step * np.random.default_rng(0).integers(-20, 20, 1000))
    ids = np.arange(1000, dtype=np.int32) % 2
    moments = batch_moments(rewards, ids, np.ones(1000, bool), 2)
    expected = [oracle.moments([float(r) for r in rewards[k::2]]) for k in range(2)]
    np.testing.assert_allclose(reward_history.std(moments), [e[2] for e in expected], rtol=1e-5)
    np.testing.assert_allclose(moments.mean, [e[1] for e in expected], rtol=1e-7, atol=1e-6 * step)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e6 + 0.3, -7e20, 1e-30])
@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_equal_rewards_have_exactly_themselves_as_mean(value, size):
    moments = of([value] * size)
    assert moments.mean[0] == np.float32(value) and moments.count[0] == size
    assert reward_history.std(moments)[0] <= 1e-12 * abs(value)


@EXAMPLES
@given(
    a=hnp.arrays(np.float64, 12, elements=FINITE),
    b=hnp.arrays(np.float64, 12, elements=FINITE),
    ids=hnp.arrays(np.int32, 24, elements=st.integers(0, 2)),
    mask=hnp.arrays(bool, 24),
)
def test_merging_equals_the_moments_of_all_rewards(a, b, ids, mask):
    with jax.enable_x64(True):
        parts = [batch_moments(x, ids[s], mask[s], 3) for x, s in ((a, slice(12)), (b, slice(12, 24)))]
        rewards = np.concatenate([a, b])
        segments = [list(rewards[mask & (ids == k)]) for k in range(3)]
        assert_moments(merge(*parts), segments, rtol=1e-10)
        assert_moments(merge(*parts[::-1]), segments, rtol=1e-10)


@EXAMPLES
@given(batches=st.lists(st.lists(FINITE, max_size=6), min_size=3, max_size=6), order=st.randoms(use_true_random=False))
def test_order_and_bracketing_of_merges_do_not_matter(batches, order):
    with jax.enable_x64(True):
        moments = [of(batch, np.float64) for batch in batches]
        while len(moments) > 1:
            order.shuffle(moments)
            moments.append(merge(moments.pop(), moments.pop()))
        assert_moments(moments[0], [[v for batch in batches for v in batch]], rtol=1e-10)


@pytest.mark.parametrize("value", [0.3, 1e25, -1e38])
def test_an_empty_side_changes_no_bit(value):
    full, empty = of([value, value / 2, value]), reward_history.init(1)
    for merged in (merge(full, empty), merge(empty, full)):
        for name in ("count", "mean", "m2"):
            assert np.array_equal(getattr(merged, name), getattr(full, name)), name
    assert_moments(merge(empty, empty), [[]], rtol=0)


def test_counts_neither_overflow_nor_stop():
    big = RewardHistory(count=jnp.array([2**30]), weight=jnp.ones(1), mean=jnp.array([1.0]), m2=jnp.array([2.0**30]))
    merged = merge(big, of([3.0]))
    assert merged.count[0] == 2**30 + 1  # a float32 count would still be 2**30
    merged = merge(big, RewardHistory(count=jnp.array([2**29]), weight=jnp.ones(1), mean=jnp.array([4.0]), m2=jnp.array([0.0])))
    assert merged.mean[0] == 2.0
    np.testing.assert_allclose(reward_history.std(merged)[0], math.sqrt((2**30 + 9 * 2**30 / 3) / (3 * 2**29)), rtol=1e-6)
    full = merge(big, merge(big, big))
    assert full.count[0] == 2**31 - 1 and full.mean[0] == 1.0


@pytest.mark.parametrize("size", [10**6, 10**8, 2 * 10**9])
def test_few_rewards_beside_very_many_of_next_to_no_weight(size):
    """What shrinkage does for a rare preference group: 10 rewards of its own and 5 rewards' worth of everybody's."""
    few = RewardHistory(count=jnp.array([10]), weight=jnp.ones(1), mean=jnp.zeros(1), m2=jnp.array([10.0]))
    many = RewardHistory(count=jnp.array([size]), weight=jnp.float32([5 / size]), mean=jnp.ones(1), m2=jnp.array([5.0]))
    for merged in (merge(few, many), merge(many, few)):
        np.testing.assert_allclose(reward_history.effective_count(merged), [15.0], rtol=1e-6)
        np.testing.assert_allclose(merged.mean, [1 / 3], rtol=1e-6)
        np.testing.assert_allclose(reward_history.std(merged), [math.sqrt((15 + 10 / 3) / 15)], rtol=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("weight", [0.0, 1e-45, 1e-40, 1e-38])
def test_a_weight_that_is_no_normal_number_counts_nowhere(weight, compiled):
    moments_of = batch_moments if compiled else reward_history.batch_moments
    rewards, ids, ones = np.float32([0.3, 0.7, 0.9]), np.int32([0, 0, 1]), np.ones(3, bool)
    moments = moments_of(rewards, ids, ones, 2, weights=np.float32([weight, weight, 1.0]))
    assert_moments(moments, [[], [np.float32(0.9)]], rtol=1e-7)


def test_std_and_its_floor():
    history = RewardHistory(count=jnp.array([0, 4, 4]), weight=jnp.ones(3), mean=jnp.zeros(3), m2=jnp.array([0.0, 16.0, 0.0001]))
    np.testing.assert_allclose(reward_history.std(history), [0.0, 2.0, 0.005], rtol=1e-6)
    np.testing.assert_allclose(reward_history.std(history, floor=0.5), [0.5, 2.0, 0.5], rtol=1e-6)


@EXAMPLES
@given(values=st.lists(st.tuples(FINITE, st.sampled_from([1.0, 0.5, 0.125, 0.0])), max_size=8))
def test_weighted_moments_equal_the_loops(values):
    padded = np.zeros((2, 8))
    padded[:, : len(values)] = np.array(values).reshape(-1, 2).T
    with jax.enable_x64(True):
        found = batch_moments(padded[0], np.zeros(8, np.int32), np.arange(8) < len(values), 1, weights=padded[1])
        effective = reward_history.effective_count(found)
    total, mean, m2 = oracle.weighted(values)
    assert found.count[0] == sum(w > 0 for _, w in values)
    np.testing.assert_allclose([effective[0], found.mean[0]], [total, mean], rtol=1e-12, atol=1e-10)
    np.testing.assert_allclose(found.m2[0], m2, rtol=1e-9, atol=1e-7)


PAIRS = st.lists(st.tuples(FINITE, st.sampled_from([1.0, 0.25])), max_size=8)


@EXAMPLES
@given(kept=PAIRS, gone=PAIRS)
def test_removed_is_never_seen(kept, gone):
    """Also with weights, also where all or nothing goes; a part taken twice by mistake and out once was taken once."""

    def moments(pairs):
        padded = np.zeros((2, 8))
        padded[:, : len(pairs)] = np.array(pairs).reshape(-1, 2).T
        return batch_moments(padded[0], np.zeros(8, np.int32), np.arange(8) < len(pairs), 1, weights=padded[1])

    with jax.enable_x64(True):
        never, part = moments(kept), moments(gone)
        seen = merge(never, part)
        for after, expected in ((reward_history.remove(seen, part), never), (reward_history.remove(merge(seen, part), part), seen)):
            np.testing.assert_array_equal(after.count, expected.count)
            for name in ("weight", "mean", "m2"):
                np.testing.assert_allclose(getattr(after, name), getattr(expected, name), rtol=1e-7, atol=1e-6, err_msg=name)
        jax.tree.map(np.testing.assert_array_equal, reward_history.remove(part, part), reward_history.init(1, jnp.float64))
        jax.tree.map(np.testing.assert_array_equal, reward_history.remove(seen, moments([])), seen)
        with pytest.raises(ValueError, match=f"row 0 has {len(kept)} rewards, {len(kept) + 1} can not be taken out"):
            reward_history.remove(never, merge(never, of([0.0], np.float64)))


@EXAMPLES
@given(values=st.lists(FINITE, min_size=1, max_size=8), scale=st.floats(-10, 10), offset=FINITE)
def test_affine_moments_are_those_of_changed_rewards(values, scale, offset):
    with jax.enable_x64(True):
        found = reward_history.affine(of(values, np.float64), scale, offset)
        expected = of([scale * v + offset for v in values], np.float64)
        np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(found.m2, expected.m2, rtol=1e-8, atol=1e-7)


@EXAMPLES
@given(segments=st.lists(st.lists(FINITE, max_size=4), min_size=3, max_size=3))
def test_pooled_is_the_moments_of_all_rewards(segments):
    values = [v for segment in segments for v in segment]
    ids = np.repeat(np.arange(3, dtype=np.int32), [len(segment) for segment in segments])
    rewards, owners = np.zeros(12), np.zeros(12, np.int32)
    rewards[: len(values)], owners[: len(values)] = values, ids
    with jax.enable_x64(True):
        found = jax.jit(reward_history.pooled)(batch_moments(rewards, owners, np.arange(12) < len(values), 3))
        assert_moments(found, [values], rtol=1e-10)


def test_sample_deviation():
    weight, m2 = jnp.float32([1, 1, 1, 0.5]), jnp.float32([0, 0, 16, 16])
    history = RewardHistory(count=jnp.array([0, 1, 5, 10]), weight=weight, mean=jnp.zeros(4), m2=m2)
    np.testing.assert_allclose(reward_history.std(history, sample=True), [0.0, 0.0, 2.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose(reward_history.std(history, sample=True, floor=0.5), [0.5, 0.5, 2.0, 2.0], rtol=1e-6)


def test_rows_never_borrow_from_another_segment():
    ids, mask = jnp.array([0, -1, 2, 1, 5]), jnp.array([True, True, True, True, False])
    np.testing.assert_array_equal(reward_history.rows(jnp.array([3.0, 4.0]), ids, mask), [3.0, np.nan, np.nan, 4.0, 0.0])
    np.testing.assert_array_equal(reward_history.rows(jnp.array([False, True]), ids, mask), [False, True, True, True, False])


def test_wrong_dtypes_are_refused():
    with pytest.raises(AssertionError):
        reward_history.batch_moments(jnp.ones(3, jnp.int32), jnp.zeros(3, jnp.int32), jnp.ones(3, bool), 2)
    with pytest.raises(AssertionError), jax.enable_x64(True):
        reward_history.merge(reward_history.init(2), reward_history.init(2, jnp.float64))
