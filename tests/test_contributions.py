"""Contributions add up to the history, and taking one out or dealing all anew gives what a run without him, or so assigned, would have."""

import dataclasses

import numpy as np
import pytest
import recorded_units

from pgrpo_jax import contributions
from pgrpo_jax.algorithms import memory, reward_history
from pgrpo_jax.algorithms.memory import Memory
from pgrpo_jax.structs import RewardHistory, Work

K = 3
ROW = {"ann": 0, "bob": 0, "cem": 1, "dee": 2}
LEAVES = ("count", "weight", "mean", "m2")


def unit(index, users, rewards, rows=None):
    return recorded_units.unit(index, users, rewards, rows or [ROW[user] for user in users])


def random_units(seed, steps=6, offset=0.0):
    random = np.random.default_rng(seed)
    users = sorted(ROW)
    units = []
    for index in range(steps):
        asked = list(random.choice(users, size=3))
        units.append(unit(index, asked, [list(offset + random.normal(ROW[user], 0.5, random.integers(0, 4))) for user in asked]))
    return units


def oracle(units, row_of, num_rows=K, leave_out=()):
    """[count, mean, m2] by plain loops."""
    rewards = [[] for _ in range(num_rows)]
    for u in units:
        for p, r in zip(u.prompt_index, u.rewards):
            user = u.prompt_records[p].user_id
            if user not in leave_out:
                rewards[row_of[user]].append(float(r))
    means = [sum(r) / len(r) if r else 0.0 for r in rewards]
    return [len(r) for r in rewards], means, [sum((x - m) ** 2 for x in r) for r, m in zip(rewards, means)]


def replayed(units, num_rows=K, dtype=np.float32):
    """The history as a run makes it: a batch for each unit, merged in order."""
    history = memory.init(Memory(), num_rows, dtype)
    for u in units:
        rows = np.array([p.history_row for p in u.prompt_records], np.int32)[u.prompt_index]
        batch = reward_history.batch_moments(u.rewards.astype(dtype), rows, np.ones(len(rows), bool), num_rows)
        history = memory.absorb(Memory(), history, batch)
    return RewardHistory(**{name: np.asarray(getattr(history, name)) for name in LEAVES})


