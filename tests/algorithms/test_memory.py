"""What a history remembers, against explicit lists of (reward, weight)."""

import functools

import advantage_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgrpo_jax.algorithms import memory, reward_history
from pgrpo_jax.algorithms.memory import Memory
from pgrpo_jax.structs import RewardHistory

EXAMPLES = settings(max_examples=30, deadline=None, derandomize=True)
ROWS, PREFERENCE_GROUPS = 12, 2
MEMORIES = [Memory(), Memory("ema", 5.0), Memory("discounted", 1.5), Memory("window", 1.0), Memory("window", 3.0)]

absorb = jax.jit(memory.absorb, static_argnums=0)
read = jax.jit(memory.read, static_argnums=0)
batch_moments = jax.jit(reward_history.batch_moments, static_argnums=3)


def moments_of(batch, dtype=np.float64) -> RewardHistory:
    """Moments of (preference group, reward, weight) triples."""
    columns = np.zeros((3, ROWS))
    columns[:, : len(batch)] = np.array(batch).reshape(-1, 3).T
    ids, rewards, weights = columns[0].astype(np.int32), columns[1].astype(dtype), columns[2].astype(dtype)
    return batch_moments(rewards, ids, np.arange(ROWS) < len(batch), PREFERENCE_GROUPS, weights=weights)


def remembered(m: Memory, batches, dtype=np.float64) -> RewardHistory:
    history = memory.init(m, PREFERENCE_GROUPS, dtype)
    for batch in batches:
        history = absorb(m, history, moments_of(batch, dtype))
    return read(m, history)


def assert_same(found: RewardHistory, expected: RewardHistory, *, rtol: float) -> None:
    np.testing.assert_array_equal(found.count, expected.count)
    for name in ("weight", "mean", "m2"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=rtol, atol=rtol, err_msg=name)


TRIPLES = st.tuples(st.integers(0, PREFERENCE_GROUPS - 1), st.floats(-100, 100), st.sampled_from([1.0, 0.5, 0.125]))
BATCHES = st.lists(st.lists(TRIPLES, max_size=ROWS), min_size=1, max_size=6)


@pytest.mark.parametrize("m", MEMORIES, ids=str)
@EXAMPLES
@given(batches=BATCHES)
def test_equals_the_list_of_what_is_remembered(m, batches):
    with jax.enable_x64(True):
        found = remembered(m, batches)
        effective = reward_history.effective_count(found)
    for k in range(PREFERENCE_GROUPS):
        past: oracle.Past = []
        for batch in batches:
            past = oracle.remember(past, [(r, w) for owner, r, w in batch if owner == k], m)
        pairs = [pair for batch in past for pair in batch]
        total, mean, m2 = oracle.weighted(pairs)
        assert found.count[k] == len(pairs)
        np.testing.assert_allclose([effective[k], found.mean[k]], [total, mean], rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(found.m2[k], m2, rtol=1e-9, atol=1e-8)


@EXAMPLES
@given(batches=BATCHES)
def test_what_never_forgets_is_cumulative(batches):
    """A window longer than the run to the bit of a merge in another order; half-lives that no run reaches nearly."""
    with jax.enable_x64(True):
        expected = remembered(Memory(), batches)
        assert_same(remembered(Memory("window", 6.0), batches), expected, rtol=1e-12)
        for kind in ("ema", "discounted"):
            assert_same(remembered(Memory(kind, 1e12), batches), expected, rtol=1e-8)


@EXAMPLES
@given(batches=BATCHES)
def test_a_window_of_one_is_the_last_batch_that_each_preference_group_was_in(batches):
    with jax.enable_x64(True):
        found = remembered(Memory("window", 1.0), batches)
        for k in range(PREFERENCE_GROUPS):
            own = [[triple for triple in batch if triple[0] == k] for batch in batches]
            last = moments_of(next((batch for batch in reversed(own) if batch), []))
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(last), strict=True):
                assert a[k] == b[k]


@pytest.mark.parametrize("m", MEMORIES, ids=str)
def test_a_batch_without_rewards_changes_no_bit_but_what_the_clock_forgets(m):
    before = functools.reduce(lambda h, b: absorb(m, h, moments_of(b, np.float32)), [[(0, 1.0, 1.0), (0, 2.0, 1.0)]], memory.init(m, 2))
    after = absorb(m, before, moments_of([], np.float32))
    if m.kind == "discounted":
        np.testing.assert_allclose(after.weight, [0.5 ** (1 / 1.5), 1.0], rtol=1e-6)
        np.testing.assert_allclose(reward_history.std(after), [0.5, 0.0], rtol=1e-6)
        np.testing.assert_array_equal(after.mean, before.mean)
    else:
        jax.tree.map(np.testing.assert_array_equal, after, before)


