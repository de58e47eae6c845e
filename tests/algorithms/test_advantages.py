"""Advantages by hand, in degenerate cases, and under the changes that must not matter (docs/algorithm.md)."""

import dataclasses
import functools

import advantage_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pgrpo_jax.algorithms import advantages, formulas, memory, reward_history
from pgrpo_jax.algorithms.advantages import AdvantageSettings
from pgrpo_jax.algorithms.memory import Memory
from pgrpo_jax.structs import RewardHistory

EXAMPLES = settings(max_examples=50, deadline=None, derandomize=True)
ROWS, PROMPTS, PREFERENCE_GROUPS = 24, 5, 3
EXACT = {"epsilon": 0.0, "std_floor": 0.0, "min_count": 1}
P_GRPO = AdvantageSettings(**EXACT)

cohort = jax.jit(formulas.cohort, static_argnames=("num_prompts", "epsilon"))
corollary = jax.jit(formulas.corollary, static_argnames=("epsilon", "std_floor", "sample"))
estimate = jax.jit(advantages.estimate, static_argnames=("settings", "num_prompts"))
p_grpo = jax.jit(oracle.p_grpo, static_argnames=("num_prompts", "epsilon", "std_floor", "min_count"))
grpo = jax.jit(oracle.grpo, static_argnames=("num_prompts", "epsilon", "std_floor", "min_count"))
batch_moments = jax.jit(reward_history.batch_moments, static_argnums=3)


def ids(*values) -> np.ndarray:
    return np.array(values, np.int32)


def history_of(past: list[list[float]], dtype=np.float32) -> RewardHistory:
    rewards, owners, mask = np.zeros(80, dtype), np.zeros(80, np.int32), np.arange(80) < sum(map(len, past))
    rewards[mask] = [reward for values in past for reward in values]
    owners[mask] = np.repeat(np.arange(len(past)), [len(values) for values in past])
    return batch_moments(rewards, owners, mask, len(past))


def test_the_example_of_the_documentation():
    """docs/algorithm.md, "By hand": every number below stands there."""
    rewards, prompt_index, preference_ids = np.float32([0.2, 0.6, 0.8, 0.8, 1.0, 0.0]), ids(0, 0, 1, 1, 2, 2), ids(0, 0, 0, 0, 1, 1)
    history = history_of([[0.1, 0.3, 0.3, 0.5], [0.5]])
    advantage, merged, diagnostics = p_grpo(
        rewards, prompt_index, preference_ids, np.ones(6, bool), history, num_prompts=3, epsilon=0.0, std_floor=1e-3, min_count=4
    )
    root = np.sqrt(2)
    np.testing.assert_allclose(history.mean, [0.3, 0.5], rtol=1e-6)
    np.testing.assert_allclose(reward_history.std(history), [0.1 * root, 0.0], rtol=1e-6)
    np.testing.assert_allclose(advantage, [-root / 2, 3 * root / 2, 5 * root / 2, 5 * root / 2, 1.0, -1.0], rtol=1e-5)
    own = cohort(rewards, prompt_index, np.ones(6, bool), num_prompts=3, epsilon=0.0)
    np.testing.assert_allclose(own, [-1, 1, 0, 0, 1, -1], rtol=1e-6)
    np.testing.assert_allclose(diagnostics.advantage_scale, [root / 2, 0.0], rtol=1e-5)
    np.testing.assert_allclose(diagnostics.bias, [1.5 * root, 0.0], rtol=1e-5)
    prompts = batch_moments(rewards, prompt_index, np.ones(6, bool), 3)
    np.testing.assert_allclose(prompts.mean, [0.4, 0.8, 0.5], rtol=1e-6)
    np.testing.assert_allclose(reward_history.std(prompts), [0.2, 0.0, 0.5], rtol=1e-6)
    scale, bias = corollary(prompt_index, preference_ids, np.ones(6, bool), prompts, history, epsilon=0.0, std_floor=1e-3)
    np.testing.assert_allclose(scale[:4], [root, root, 0, 0], rtol=1e-5)
    np.testing.assert_allclose(bias[:4], [root / 2, root / 2, 5 * root / 2, 5 * root / 2], rtol=1e-5)
    np.testing.assert_array_equal(merged.count, [8, 3])
    np.testing.assert_allclose(merged.mean, [0.45, 0.5], rtol=1e-6)
    np.testing.assert_allclose(reward_history.std(merged), [0.25, np.sqrt(1 / 6)], rtol=1e-6)