def assert_history(history, expected, **tolerance):
    np.testing.assert_array_equal(history.count, expected[0])
    np.testing.assert_allclose(history.mean, expected[1], **tolerance)
    np.testing.assert_allclose(history.m2, expected[2], **tolerance)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_contributions_add_up_to_the_history(offset):
    units = random_units(1, offset=offset)
    parts = contributions.contributions(units, K)
    whole = contributions.total(parts.values(), next(iter(parts.values())))
    assert_history(whole, oracle(units, ROW), rtol=1e-9, atol=1e-9)
    history = replayed(units)
    np.testing.assert_array_equal(whole.count, history.count)
    np.testing.assert_allclose(whole.mean, history.mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("user", sorted(ROW))
def test_a_history_without_a_user_is_that_of_a_run_without_him(user):
    units = random_units(2)
    parts = contributions.contributions(units, K)
    left = contributions.without_user(replayed(units), parts[user])
    assert left.mean.dtype == np.float32
    assert_history(left, oracle(units, ROW, leave_out={user}), rtol=1e-4, atol=1e-5)


def test_the_only_user_of_a_row_leaves_exact_zeros_and_the_others_untouched():
    units = random_units(3)
    history, parts = replayed(units), contributions.contributions(units, K)
    left = contributions.without_user(history, parts["dee"])
    assert (left.count[2], left.weight[2], left.mean[2], left.m2[2]) == (0, 1, 0, 0) and history.count[2] > 0
    for name in LEAVES:
        np.testing.assert_array_equal(getattr(left, name)[:2], getattr(history, name)[:2])


def test_more_rewards_than_the_history_has_are_refused():
    units = random_units(4)
    parts = contributions.contributions(units, K)
    with pytest.raises(ValueError, match="can not be taken out"):
        contributions.without_user(replayed(units[:1]), parts["ann"])


def test_a_unit_counts_once_and_only_if_it_is_trained_on():
    units = random_units(5)
    again = contributions.contributions([*units, units[2], dataclasses.replace(units[0], work=Work(99, 0, 0, "test"))], K)
    once = contributions.contributions(units, K)
    assert list(again) == list(once) == sorted(once)
    for user in once:
        for name in LEAVES:
            np.testing.assert_array_equal(getattr(again[user], name), getattr(once[user], name))


def test_migration_is_the_history_of_a_run_so_assigned():
    units, other = random_units(6), {"ann": 3, "bob": 1, "cem": 1, "dee": 0}
    new = contributions.migrate(contributions.contributions(units, K), other, 4)
    assert new.mean.shape == (4,)
    assert_history(new, oracle(units, other, 4), rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(new.weight, np.ones(4))
    assert new.count[2] == 0 and new.mean[2] == new.m2[2] == 0


def test_a_user_whose_row_changed_midway_is_migrated_whole():
    units = [unit(0, ["ann"], [[1.0, 2.0]]), unit(1, ["ann"], [[4.0]], rows=[2])]
    parts = contributions.contributions(units, K)
    np.testing.assert_array_equal(parts["ann"].count, [2, 0, 1])
    new = contributions.migrate(parts, {"ann": 1}, 2)
    assert_history(new, ([0, 3], [0, 7 / 3], [0, sum((x - 7 / 3) ** 2 for x in (1, 2, 4))]), rtol=1e-12)


def test_components_are_kept_apart():
    units = random_units(7)
    parts = contributions.contributions(units, K, rewards=lambda u: np.stack([u.reward_components[n] for n in ("rating", "answered")], axis=1))
    total = contributions.total(parts.values(), next(iter(parts.values())))
    assert total.mean.shape == (2, K)
    assert_history(contributions._component(total, 0), oracle(units, ROW), rtol=1e-9, atol=1e-9)
    left = contributions.without_user(contributions.as_dtype(total, np.float32), parts["ann"])
    for c, name in enumerate(("rating", "answered")):
        shown = [dataclasses.replace(u, rewards=u.reward_components[name]) for u in units]
        assert_history(contributions._component(left, c), oracle(shown, ROW, leave_out={"ann"}), rtol=1e-4, atol=1e-5)


def test_weights_count_as_in_batch_moments():
    units = [unit(0, ["ann", "bob"], [[1.0, 3.0], [2.0]])]
    weights = np.array([0.5, 1.0, 0.0], np.float32)
    parts = contributions.contributions(units, K, weights=lambda u: weights)
    assert list(parts) == ["ann"]  # what weighs nothing counts nowhere
    expected = reward_history.batch_moments(units[0].rewards, np.zeros(3, np.int32), np.ones(3, bool), K, weights=weights)
    for name in LEAVES:
        np.testing.assert_allclose(getattr(parts["ann"], name), getattr(expected, name), rtol=1e-6)


@pytest.mark.parametrize("case", ["nobody", "row", "unassigned", "none"])
def test_what_can_not_be_told_apart_is_refused(case):
    units = random_units(8)
    parts = contributions.contributions(units, K)
    with pytest.raises(ValueError) as said:
        if case == "nobody":
            contributions.contributions([unit(0, [""], [[1.0]], rows=[0])], K)
        elif case == "row":
            contributions.contributions(units, 2)
        elif case == "unassigned":
            contributions.migrate(parts, {"ann": 0}, 1)
        else:
            contributions.migrate({}, {}, 1)
    wanted = {"nobody": "has no user_id", "row": r"outside [0, 2)", "unassigned": "user bob has new row None", "none": "0 users"}[case]
    assert wanted in str(said.value) and ":" in str(said.value)