def test_an_absent_preference_group_is_forgotten_only_by_the_clock():
    """After 40 updates without it: ema keeps its weight, discounted does not, window keeps its batch."""
    first, others = [(0, 1.0, 1.0), (0, 3.0, 1.0)], [[(1, 5.0, 1.0)]] * 40
    for kind, weight in {"cumulative": 2.0, "ema": 2.0, "window": 2.0, "discounted": 2.0 * 2.0 ** (-40 / 10)}.items():
        found = remembered(Memory(kind, 10.0), [first, *others], np.float32)
        np.testing.assert_allclose(reward_history.effective_count(found)[0], weight, rtol=1e-5)
        np.testing.assert_allclose(found.mean[0], 2.0)
        np.testing.assert_allclose(reward_history.std(found)[0], 1.0, rtol=1e-5)


def test_what_is_forgotten_entirely_comes_back_as_if_new():
    """After 2000 updates nothing of the first rewards is left in float32, not even a weight; no NaN, and the next batch counts in full."""
    history = absorb(Memory("discounted", 1.0), memory.init(Memory("discounted", 1.0), 2), moments_of([(0, 1.0, 1.0)] * 3, np.float32))
    nothing = moments_of([], np.float32)
    history = jax.lax.fori_loop(0, 2000, lambda _, h: absorb(Memory("discounted", 1.0), h, nothing), history)
    assert reward_history.effective_count(history)[0] == 0 and reward_history.std(history)[0] == 0
    history = absorb(Memory("discounted", 1.0), history, moments_of([(0, 5.0, 1.0), (0, 7.0, 1.0)], np.float32))
    np.testing.assert_allclose(reward_history.effective_count(history), [2.0, 0.0], rtol=1e-6)
    np.testing.assert_allclose([history.mean[0], reward_history.std(history)[0]], [6.0, 1.0], rtol=1e-6)


def test_an_ema_levels_off_where_its_half_life_says_even_after_very_many_rewards():
    """Batches of 4 fade by 2^(−4/len), so the effective count tends to 4 / (1 − 2^(−4/len)); counts stop fitting float32 at 2^24."""
    m, batch = Memory("ema", 100.0), moments_of([(0, 0.0, 1.0), (0, 1.0, 1.0)] * 2, np.float32)
    limit = 4 / (1 - 2 ** (-4 / 100))
    many = 10**8
    history = memory.init(m, 2).replace(
        count=jnp.array([many, 0], jnp.int32), weight=jnp.array([limit / many, 1], jnp.float32), mean=jnp.array([0.5, 0], jnp.float32),
        m2=jnp.array([limit / 4, 0], jnp.float32),
    )  # fmt: skip
    history = jax.lax.fori_loop(0, 3000, lambda _, h: absorb(m, h, batch), history)
    assert history.count[0] == many + 12000
    np.testing.assert_allclose(reward_history.effective_count(history)[0], limit, rtol=1e-4)
    np.testing.assert_allclose([history.mean[0], reward_history.std(history)[0]], [0.5, 0.5], rtol=1e-4)


@pytest.mark.parametrize("components", [None, 2])
@pytest.mark.parametrize("m", MEMORIES, ids=str)
def test_init_is_empty_and_of_the_right_shape(m, components):
    history = memory.init(m, 3, jnp.float32, num_components=components)
    shape = (() if components is None else (components,)) + ((int(m.length),) if m.kind == "window" else ()) + (3,)
    assert [leaf.shape for leaf in jax.tree.leaves(history)] == [shape] * 4
    assert history.count.dtype == jnp.int32 and history.weight.dtype == history.mean.dtype == history.m2.dtype == jnp.float32
    assert not history.count.any() and not history.mean.any() and not history.m2.any() and np.all(history.weight == 1)


@pytest.mark.parametrize(
    "kind, length, message",
    [
        ("forever", 1.0, "memory is 'forever', must be one of cumulative, ema, window, discounted: set algorithm.memory"),
        ("ema", 0.0, "memory 'ema' has length 0.0, must be above 0"),
        ("discounted", float("nan"), "memory 'discounted' has length nan, must be above 0"),
        ("window", -1.0, "memory 'window' has length -1.0, must be above 0"),
        ("window", 1.5, "memory 'window' has length 1.5, must be a whole number of batches"),
    ],
)
def test_wrong_kinds_and_lengths(kind, length, message):
    with pytest.raises(ValueError, match=message):
        Memory(kind, length)