@pytest.mark.parametrize(
    "changes, warm, cold",
    [
        ({"baseline": "cohort", "scale": "none"}, [-0.2, 0.2], [0.5, -0.5]),
        ({"baseline": "leave_one_out", "scale": "none"}, [-0.4, 0.4], [1, -1]),
        ({"baseline": "cohort"}, [-(2**0.5), 2**0.5], [1, -1]),
        ({"blend": 0.5}, [-3 * 2**0.5 / 4, 5 * 2**0.5 / 4], [1, -1]),
        ({"cold_start": "zero"}, [-(2**0.5) / 2, 3 * 2**0.5 / 2], [0, 0]),
        ({"cold_start": "pooled"}, [-(2**0.5) / 2, 3 * 2**0.5 / 2], [0.66 / 0.0224**0.5, -0.34 / 0.0224**0.5]),
        ({"shrinkage": 4.0}, [-0.12 / 0.0216**0.5, 0.28 / 0.0216**0.5], [0.628 / 0.022016**0.5, -0.372 / 0.022016**0.5]),
    ],
    ids=str,
)
def test_the_relatives_in_the_documentation(changes, warm, cold):
    """The second table of "By hand"."""
    rewards, prompt_index, owners = np.float32([0.2, 0.6, 0.8, 0.8, 1.0, 0.0]), ids(0, 0, 1, 1, 2, 2), ids(0, 0, 0, 0, 1, 1)
    s = dataclasses.replace(AdvantageSettings(epsilon=0.0, std_floor=1e-3, min_count=4.0), **changes)
    rows = rewards, prompt_index, owners, owners, np.zeros_like(owners), np.ones(6, bool)
    found, _, diagnostics = estimate(*rows, history_of([[0.1, 0.3, 0.3, 0.5], [0.5]]), settings=s, num_prompts=3)
    np.testing.assert_allclose(found[:2], warm, rtol=2e-5)
    np.testing.assert_allclose(found[4:], cold, rtol=2e-5)
    np.testing.assert_allclose(diagnostics.effective_count, [4 + s.shrinkage, 1 + s.shrinkage])


@pytest.mark.parametrize("seed", range(3))
def test_corollary_holds_for_every_completion(seed):
    with jax.enable_x64(True):
        case = oracle.random_case(seed, np.float64)
        history, arguments = history_of(case.past, np.float64), (case.prompt_index, case.preference_ids, case.mask)
        prompts = batch_moments(case.rewards, case.prompt_index, case.mask, case.num_prompts)
        warm = case.mask & (np.asarray(history.count)[np.where(case.mask, case.preference_ids, 0)] > 1)
        assert warm.sum() > 10
        for epsilon, floor in ((0.0, 0.0), (0.3, 1.5)):
            own = cohort(case.rewards, case.prompt_index, case.mask, num_prompts=case.num_prompts, epsilon=epsilon)
            advantage, _, diagnostics = p_grpo(
                case.rewards, *arguments, history, num_prompts=case.num_prompts, epsilon=epsilon, std_floor=floor, min_count=2
            )
            scale, bias = corollary(*arguments, prompts, history, epsilon=epsilon, std_floor=floor)
            np.testing.assert_allclose(advantage[warm], (scale * own + bias)[warm], rtol=1e-10, atol=1e-10)
            members = case.mask & (case.preference_ids == 0)
            np.testing.assert_allclose(diagnostics.advantage_scale[0], np.mean(scale[members]), rtol=1e-10)
            np.testing.assert_allclose(diagnostics.bias[0], np.mean(bias[members]), rtol=1e-10)


