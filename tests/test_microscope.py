"""Every scheme of the microscope against plain Python loops over the recorded rewards; files in any order, gaps said."""

import dataclasses
import math

import numpy as np
import pytest
from recorded_units import unit

from pgrpo_jax import microscope
from pgrpo_jax.algorithms.advantages import AdvantageSettings
from pgrpo_jax.curation import Curation
from pgrpo_jax.microscope import Own, Step
from pgrpo_jax.rollout_files import pack_rollouts
from pgrpo_jax.structs import Prompt

K, EPSILON, FLOOR, LEAST = 3, 1e-6, 1e-3, 5.0
BASE = AdvantageSettings(min_count=LEAST, epsilon=EPSILON, std_floor=FLOOR)
USERS = {"ann": 0, "bob": 0, "cem": 1, "dee": 1, "eva": 1, "fay": 2}


def random_steps(seed, count=7):
    """Two units of two prompts a step; 0 to 4 completions a prompt; some prompts dead; preference group 2 is rare, and off at first."""
    random = np.random.default_rng(seed)
    steps = []
    for number in range(1, count + 1):
        units = []
        for index in (2 * number - 2, 2 * number - 1):
            asked = list(random.choice(sorted(USERS), size=2, p=[0.2, 0.2, 0.2, 0.2, 0.1, 0.1]))
            rewards = [list(random.normal(10 * USERS[user], 1 + USERS[user], random.integers(0, 5))) for user in asked]
            rewards = [[mine[0]] * len(mine) if mine and random.random() < 0.3 else mine for mine in rewards]
            units.append(unit(index, asked, rewards, [USERS[user] for user in asked], step=number - 1))
        steps.append(Step(number, tuple(units)))
    return tuple(steps)


def moments(values, weights=None):
    weights = [1.0] * len(values) if weights is None else weights
    total = sum(weights)
    if total == 0:
        return 0.0, 0.0, 0.0
    mean = sum(w * v for w, v in zip(weights, values)) / total
    return total, mean, math.sqrt(sum(w * (v - mean) ** 2 for w, v in zip(weights, values)) / total)


def standard(reward, mean, deviation):
    return (reward - mean) / (deviation + EPSILON)


def oracle(steps, name, placebo=None):
    """Advantages of all completions under a scheme, in canonical order, and whether its history was warm."""
    batches, out, warmth = [], [], []  # a batch: [(row, reward)]
    for step in steps:
        prompts = [(p, [float(r) for i, r in zip(u.prompt_index, u.rewards) if i == j]) for u in step.units for j, p in enumerate(u.prompt_records)]
        rows = [0 if name == "pooled" else placebo[p.user_id] if name == "placebo" else p.history_row for p, _ in prompts]
        everything = [r for _, mine in prompts for r in mine]
        arrived = [(row, r) for row, (_, mine) in zip(rows, prompts) for r in mine]
        past = [*batches, arrived] if name == "after" else list(batches)
        batches.append(arrived)
        for row, (_, mine) in zip(rows, prompts):
            count, mean, deviation = remembered(past, row, name)
            deviation = max(deviation, FLOOR)
            _, own_mean, own_deviation = moments(mine)
            _, all_mean, all_deviation = moments(everything)
            for r in mine:
                cohort = standard(r, own_mean, own_deviation) if own_deviation > 1e-6 else 0.0
                others = (sum(mine) - r) / (len(mine) - 1) if len(mine) > 1 else r
                warm = count >= LEAST
                against = {
                    "grpo": cohort, "dr_grpo": r - own_mean, "rloo": r - others, "reinforce_pp": standard(r, all_mean, all_deviation),
                    "scale_only": standard(r, own_mean, deviation), "blend": standard(r, (own_mean + mean) / 2, deviation),
                }.get(name, standard(r, mean, deviation))  # fmt: skip
                no_history = name in ("grpo", "dr_grpo", "rloo", "reinforce_pp")
                out.append(against if no_history or warm else cohort)
                warmth.append(warm)
    return np.array(out), np.array(warmth)


