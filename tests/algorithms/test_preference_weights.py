"""Multipliers of the preference groups against their formulas, row by row."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgrpo_jax.algorithms import preference_weights
from pgrpo_jax.algorithms.preference_weights import KINDS, PreferenceWeights

EXAMPLES = settings(max_examples=50, deadline=None, derandomize=True)
weights = jax.jit(preference_weights.weights, static_argnums=0)


def loops(kind: str, temperature: float, means: list[float], counts: list[int]) -> list[float]:
    """For each completion its weight as the formula says, then over their mean; 1 for who is absent."""
    lowest = min((m for m, n in zip(means, counts) if n), default=0.0)
    raw = {"none": lambda k: 1.0, "balanced": lambda k: 1.0 / counts[k], "dro": lambda k: math.exp((lowest - means[k]) / temperature)}[kind]
    completions = [raw(k) for k, n in enumerate(counts) for _ in range(n)]
    return [raw(k) * len(completions) / math.fsum(completions) if n else 1.0 for k, n in enumerate(counts)]


ROWS = st.lists(st.tuples(st.floats(-10, 10), st.integers(0, 20)), min_size=4, max_size=4)


@pytest.mark.parametrize("kind", KINDS)
@EXAMPLES
@given(rows=ROWS, temperature=st.sampled_from([0.1, 1.0, 50.0]))
def test_equals_the_loops(kind, rows, temperature):
    means, counts = (list(column) for column in zip(*rows))
    with jax.enable_x64(True):
        found = np.asarray(weights(PreferenceWeights(kind, temperature), np.array(means), np.array(counts, np.int32)))
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, loops(kind, temperature, means, counts), rtol=1e-10, atol=1e-300)
    total = sum(counts)
    assert total == 0 or math.isclose(float(found @ np.array(counts)) / total, 1.0, rel_tol=1e-10)


def test_by_hand():
    """12 completions of one preference group, 4 of another, none of the third."""
    means, counts = np.float32([0.8, 0.2, 0.5]), np.int32([12, 4, 0])
    np.testing.assert_array_equal(weights(PreferenceWeights(), means, counts), [1, 1, 1])
    np.testing.assert_allclose(weights(PreferenceWeights("balanced"), means, counts), [2 / 3, 2, 1], rtol=1e-6)
    found = weights(PreferenceWeights("dro", 0.3), means, counts)  # the needier one weighs e^2 as much
    np.testing.assert_allclose(found, [16 / (12 + 4 * math.e**2), 16 * math.e**2 / (12 + 4 * math.e**2), 1], rtol=1e-5)


def test_who_has_no_past_weighs_one_under_dro():
    """Nobody knows yet whether it is in need; the others' weights are what they are without it."""
    found = weights(PreferenceWeights("dro", 0.3), np.float32([0.8, np.nan, 0.2, 0.5]), np.int32([12, 40, 4, 0]))
    np.testing.assert_allclose(found, [16 / (12 + 4 * math.e**2), 1, 16 * math.e**2 / (12 + 4 * math.e**2), 1], rtol=1e-5)
    np.testing.assert_array_equal(weights(PreferenceWeights("dro", 0.3), np.float32([np.nan, np.nan]), np.int32([3, 1])), [1, 1])
    np.testing.assert_allclose(weights(PreferenceWeights("balanced"), np.float32([np.nan, 1]), np.int32([12, 4])), [2 / 3, 2], rtol=1e-6)


def test_a_temperature_far_above_the_differences_weighs_all_alike():
    np.testing.assert_allclose(weights(PreferenceWeights("dro", 1e6), np.float32([0.9, 0.1]), np.int32([3, 9])), [1, 1], rtol=1e-5)


@pytest.mark.parametrize("means", [[1e30, -1e30], [0.0, 1e6], [-3e38, 3e38]])
def test_huge_differences_give_all_weight_to_the_lowest(means):
    found = np.asarray(weights(PreferenceWeights("dro", 1.0), np.float32(means), np.int32([3, 1])))
    lowest = int(np.argmin(means))
    expected = [0.0, 0.0]
    expected[lowest] = 4 / [3, 1][lowest]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_an_absent_preference_group_moves_nothing_whatever_its_history(kind):
    counts = np.int32([5, 3, 0])
    found = [weights(PreferenceWeights(kind), np.float32([0.4, 0.6, absent]), counts) for absent in (-1e9, 0.0, 1e9)]
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])
    np.testing.assert_array_equal(weights(PreferenceWeights(kind), np.float32([0.4, 0.6, 0.1]), np.int32([0, 0, 0])), np.ones(3))


def test_an_unknown_kind_is_refused():
    message = "preference weights are 'fair', must be one of none, dro, balanced: set algorithm.preference_weights"
    with pytest.raises(ValueError, match=message):
        preference_weights.weights(PreferenceWeights("fair"), np.ones(2, np.float32), np.ones(2, np.int32))