def test_grpo_keeps_the_same_history_and_diagnostics():
    case = oracle.random_case(0, np.float32)
    options = {"num_prompts": case.num_prompts, "epsilon": 1e-6, "std_floor": 1e-3, "min_count": 8}
    own, *rest = grpo(*case[:4], history_of(case.past), **options)
    advantage, *same = p_grpo(*case[:4], history_of(case.past), **options)
    jax.tree.map(np.testing.assert_array_equal, rest, same)
    assert not np.allclose(own, advantage)


def test_cold_start_ends_at_min_count():
    rewards, prompt_index, zeros = np.float32([1.0, 3.0]), ids(0, 0), ids(0, 0)
    for past, expected in (([0.0, 2.0], [-1.0, 1.0]), ([0.0, 2.0, 2.0, 0.0], [0.0, 2.0])):
        history = history_of([past])
        advantage, merged, _ = p_grpo(
            rewards, prompt_index, zeros, np.ones(2, bool), history, num_prompts=1, epsilon=0.0, std_floor=0.0, min_count=4
        )
        np.testing.assert_allclose(advantage, expected, atol=1e-6)
        assert merged.count[0] == len(past) + 2  # cold or not, the batch enters once


@pytest.mark.parametrize("min_count", [-1, 0, 1])
def test_a_preference_group_never_seen_is_always_cold(min_count):
    advantage, merged, diagnostics = p_grpo(
        np.float32([0.0, 4.0]), ids(0, 0), ids(1, 1), np.ones(2, bool), reward_history.init(3),
        num_prompts=1, epsilon=0.0, std_floor=0.0, min_count=min_count,
    )  # fmt: skip
    np.testing.assert_array_equal(advantage, [-1.0, 1.0])
    np.testing.assert_array_equal(merged.count, [0, 2, 0])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(diagnostics))
    np.testing.assert_array_equal(diagnostics.advantage_scale, np.zeros(3))


def test_std_floor_bounds_the_advantage():
    history = history_of([[0.5] * 8])
    arguments = np.float32([0.5, 0.6]), ids(0, 0), ids(0, 0), np.ones(2, bool), history
    advantage, _, _ = p_grpo(*arguments, num_prompts=1, epsilon=0.0, std_floor=0.05, min_count=1)
    np.testing.assert_allclose(advantage, [0.0, 2.0], rtol=1e-5)
    advantage, _, _ = p_grpo(*arguments, num_prompts=1, epsilon=0.0, std_floor=0.0, min_count=1)
    assert np.isfinite(advantage).all()


@pytest.mark.parametrize("epsilon", [0.0, 1e-6])
@pytest.mark.parametrize("value", [0.1, 1e6 + 0.3, 3e20])
def test_equal_rewards_give_exactly_zero(value, epsilon):
    rewards, prompt_index, mask = np.full(7, value, np.float32), ids(0, 0, 0, 1, 1, 1, 2), np.ones(7, bool)
    advantage = cohort(rewards, prompt_index, mask, num_prompts=3, epsilon=epsilon)
    np.testing.assert_array_equal(advantage, np.zeros(7))


@pytest.mark.parametrize("estimator", [grpo, p_grpo])
def test_all_masked_changes_nothing(estimator):
    history = history_of([[0.0, 1.0], []])
    advantage, merged, diagnostics = estimator(
        np.full(4, np.nan, np.float32), ids(-1, 9, 0, 0), ids(-1, 9, 0, 1), np.zeros(4, bool), history, num_prompts=2, **EXACT
    )
    np.testing.assert_array_equal(advantage, np.zeros(4))
    jax.tree.map(np.testing.assert_array_equal, merged, history)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(diagnostics))