def remembered(batches, row, name):
    """(effective count, mean, deviation) of a history."""
    of_row = [[r for k, r in batch if k == row] for batch in batches]
    if name == "window":
        of_row = [mine for mine in of_row if mine][-microscope.WINDOW_BATCHES :]
    if name == "ema":
        weights, values = [], []
        for mine in of_row:
            weights = [w * 2 ** (-len(mine) / microscope.EMA_REWARDS) for w in weights] + [1.0] * len(mine)
            values += mine
        return moments(values, weights)
    values = [r for mine in of_row for r in mine]
    weights = [1.0] * len(values)
    if name == "shrinkage":
        everyone = [r for batch in batches for _, r in batch]
        values = values + everyone
        weights = weights + [microscope.SHRINK_REWARDS / len(everyone)] * len(everyone) if everyone else weights
    return moments(values, weights)


@pytest.fixture
def few_schemes(monkeypatch):
    """Compiles in a fraction of the time."""
    monkeypatch.setattr(microscope, "SCHEMES", {name: microscope.SCHEMES[name] for name in ("dr_grpo", "p_grpo")})


@pytest.fixture(scope="module")
def steps():
    return random_steps(0)


@pytest.fixture(scope="module")
def table(steps):
    own = Own(dataclasses.replace(BASE, baseline="batch"), Curation(4))
    return microscope.look(steps, BASE, own=own, num_preference_groups=K)


@pytest.mark.parametrize("name", microscope.SCHEMES)
def test_every_scheme_is_its_formula(name, steps, table):
    prompts = [p for step in steps for u in step.units for p in u.prompt_records]
    expected, warm = oracle(steps, name, microscope.placebo_rows(prompts, 0))
    np.testing.assert_allclose(table.advantages[name], expected, rtol=2e-4, atol=2e-5)
    assert 0 < warm.sum() < len(warm) or name == "after"


def test_the_table_follows_the_records(steps, table):
    units = [(step.number, u) for step in steps for u in step.units]
    assert table.step.tolist() == [number for number, u in units for _ in u.texts]
    assert table.answers == tuple(text for _, u in units for text in u.texts)
    assert [table.prompts[p].prompt_id for p in table.prompt] == [u.prompt_records[i].prompt_id for _, u in units for i in u.prompt_index]
    assert table.preference.tolist() == [table.prompts[p].preference_id for p in table.prompt]
    np.testing.assert_array_equal(table.raw, np.concatenate([u.rewards for _, u in units]).astype(np.float64))
    np.testing.assert_array_equal(table.warm, oracle(steps, "p_grpo")[1])
    assert table.numbers == tuple(range(1, 8)) and table.num_preference_groups == K


def test_scale_and_bias_turn_one_into_the_other(table):
    """Over the completions of a preference group in a step, the means obey Corollary 3.1's bias: mean Ã = bias, as GRPO's mean is 0."""
    seen = 0
    for s, number in enumerate(table.numbers):
        for k in range(K):
            rows = (table.step == number) & (table.preference == k)
            assert table.present[s, k] == rows.sum()
            if not (rows & table.warm).any():
                assert np.isnan(table.scale[s, k]) and np.isnan(table.bias[s, k])
                continue
            seen += 1
            assert table.bias[s, k] == pytest.approx(table.advantages["p_grpo"][rows].mean(), abs=1e-4)
            prompts = {p: table.reward[table.prompt == p] for p in table.prompt[rows]}
            divisor = max(remembered_before(table, number, k), FLOOR) + EPSILON
            scales = [moments(list(prompts[p]))[2] / divisor for p in table.prompt[rows]]
            assert table.scale[s, k] == pytest.approx(np.mean(scales), rel=1e-3, abs=1e-4)
    assert seen > 5


def remembered_before(table, number, k):
    return moments(list(table.reward[(table.step < number) & (table.preference == k)]))[2]


def test_own_scheme_shapes_rewards_and_takes_components_apart(few_schemes):
    units = (unit(0, ["ann", "cem"], [[1.0, 0.0], [0.0, 2.0]], [0, 1], lengths=[1, 4, 2, 3]),)
    shaped = Own(dataclasses.replace(BASE, baseline="cohort", scale="none"), Curation(2, max_new_tokens=4, overlong_buffer=2, overlong_penalty=1.0))
    table = microscope.look((Step(1, units),), BASE, own=shaped)
    np.testing.assert_allclose(table.reward, [1.0, -1.0, 0.0, 1.5])
    np.testing.assert_allclose(table.raw, [1.0, 0.0, 0.0, 2.0])
    np.testing.assert_allclose(table.advantages["own"], [1.0, -1.0, -0.75, 0.75])
    weighted = dataclasses.replace(BASE, baseline="cohort", scale="none", component_weights=(1.0, 10.0))
    table = microscope.look((Step(1, units),), BASE, own=Own(weighted, Curation(2), ("rating", "answered")))
    np.testing.assert_allclose(table.advantages["own"], [5.5, -5.5, -6.0, 6.0])
    np.testing.assert_allclose(table.advantages["dr_grpo"], [0.5, -0.5, -1.0, 1.0])  # the others see the total


