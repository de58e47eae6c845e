"""What is measured on a table, against counting by hand and plain loops."""

import dataclasses
import json
import math

import microscope_tables
import numpy as np
import pytest

from pgrpo_jax.microscope_measures import by_preference, check, correlation, dead, flips, measure, suppressed


@pytest.fixture
def two_sided():
    """Preference group 0: alive; 1: dead under GRPO, alive under P-GRPO; a cold prompt of 0; a prompt without completions."""
    return microscope_tables.table(
        [
            (0, [0.0, 1.0], [-1.0, 1.0], [-0.5, 0.5]),
            (1, [0.4, 0.4], [0.0, 0.0], [0.75, 0.75]),
            (0, [0.2, 0.2], [0.0, 0.0], [0.3, 0.3]),
            (1, [], [], []),
            (1, [0.0, 1.0], [-2.0, 2.0], [0.25, 0.25]),
        ],
        cold=[2],
    )


def samples_of(table, scheme="own"):
    values = table.advantages[scheme]
    return [
        {"step": int(s), "prompt_id": table.prompts[p].prompt_id, "advantage": float(a)} for s, p, a in zip(table.step, table.prompt, values)
    ]


def with_own(table):
    return dataclasses.replace(table, advantages={**table.advantages, "own": table.advantages["p_grpo"]})


def test_recorded_advantages_are_checked(two_sided):
    table = with_own(two_sided)
    samples = samples_of(table)
    assert check(table, samples) == {"agrees": True, "compared": 8, "largest_difference": 0.0, "reason": ""}
    samples[3]["advantage"] += 1e-6
    assert check(table, samples)["agrees"]
    samples[3]["advantage"] += 2e-6
    found = check(table, samples)
    assert not found["agrees"] and found["reason"] == "first at step 2" and found["largest_difference"] == pytest.approx(3e-6 / 1.75, rel=1e-2)
    samples[3]["advantage"] = None  # was not finite
    assert check(table, samples)["agrees"] is False
    later = [{"step": 9, "prompt_id": "prompt 9", "advantage": 0.0}]  # of a step that is not looked at
    assert check(table, samples_of(table) + later)["agrees"]


@pytest.mark.parametrize("case", ["no configuration", "no samples", "too few", "another prompt"])
def test_what_can_not_be_checked_is_not(case, two_sided):
    table = two_sided if case == "no configuration" else with_own(two_sided)
    samples = None if case == "no samples" else samples_of(two_sided, "p_grpo")
    if case == "too few":
        samples = samples[:-1]
    if case == "another prompt":
        samples[0]["prompt_id"] = "another"
    found = check(table, samples)
    assert found["agrees"] is None and found["compared"] == 0 and found["reason"]


def test_flips_are_found_strongest_first(two_sided):
    found = flips(two_sided, top=1)
    assert (found["count"], found["share"], found["up"]) == (1, 1 / 8, 1)  # an advantage of 0 has no sign to flip
    assert found["strongest"][0]["prompt_id"] == "prompt 4" and found["strongest"][0]["grpo"] == -2.0 and found["strongest"][0]["p_grpo"] == 0.25
    many = microscope_tables.table([(0, [0.0] * 4, [1.0, -3.0, 2.0, 1.0], [-2.0, 0.5, -1.5, 1.0])])
    found = flips(many, top=2)
    assert [record["row"] for record in found["strongest"]] == [2, 0] and (found["count"], found["up"]) == (3, 1)
    assert flips(many, top=0)["strongest"] == []


def test_dead_prompts_are_counted_and_those_that_come_to_life(two_sided):
    assert dead(two_sided) == {"prompts": 4, "dead": 2, "share": 0.5, "warm": 1, "revived": 1}
    faint = microscope_tables.table([(0, [0.4, 0.4], [0.0, 0.0], [5e-4, 5e-4])])
    assert dead(faint) == {"prompts": 1, "dead": 1, "share": 1.0, "warm": 1, "revived": 0}