def test_a_wrong_id_shows_and_does_not_spread():
    arguments = np.float32([0.0, 1.0, 1.0, 1.0]), ids(0, 0, 1, 2), ids(0, 0, 7, -1), np.ones(4, bool)
    advantage, merged, diagnostics = p_grpo(*arguments, history_of([[0.0, 2.0], [5.0, 7.0]]), num_prompts=3, **EXACT)
    np.testing.assert_array_equal(advantage, [-1.0, 0.0, np.nan, np.nan])
    np.testing.assert_array_equal(merged.count, [4, 2])
    np.testing.assert_array_equal(diagnostics.batch_count, [2, 0])


def test_dtypes_of_rewards_and_history_must_agree():
    with jax.enable_x64(True), pytest.raises(AssertionError):
        oracle.p_grpo(np.ones(2), ids(0, 0), ids(0, 0), np.ones(2, bool), reward_history.init(1), num_prompts=1, **EXACT)


def elements(width: int):
    return st.floats(-1, 1, width=width, allow_subnormal=False)


def spread(values: np.ndarray) -> np.ndarray:
    """Rewards whose deviation is far above the floor in every preference group, whatever hypothesis draws."""
    return values + np.where(np.arange(len(values)) // PREFERENCE_GROUPS % 2, 2, -2).astype(values.dtype)


def batch(dtype):
    """Rewards with mask, uneven prompts that each belong to one preference group, and a past of 12 rewards for each."""
    width = 32 if dtype == np.float32 else 64
    return st.fixed_dictionaries(
        {
            "rewards": hnp.arrays(dtype, ROWS, elements=elements(width)).map(spread),
            "prompt_index": hnp.arrays(np.int32, ROWS, elements=st.integers(0, PROMPTS - 1)),
            "preference_of_prompt": hnp.arrays(np.int32, PROMPTS, elements=st.integers(0, PREFERENCE_GROUPS - 1)),
            "mask": hnp.arrays(bool, ROWS),
            "past": hnp.arrays(dtype, 12 * PREFERENCE_GROUPS, elements=elements(width)).map(spread),
        }
    )


def run(estimator, draw, *, order=None, axis=None):
    """Returns (advantages, merged history) of a drawn batch, rows optionally reordered."""
    order = np.arange(ROWS) if order is None else order
    owners = np.arange(len(draw["past"]), dtype=np.int32) % PREFERENCE_GROUPS
    history = batch_moments(draw["past"], owners, np.ones(len(owners), bool), PREFERENCE_GROUPS)
    preference_ids = draw["preference_of_prompt"][draw["prompt_index"]]
    arguments = [x[order] for x in (draw["rewards"], draw["prompt_index"], preference_ids, draw["mask"])]
    advantage, merged, _ = estimator(*arguments, history, num_prompts=PROMPTS, **EXACT)
    return np.asarray(advantage), merged


def affine(draw, slope, shift):
    """Changes the rewards of preference group 0, past and present, by slope·R + shift."""
    mine = draw["preference_of_prompt"][draw["prompt_index"]] == 0
    past = np.arange(len(draw["past"])) % PREFERENCE_GROUPS == 0
    dtype = draw["rewards"].dtype.type
    changed = {k: np.where(w, dtype(slope) * draw[k] + dtype(shift), draw[k]) for k, w in (("rewards", mine), ("past", past))}
    return {**draw, **changed}


@EXAMPLES
@given(draw=batch(np.float64), slope=st.floats(0.1, 100), shift=st.floats(-1e3, 1e3))
def test_affine_change_of_one_preference_group_float64(draw, slope, shift):
    with jax.enable_x64(True):
        before, _ = run(p_grpo, draw)
        after, _ = run(p_grpo, affine(draw, slope, shift))
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-10)


@EXAMPLES
@given(draw=batch(np.float32), slope=st.floats(0.1, 100), shift=st.floats(-1e7, 1e7))
def test_affine_change_of_one_preference_group_float32(draw, slope, shift):
    changed = affine(draw, slope, shift)
    before, _ = run(p_grpo, draw)
    after, _ = run(p_grpo, changed)
    largest = max(np.abs(changed["rewards"]).max(), np.abs(changed["past"]).max())
    deviation = slope * np.std(draw["past"][::PREFERENCE_GROUPS].astype(np.float64))
    assert np.isfinite(after).all()
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * (1 + largest / deviation))