def test_rewards_of_stale_completions_weigh_what_the_configuration_says(few_schemes):
    steps = (Step(4, (unit(0, ["ann"], [[0.0, 2.0] * 8], [0], step=3, version=1),)), Step(5, (unit(1, ["ann"], [[5.0]], [0], step=4),)))
    for limit, warm in ((0, True), (3, True), (2, False)):  # version 1 is trained on after 3 updates: staleness 2
        table = microscope.look(steps, dataclasses.replace(BASE, staleness_limit=limit))
        assert table.warm.tolist() == [False] * 16 + [warm]


def test_the_history_row_of_a_prompt_is_the_recorded_arm(few_schemes):
    units = (unit(0, ["ann", "cem"], [[0.0, 4.0] * 3, [1.0] * 2], [0, 1], history_rows=[1, 1]),)
    table = microscope.look((Step(1, units), Step(2, (unit(1, ["cem"], [[2.0]], [1]),))), BASE)
    assert table.warm.tolist() == [False] * 8 + [True] and np.isnan(table.bias[0]).all() and table.bias[1, 1] == pytest.approx((2 - 14 / 8) / math.sqrt(25.5 / 8), abs=1e-4)


def test_placebo_permutes_users_and_keeps_how_many_there_are():
    prompts = [Prompt(f"p{i}", "?", i % 3, {}, user_id=f"user {i}") for i in range(30)]
    rows = microscope.placebo_rows(prompts, 1)
    assert sorted(rows.values()) == sorted(p.preference_id for p in prompts) and rows == microscope.placebo_rows(reversed(prompts), 1)
    assert rows != {p.user_id: p.preference_id for p in prompts} and rows != microscope.placebo_rows(prompts, 2)
    assert microscope.user_of(Prompt("p", "?", 0, {"user": "295"})) == "295" and microscope.user_of(Prompt("p", "?", 0, {})) == "p"


def test_nothing_recorded_is_refused():
    with pytest.raises(ValueError, match="0 completions are recorded"):
        microscope.look((Step(1, (unit(0, ["ann"], [[]], [0]),)),), BASE)


def write(path, units):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pack_rollouts(units))


def test_steps_are_read_in_order_from_directories_and_files(tmp_path):
    for number in (10, 2, 3):
        write(tmp_path / "run" / "rollouts" / f"step_{number:06d}.npz", [unit(number, ["ann"], [[1.0]], [0], step=7)])
    assert [step.number for step in microscope.read_steps([tmp_path / "run"])] == [2, 3, 10]
    write(tmp_path / "loose.npz", [unit(0, ["ann"], [[1.0]], [0], step=4), unit(1, ["ann"], [[1.0]], [0], step=3)])
    both = microscope.read_steps([tmp_path / "loose.npz", tmp_path / "run" / "rollouts" / "step_000003.npz"])
    assert [(step.number, len(step.units)) for step in both] == [(3, 1), (5, 2)]
    with pytest.raises(ValueError, match="are both of step 3: give the rollouts of one run"):
        write(tmp_path / "third.npz", [unit(0, ["ann"], [[1.0]], [0], step=2)])
        microscope.read_steps([tmp_path / "run", tmp_path / "third.npz"])
    for wrong in ("nowhere", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(FileNotFoundError, match=wrong):
            microscope.read_steps([tmp_path / wrong])


@pytest.mark.parametrize(
    "numbers, said", [([1, 2, 3], None), ([], None), ([2], "steps 1 are not"), ([1, 4, 6, 7, 9], "steps 2 to 3, 5, 8 are not")]
)
def test_gaps_are_said(numbers, said):
    found = microscope.gaps([Step(number, ()) for number in numbers])
    assert found == [] if said is None else found[0].startswith(said)


def test_equal_records_give_equal_tables(steps, table):
    again = microscope.look(steps, BASE, own=Own(dataclasses.replace(BASE, baseline="batch"), Curation(4)), num_preference_groups=K)
    for name, values in table.advantages.items():
        np.testing.assert_array_equal(again.advantages[name], values)
