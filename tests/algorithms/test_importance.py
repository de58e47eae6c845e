"""The mismatch kit against loops over tokens in plain Python."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgrpo_jax.algorithms import importance
from pgrpo_jax.algorithms.importance import Correction

LEVELS, BOUNDS = ("none", "token", "sequence", "geometric"), ("truncate", "mask")


def total(weights, counted, correction):
    """Sums over the tokens that count, as the objective makes them."""
    terms = importance.correction_terms(weights, correction)
    return {name: jnp.sum(jnp.where(counted, x, 0)) for name, x in terms.items()}


def tokens(seed: int, dtype=np.float64, shape=(6, 5)):
    """Log-probs of two policies apart by about half a nat a token; row 2 is empty, padding holds anything."""
    rng = np.random.default_rng([seed, *shape])
    old = -rng.exponential(1.0, shape)
    behaviour = old + rng.normal(0, 0.5, shape)
    counted = np.arange(shape[1])[None, :] < np.array([5, 1, 0, 3, 2, 4])[:, None]
    for values in (old, behaviour):
        values[~counted] = rng.choice([np.nan, np.inf, -np.inf, 1e4], (~counted).sum())
    return old.astype(dtype), behaviour.astype(dtype), counted


def loops(correction, old, behaviour, counted):
    """Weights and which of them are bounded, completion by completion, token by token."""
    weights, bounded = np.ones(old.shape), np.zeros(old.shape, bool)
    for i, row in enumerate(counted):
        places = np.flatnonzero(row)
        ratios = [math.exp(float(old[i, t]) - float(behaviour[i, t])) for t in places]
        spans = {
            "none": [1.0] * len(ratios),
            "token": ratios,
            "sequence": [math.prod(ratios)] * len(ratios),
            "geometric": [math.prod(ratios) ** (1 / max(1, len(ratios)))] * len(ratios),
        }
        for t, w in zip(places, spans[correction.level]):
            if correction.bound == "truncate":
                weights[i, t], bounded[i, t] = min(w, correction.high), w > correction.high
            else:
                bounded[i, t] = not correction.low <= w <= correction.high
                weights[i, t] = 0.0 if bounded[i, t] else w
    return weights, bounded


@pytest.mark.parametrize("level, bound", list(itertools.product(LEVELS, BOUNDS)))
def test_weights_and_sums_equal_the_loops(level, bound):
    correction, seen = Correction(level, bound, 0.7, 1.4), 0
    for dtype, tolerance in ((np.float32, 1e-5), (np.float64, 1e-12)):
        with jax.enable_x64(dtype == np.float64):
            for seed in range(3):
                old, behaviour, counted = tokens(seed, dtype)
                expected, bounded = loops(correction, old, behaviour, counted)
                weights = jax.jit(importance.correction_weights, static_argnums=0)(correction, old, behaviour, counted)
                sums = total(weights, counted, correction)
                assert weights.dtype == dtype and all(value.dtype == dtype and value.shape == () for value in sums.values())
                np.testing.assert_allclose(weights, expected, rtol=tolerance)
                np.testing.assert_allclose(sums["correction"], expected[counted].sum(), rtol=tolerance)
                np.testing.assert_allclose(sums["correction_squared"], (expected[counted] ** 2).sum(), rtol=tolerance)
                assert int(sums["correction_bounded"]) == bounded.sum()
                seen += bounded.sum()
    assert (seen > 0) == (level != "none")


def test_a_completion_of_one_token_is_the_same_at_every_level():
    old, behaviour, counted = tokens(1, shape=(6, 5))
    counted &= np.arange(5) < 1
    results = [importance.correction_weights(Correction(level, high=math.inf), old, behaviour, counted) for level in LEVELS[1:]]
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], rtol=1e-6)


def test_equal_policies_have_weight_one():
    old, _, counted = tokens(2, np.float32)
    for level, bound in itertools.product(LEVELS, BOUNDS):
        correction = Correction(level, bound, 1.0, 1.0)
        weights = importance.correction_weights(correction, old, old, counted)
        np.testing.assert_array_equal(weights, np.ones_like(old))


@pytest.mark.parametrize("level", LEVELS[1:])
def test_extreme_ratios_stay_finite(level):
    old, behaviour = np.float32([[0, 0, -400], [-400, -90, 0]]), np.float32([[-400, -90, 0], [0, 0, -400]])
    counted = np.ones((2, 3), bool)
    weights = importance.correction_weights(Correction(level, high=math.inf), old, behaviour, counted)
    sums = total(weights, counted, Correction(level, high=math.inf))
    assert np.isfinite(weights).all() and all(np.isfinite(value) for value in sums.values())
    largest = {"token": 20.0, "sequence": 20.0, "geometric": 20.0}[level]
    np.testing.assert_allclose(np.max(weights), math.exp(largest), rtol=1e-5)


def test_weights_carry_no_gradient():
    old, behaviour, counted = tokens(0, np.float32)
    for level, bound in itertools.product(LEVELS, BOUNDS):
        total = lambda x, y: jnp.sum(importance.correction_weights(Correction(level, bound), x, y, counted))  # noqa: B023, E731
        for gradient in jax.grad(total, argnums=(0, 1))(old, behaviour):
            np.testing.assert_array_equal(gradient, np.zeros_like(old))


def test_without_correction_the_sampler_is_not_read():
    old, _, counted = tokens(0, np.float32)
    np.testing.assert_array_equal(importance.correction_weights(Correction(), old, np.full_like(old, np.nan), counted), np.ones_like(old))


def test_sums_of_parts_add_up():
    old, behaviour, counted = tokens(3)
    correction = Correction("sequence", "mask")
    whole, *parts = [
        total(importance.correction_weights(correction, old[s], behaviour[s], counted[s]), counted[s], correction)
        for s in (slice(0, 6), slice(0, 2), slice(2, 6))
    ]
    for name, value in whole.items():
        np.testing.assert_allclose(parts[0][name] + parts[1][name], value, rtol=1e-5)


@pytest.mark.parametrize("arguments, message", [
    ({"level": "word"}, "correction level is 'word', must be one of none, token, sequence, geometric"),
    ({"bound": "clip"}, "correction bound is 'clip', must be one of truncate, mask"),
    ({"low": 1.5}, r"correction low is 1.5, must be in \[0, 1\]"),
    ({"low": math.nan}, "correction low is nan"),
    ({"high": 0.9}, "correction high is 0.9, must be at least 1"),
    ({"high": math.nan}, "correction high is nan"),
])
def test_wrong_settings_are_one_line(arguments, message):
    with pytest.raises(ValueError, match=message):
        Correction(**arguments)


@pytest.mark.parametrize("weights, expected", [([1, 1, 1, 1], 1.0), ([2, 2, 2, 2], 1.0), ([3, 0, 0, 0], 0.25), ([1, 3], 0.8), ([0, 0], 0), ([], 0)])
def test_effective_sample_size(weights, expected):
    w, n = np.float32(weights), np.float32(len(weights))
    np.testing.assert_allclose(importance.effective_sample_size(w.sum(), (w**2).sum(), n), expected, rtol=1e-6)
    if n:
        np.testing.assert_allclose(importance.effective_sample_size(w.mean(), (w**2).mean(), 1), expected, rtol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 19, 20, 21, 40, 100, 101])
def test_gap_statistics_equal_numpy(count):
    rng = np.random.default_rng(count)
    gaps, counted = rng.normal(0, 2, 120).astype(np.float32), np.zeros(120, bool)
    counted[rng.permutation(120)[:count]] = True
    sizes = np.abs(gaps[counted])
    gaps[~counted] = rng.choice(np.float32([np.nan, np.inf, -np.inf, 1e9]), 120 - count)
    found = jax.jit(importance.gap_statistics)(gaps.reshape(2, 6, 10), counted.reshape(2, 6, 10))
    np.testing.assert_allclose(found["mean"], sizes.mean(), rtol=1e-5)
    assert found["max"] == sizes.max() and found["p95"] == sorted(sizes)[-(-95 * count // 100) - 1]
    assert all(value.dtype == np.float32 for value in found.values())


def test_no_gap_at_all_is_zero():
    found = importance.gap_statistics(np.full((2, 3), np.nan, np.float32), np.zeros((2, 3), bool))
    assert found == {"mean": 0, "p95": 0, "max": 0}