@EXAMPLES
@given(draw=batch(np.float64), seed=st.integers(0, 2**16))
def test_order_of_rows_does_not_matter(draw, seed):
    order = np.random.default_rng(seed).permutation(ROWS)
    with jax.enable_x64(True):
        for estimator in (grpo, p_grpo):
            (before, history), (after, same) = run(estimator, draw), run(estimator, draw, order=order)
            np.testing.assert_allclose(after, before[order], rtol=0, atol=1e-10)
            jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10), same, history)


@functools.cache
def on_devices(num_devices: int):
    """p_grpo by shard_map over the first devices."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:num_devices]), ("rows",))
    rows, everywhere = jax.sharding.PartitionSpec("rows"), jax.sharding.PartitionSpec()
    fn = functools.partial(oracle.p_grpo, num_prompts=PROMPTS, **EXACT, axis_name="rows")
    return jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=(rows, rows, rows, rows, everywhere), out_specs=(rows, everywhere, everywhere)))


@EXAMPLES
@given(draw=batch(np.float64), num_devices=st.sampled_from([2, 3, 4, 8]), seed=st.integers(0, 2**16))
def test_split_over_devices_does_not_matter(draw, num_devices, seed):
    order = np.random.default_rng(seed).permutation(ROWS)

    def split(*args, num_prompts, epsilon, std_floor, min_count):
        return on_devices(num_devices)(*args)

    with jax.enable_x64(True):
        (before, history), (after, same) = run(p_grpo, draw), run(split, draw, order=order)
    np.testing.assert_allclose(after, before[order], rtol=0, atol=1e-10)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10), same, history)


@EXAMPLES
@given(draw=batch(np.float64), other=st.floats(-1e3, 1e3))
def test_one_preference_group_does_not_see_another(draw, other):
    """What P-GRPO is for: rewards of one population never move the advantages of another, not even cold."""
    theirs = draw["preference_of_prompt"][draw["prompt_index"]] != 0
    changed = {**draw, "rewards": np.where(theirs, other, draw["rewards"])}
    with jax.enable_x64(True):
        (before, history), (after, same) = run(p_grpo, draw), run(p_grpo, changed)
    np.testing.assert_array_equal(after[~theirs], before[~theirs])
    assert same.mean[0] == history.mean[0] and same.m2[0] == history.m2[0]


# --- options that are each other


def by(changes: dict, draw, *, history_ids=None, mask=None, history=None, repeats: int = 1):
    """`estimate` of a drawn batch, P-GRPO but for the changes, against its past or another history; rows repeated."""
    preference_ids = draw["preference_of_prompt"][draw["prompt_index"]]
    mask = draw["mask"] if mask is None else mask
    history_ids = preference_ids if history_ids is None else history_ids
    rows = draw["rewards"], draw["prompt_index"], preference_ids, history_ids, np.zeros(ROWS, np.int32)
    arguments = *(np.tile(x, repeats) for x in rows), mask, past_of(draw) if history is None else history
    return estimate(*arguments, settings=dataclasses.replace(P_GRPO, **changes), num_prompts=PROMPTS)


def past_of(draw, preference_groups: int = PREFERENCE_GROUPS):
    """The history that `run` gives, or that of everybody together."""
    owners = np.arange(len(draw["past"]), dtype=np.int32) % preference_groups
    return batch_moments(draw["past"], owners, np.ones(len(owners), bool), preference_groups)


@EXAMPLES
@given(draw=batch(np.float64))
def test_corollary_turns_grpo_into_p_grpo(draw):
    """To 1e-6 relative to the size of the terms, also with sample deviations; 0 = 0 where a prompt's completions earn the same."""
    preference_ids = draw["preference_of_prompt"][draw["prompt_index"]]
    with jax.enable_x64(True):
        prompts = batch_moments(draw["rewards"], draw["prompt_index"], draw["mask"], PROMPTS)
        for deviation in ("population", "sample"):
            own = by({"baseline": "cohort", "scale": "cohort", "deviation": deviation, "epsilon": 1e-9}, draw)[0]
            rows = draw["prompt_index"], preference_ids, draw["mask"], prompts, past_of(draw)
            scale, bias = corollary(*rows, epsilon=1e-9, std_floor=0.0, sample=deviation == "sample")
            found = by({"deviation": deviation, "epsilon": 1e-9}, draw)[0]
            np.testing.assert_allclose(found, scale * own + bias, rtol=1e-6, atol=1e-6)


