"""Measures, intervals and the recommendation against numbers done by hand."""

import math

import numpy as np
import pytest

from pgrpo_jax.laboratory import comparison

REGIMES = ("first", "second")


def flat(worst, mean):
    """Measures of one arm: [2 regimes, 4 seeds], only what the verdict reads."""
    return {"worst_final": np.asarray(worst, float), "mean_final": np.asarray(mean, float)}


def test_interval_by_hand():
    found = comparison.interval(np.asarray([1.0, 2.0, 3.0, 6.0]))
    half = 1.959964 * math.sqrt((4 + 1 + 0 + 9) / 3) / 2
    assert found == comparison.Interval(mean=3.0, low=pytest.approx(3 - half), high=pytest.approx(3 + half))


def test_one_value_has_no_interval():
    found = comparison.interval(np.asarray([1.0]))
    assert found.mean == 1 and math.isnan(found.low) and math.isnan(found.high)


def test_measures_row_by_row():
    generator = np.random.default_rng(0)
    curve, shares = generator.normal(size=(2, 3, 5, 3)), np.asarray([[0.2, 0.5, 0.3], [0.5, 0.4, 0.1]])
    found = comparison.measures(curve, shares, early_step=2)
    assert tuple(found) == comparison.MEASURES
    for e in range(2):
        for m in range(3):
            for when, step in (("early", 1), ("final", 4)):
                rewards = list(curve[e, m, step])
                assert found[f"smallest_{when}"][e, m] == rewards[0 if e == 0 else 2]
                assert found[f"worst_{when}"][e, m] == min(rewards)
                assert found[f"mean_{when}"][e, m] == pytest.approx(sum(s * r for s, r in zip(shares[e], rewards)))


def test_pairing_takes_out_what_seeds_share():
    seeds = np.random.default_rng(1).normal(size=50)
    found = comparison.paired(seeds + 0.1, seeds)
    assert found.mean == pytest.approx(0.1) and found.high - found.low < 1e-12
    two = comparison.paired(np.asarray([[1.0, 2.0], [3.0, 6.0]]), np.zeros((2, 2)))
    assert two == comparison.interval(np.asarray([2.0, 4.0]))


def test_verdict_counts_regimes_and_holds_the_mean():
    base = flat(np.zeros((2, 4)), np.zeros((2, 4)))
    wiggle = np.asarray([0.001, -0.001, 0.001, -0.001])
    lifted = flat([0.1 + wiggle, -0.02 + wiggle], [wiggle, wiggle])
    found = comparison.verdict(lifted, base, REGIMES, tolerance=0.01)
    assert (found.better, found.worse, found.lifts) == (("first",), ("second",), True)
    assert found.worst.mean == pytest.approx(0.04)
    dear = comparison.verdict(flat([0.1 + wiggle, 0.1 + wiggle], [wiggle - 0.02, wiggle - 0.02]), base, REGIMES, tolerance=0.01)
    assert dear.better == REGIMES and not dear.lifts
    unsure = flat([0.1 + wiggle] * 2, [20 * wiggle - 0.005] * 2)  # the mean is within, the end of its interval is not
    assert not comparison.verdict(unsure, base, REGIMES, tolerance=0.01).lifts
    assert comparison.verdict(flat([0.1 + wiggle] * 2, [wiggle - 0.02] * 2), base, REGIMES, tolerance=0.03).lifts


def test_recommends_what_lifts_most_against_every_baseline_or_nothing():
    def against(lift, lifts=True):
        return comparison.Verdict(
            worst=comparison.Interval(lift, lift, lift), mean=comparison.Interval(0.0, 0.0, 0.0), better=(), worse=(), lifts=lifts
        )

    verdicts = {
        "one sided": {"grpo": against(0.5), "p_grpo": against(0.4, lifts=False)},
        "little": {"grpo": against(0.02), "p_grpo": against(0.3)},
        "more": {"grpo": against(0.1), "p_grpo": against(0.03)},
    }
    assert comparison.recommended(verdicts) == "more"
    assert comparison.recommended({"one sided": verdicts["one sided"]}) is None
    assert comparison.recommended({}) is None


def test_score_is_half_worst_half_mean():
    assert comparison.score(flat([[0.2, 0.4], [0.0, 0.2]], [[0.6, 0.6], [0.8, 1.0]])) == pytest.approx(0.5 * 0.2 + 0.5 * 0.75)