def test_shares_of_the_signal_are_over_warm_completions(two_sided):
    zero, one = by_preference(two_sided)
    assert (zero["completions"], zero["warm"], zero["share"]) == (4, 2, 2 / 6) and (one["completions"], one["warm"]) == (4, 4)
    assert zero["signal_share"] == pytest.approx({"grpo": 2 / 6, "p_grpo": 1 / 3}) and one["signal_share"]["grpo"] == pytest.approx(4 / 6)
    assert zero["mean_abs"] == pytest.approx({"grpo": 1.0, "p_grpo": 0.5}) and one["mean_abs"]["grpo"] == pytest.approx(1.0)
    assert zero["amplification"]["grpo"] == pytest.approx(1.0) and one["suppression"]["grpo"]["mean"] == pytest.approx((4 / 6) / (2 / 3))
    assert zero["scale"] == pytest.approx(0.5) and zero["bias"] == pytest.approx(-0.5)


def test_the_interval_is_a_bootstrap_over_prompts():
    random = np.random.default_rng(3)
    prompts = [(int(k), [0.0, 1.0], random.normal(size=2), random.normal(size=2)) for k in random.integers(0, 2, 60)]
    found = by_preference(microscope_tables.table(prompts))[1]["suppression"]["grpo"]
    values = []
    for _ in range(4000):
        drawn = [prompts[i] for i in random.integers(0, 60, 60)]
        shares = [sum(abs(p[s]).sum() for p in drawn if p[0] == 1) / sum(abs(p[s]).sum() for p in drawn) for s in (2, 3)]
        values.append(shares[0] / shares[1])
    low, high = np.percentile(values, [2.5, 97.5])
    assert found["low"] < found["mean"] < found["high"]
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=0.05 * (high - low))
    same = by_preference(microscope_tables.table(prompts))[1]["suppression"]
    assert same["grpo"] == found and same["p_grpo"] == {"mean": 1.0, "low": 1.0, "high": 1.0}


def test_a_preference_group_that_is_held_down_is_named():
    prompts = [(0, [0.0, 1.0], [-1.0, 1.0], [-1.0, 1.0])] * 30 + [(1, [0.0, 1.0], [-0.1, 0.1], [-1.0, 1.0])] * 30
    records = by_preference(microscope_tables.table(prompts, num_preference_groups=3))
    assert suppressed(records) == [1] and records[1]["suppression"]["grpo"]["mean"] == pytest.approx((3 / 33) / 0.5)
    wide = {"preference_id": 4, "suppression": {"grpo": {"mean": 0.8, "low": 0.5, "high": 1.2}}}
    assert suppressed([wide]) == []
    absent = records[2]
    assert absent["completions"] == 0 and math.isnan(absent["suppression"]["grpo"]["mean"]) and math.isnan(absent["suppression"]["grpo"]["low"])
    assert math.isnan(absent["mean_abs"]["grpo"]) and math.isnan(absent["scale"])


def test_the_correlation_is_pearsons(two_sided):
    table = dataclasses.replace(two_sided, advantages={**two_sided.advantages, "flat": np.full(8, 0.1)})
    found = correlation(table)
    values = np.array(found["values"])
    a, b = two_sided.advantages["grpo"][two_sided.warm], two_sided.advantages["p_grpo"][two_sided.warm]
    assert found["schemes"] == ["grpo", "p_grpo", "flat"]
    assert values[0, 1] == pytest.approx(np.corrcoef(a, b)[0, 1]) and values[0, 0] == pytest.approx(1.0)
    assert np.isnan(values[2]).all() and np.isnan(values[:, 2]).all()


@pytest.mark.parametrize("case", ["all cold", "one completion", "no signal"])
def test_degenerate_records_are_measured(case):
    table = {
        "all cold": microscope_tables.table([(0, [0.0, 1.0], [-1.0, 1.0], [-1.0, 1.0])] * 3, cold=[0, 1, 2]),
        "one completion": microscope_tables.table([(0, [0.5], [0.0], [0.0])]),
        "no signal": microscope_tables.table([(0, [0.5, 0.5], [0.0, 0.0], [0.0, 0.0]), (1, [0.5], [0.0], [0.0])]),
    }[case]
    found = measure(table)
    assert suppressed(found["preference_groups"]) == [] and json.dumps(found)
    assert found["warm_share"] == (0.0 if case == "all cold" else 1.0)
    assert all(math.isnan(record["suppression"]["grpo"]["mean"]) for record in found["preference_groups"])


def test_all_is_measured_at_once(two_sided):
    found = measure(with_own(two_sided), samples_of(with_own(two_sided)), top=3)
    assert found["check"]["agrees"] and found["completions"] == 8 and found["prompts"] == 5 and found["steps"] == [1, 2, 3, 4, 5]