@EXAMPLES
@given(draw=batch(np.float64))
def test_blend_goes_from_p_grpo_to_scale_only(draw):
    with jax.enable_x64(True):
        scale_only = np.asarray(by({"baseline": "cohort"}, draw)[0])
        np.testing.assert_allclose(by({"blend": 1.0}, draw)[0], scale_only, rtol=0, atol=1e-12)
        half = (scale_only + np.asarray(by({}, draw)[0])) / 2
        np.testing.assert_allclose(by({"blend": 0.5}, draw)[0], half, rtol=0, atol=1e-12)
    for prompt in range(PROMPTS):
        assert abs(scale_only[draw["mask"] & (draw["prompt_index"] == prompt)].sum()) < 1e-10, "adds up to 0 within a prompt"


@EXAMPLES
@given(draw=batch(np.float64))
def test_leave_one_out_is_grpos_difference_times_n_over_n_minus_1(draw):
    with jax.enable_x64(True):
        difference = np.asarray(by({"baseline": "cohort", "scale": "none"}, draw)[0])
        found = np.asarray(by({"baseline": "leave_one_out", "scale": "none"}, draw)[0])
    kept = draw["prompt_index"][draw["mask"]]
    count = np.bincount(kept, minlength=PROMPTS)[kept]
    factor = np.where(count > 1, count / np.maximum(count - 1, 1), 0.0)
    np.testing.assert_allclose(found[draw["mask"]], factor * difference[draw["mask"]], rtol=1e-12, atol=1e-12)


@EXAMPLES
@given(draw=batch(np.float64))
def test_one_row_for_all_is_one_preference_group(draw):
    """The arm "pooled": everyone's history is row 0; what is reported stays by preference group."""
    zeros = np.zeros(ROWS, np.int32)
    with jax.enable_x64(True):
        everyone = past_of(draw, 1)
        empty = reward_history.init(PREFERENCE_GROUPS - 1, jnp.float64)
        padded = jax.tree.map(lambda first, others: jnp.concatenate([first, others]), everyone, empty)
        found, merged, diagnostics = by({}, draw, history_ids=zeros, history=padded)
        alone, same, _ = by({}, {**draw, "preference_of_prompt": np.zeros(PROMPTS, np.int32)}, history=everyone)
    np.testing.assert_array_equal(found, alone)
    assert merged.count[0] == same.count[0] and merged.mean[0] == same.mean[0] and not merged.count[1:].any()
    kept = draw["preference_of_prompt"][draw["prompt_index"]][draw["mask"]]
    np.testing.assert_array_equal(diagnostics.batch_count, np.bincount(kept, minlength=PREFERENCE_GROUPS))


@EXAMPLES
@given(draw=batch(np.float64))
def test_shrinkage_goes_from_ones_own_history_to_everyones(draw):
    with jax.enable_x64(True):
        own, pooled = by({}, draw)[0], by({}, draw, history_ids=np.zeros(ROWS, np.int32), history=past_of(draw, 1))[0]
        np.testing.assert_allclose(by({"shrinkage": 1e-12}, draw)[0], own, rtol=0, atol=1e-8)
        np.testing.assert_allclose(by({"shrinkage": 1e12}, draw)[0], pooled, rtol=0, atol=1e-8)


@EXAMPLES
@given(draw=batch(np.float64))
def test_after_is_before_with_the_history_that_has_the_batch_in_it(draw):
    with jax.enable_x64(True):
        after, merged, _ = by({"timing": "after"}, draw)
        before, _, _ = by({}, draw, history=merged)
    np.testing.assert_array_equal(after, before)


@EXAMPLES
@given(draw=batch(np.float64))
def test_duplicates_under_the_mask_do_not_count(draw):
    """A unit that was made twice is taken once: its second copy changes nothing."""
    mask = np.concatenate([draw["mask"], np.zeros(ROWS, bool)])
    with jax.enable_x64(True):
        once, *rest = by({}, draw)
        twice, *same = by({}, draw, mask=mask, repeats=2)
    np.testing.assert_allclose(twice[:ROWS], once, rtol=0, atol=1e-12)
    assert not twice[ROWS:].any()
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12), same, rest)


@pytest.mark.parametrize("long", [Memory("window", 50.0), Memory("ema", 1e12), Memory("discounted", 1e12)], ids=str)
def test_memories_longer_than_the_run_are_cumulative(long):
    found = []
    with jax.enable_x64(True):
        for s in (P_GRPO, dataclasses.replace(P_GRPO, memory=long)):
            history = memory.init(s.memory, oracle.K, np.float64)
            for step in oracle.random_steps(7, 5):
                advantage, history, _ = estimate(*step, history, settings=s, num_prompts=oracle.P)
            found.append(advantage)
    np.testing.assert_allclose(*found, rtol=1e-8, atol=1e-8)


def test_a_stale_reward_is_trained_on_but_does_not_enter():
    """Staleness 3 at limit 3 stays out of the history, at half-life 3 it enters as half a reward; its own advantage is the same."""
    rewards, zeros, ones = np.float32([1.0, 5.0]), ids(0, 0), np.ones(2, bool)
    found = {}
    for name, changes in (("off", {}), ("limit", {"staleness_limit": 3}), ("half", {"staleness_half_life": 3.0})):
        settings_ = dataclasses.replace(P_GRPO, **changes)
        found[name] = estimate(rewards, zeros, zeros, zeros, ids(0, 3), ones, history_of([[1.0, 3.0]]), settings=settings_, num_prompts=1)
    for advantage, _, _ in found.values():
        np.testing.assert_allclose(advantage, [-1.0, 3.0], rtol=1e-6)
    for name, count, effective, mean in (("off", 4, 4.0, 2.5), ("limit", 3, 3.0, 5 / 3), ("half", 4, 3.5, 7.5 / 3.5)):
        merged = found[name][1]
        assert merged.count[0] == count
        np.testing.assert_allclose([reward_history.effective_count(merged)[0], merged.mean[0]], [effective, mean], rtol=1e-6)


def test_components_need_as_many_weights_and_histories():
    arguments = np.ones((2, 3), np.float32), ids(0, 0), ids(0, 0), ids(0, 0), ids(0, 0), np.ones(2, bool)
    weighted = dataclasses.replace(P_GRPO, component_weights=(1.0, 2.0))
    with pytest.raises(AssertionError):
        estimate(*arguments, memory.init(Memory(), 1, num_components=3), settings=weighted, num_prompts=1)


@pytest.mark.parametrize("field", ["baseline", "scale", "timing", "cold_start", "deviation"])
def test_an_unknown_name_is_refused(field):
    with pytest.raises(ValueError, match=f"{field} is 'mean', must be one of .*: set algorithm.{field}"):
        AdvantageSettings(**{field: "mean"})


def test_jit_compiles_once_for_one_shape():
    compiled = jax.jit(functools.partial(oracle.p_grpo, num_prompts=7, epsilon=1e-6, std_floor=1e-3, min_count=8))
    for seed in range(3):
        case = oracle.random_case(seed, np.float32)
        compiled(*case[:4], jax.tree.map(jnp.asarray, history_of(case.past)))
    assert compiled._cache_size() == 1
