"""Clipping case by case, ties included, ratios of whole completions, and importance weights, against numbers written out."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgrpo_jax.algorithms import policy_terms
from pgrpo_jax.algorithms.policy_terms import IMPORTANCE, POLICY_TERMS, clipped_surrogate, log_ratio, sequence_log_ratio

COUNTED = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0]], bool)
CURRENT = np.log(np.array([[0.5, 0.25, 0.5], [0.75, 1, 1], [1, 1, 1]]))
OLD = np.log(np.array([[0.25, 0.5, 0.25], [0.25, 1, 1], [1, 1, 1]]))  # ratios 2, 1/2, 2 and 3
BOUNDS = {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": 0.0}


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize(
    "advantage, ratio, dual, value, slope",  # slope: M·r·A, the gradient by the log-prob
    [
        (2.0, 1.0, 0.0, 2.0, 2.0), (2.0, 1.29, 0.0, 2.58, 2.58), (2.0, 1.31, 0.0, 2.6, 0.0), (2.0, 0.1, 0.0, 0.2, 0.2),
        (-2.0, 1.0, 0.0, -2.0, -2.0), (-2.0, 0.81, 0.0, -1.62, -1.62), (-2.0, 0.79, 0.0, -1.6, 0.0), (-2.0, 5.0, 0.0, -10.0, -10.0),
        (-2.0, 5.0, 3.0, -6.0, 0.0), (-2.0, 2.9, 3.0, -5.8, -5.8), (2.0, 5.0, 3.0, 2.6, 0.0), (-2.0, 0.5, 3.0, -1.6, 0.0),
        (0.0, 9.0, 3.0, 0.0, 0.0),
    ],
)  # fmt: skip
def test_surrogate_case_by_case(advantage, ratio, dual, value, slope):
    def gain(x):
        values, clipped = clipped_surrogate(x, np.array([advantage]), **(BOUNDS | {"dual_clip": dual}))
        return values[0, 0], clipped[0, 0]

    (found, clipped), gradient = jax.value_and_grad(gain, has_aux=True)(np.log([[ratio]]))
    np.testing.assert_allclose([found, gradient[0, 0]], [value, slope], rtol=1e-12, atol=1e-12)
    assert clipped == (advantage != 0 and slope == 0)


@pytest.mark.parametrize("advantage, bounds", [(1.0, {"clip_high": 0.5}), (-1.0, {"clip_low": 0.5}), (-1.0, {"dual_clip": 1.5})])
def test_on_the_bound_the_gradient_is_whole(advantage, bounds):
    """`minimum` would halve it: the two branches tie. e^x is exact at none of 0.5 and 1.5, so the bound is set to what it gives."""
    edge = {"clip_high": 1.5, "clip_low": 0.5, "dual_clip": 1.5}[next(iter(bounds))]
    x = jnp.log(jnp.full((1, 1), edge))
    ratio = float(jnp.exp(x)[0, 0])
    exact = {"clip_high": ratio - 1, "clip_low": 1 - ratio, "dual_clip": ratio}
    chosen = {"clip_low": 0.9, "clip_high": 9.0, "dual_clip": 0.0} | {key: exact[key] for key in bounds}
    gradient = jax.grad(lambda y: clipped_surrogate(y, np.array([advantage]), **chosen)[0][0, 0])(x)
    np.testing.assert_allclose(gradient[0, 0], advantage * ratio, rtol=1e-12)


def test_ratios_of_whole_completions():
    total = sequence_log_ratio(CURRENT, OLD, COUNTED, mean=False)
    mean = sequence_log_ratio(CURRENT, OLD, COUNTED, mean=True)
    np.testing.assert_allclose(np.exp(total), [[2.0] * 3, [3.0] * 3, [1.0] * 3], rtol=1e-12)
    np.testing.assert_allclose(np.exp(mean), [[2 ** (1 / 3)] * 3, [3.0] * 3, [1.0] * 3], rtol=1e-12)


def test_what_does_not_count_may_be_anything():
    dirty = np.where(COUNTED, CURRENT, np.nan)
    for mean in (True, False):
        found, clean = [sequence_log_ratio(x, OLD, COUNTED, mean=mean) for x in (dirty, CURRENT)]
        np.testing.assert_array_equal(found, clean)
        gradient = jax.grad(lambda x: jnp.sum(sequence_log_ratio(x, OLD, COUNTED, mean=mean)))(dirty)
        assert np.isfinite(gradient).all()


def test_log_ratios_are_held_and_have_no_gradient_beyond():
    far = np.array([-50.0, -19.0, 0.0, 19.0, 50.0])
    held, gradient = jax.value_and_grad(lambda x: jnp.sum(log_ratio(x, jnp.zeros(5))))(far)
    np.testing.assert_array_equal(log_ratio(far, jnp.zeros(5)), [-20, -19, 0, 19, 20])
    np.testing.assert_array_equal(gradient, [0, 1, 1, 1, 0])
    assert held == 0
    sums = sequence_log_ratio(np.full((1, 3), 9.0), np.zeros((1, 3)), np.ones((1, 3), bool), mean=False)
    np.testing.assert_array_equal(sums, [[policy_terms.MAX_LOG_RATIO] * 3])


def slopes(name, advantages, bounds=BOUNDS):
    """(sum of the term over what counts, its gradient, clipped)."""

    def total(x):
        values, clipped = POLICY_TERMS[name](x, OLD, advantages, COUNTED, bounds)
        return jnp.sum(jnp.where(COUNTED, values, 0)), clipped

    (value, clipped), gradient = jax.value_and_grad(total, has_aux=True)(CURRENT)
    return float(value), np.asarray(gradient), np.asarray(clipped)


def test_terms_written_out():
    advantages = np.array([1.0, -1.0, 5.0])
    value, gradient, clipped = slopes("ratio", advantages)
    np.testing.assert_allclose(value, 1.3 + 0.5 + 1.3 - 3)
    np.testing.assert_allclose(gradient, [[0, 0.5, 0], [-3, 0, 0], [0, 0, 0]], atol=1e-12)
    np.testing.assert_array_equal(clipped & COUNTED, [[1, 0, 1], [0, 0, 0], [0, 0, 0]])

    mean = 2 ** (1 / 3)  # 1.26, within the bounds; its gradient by each of the three log-probs is a third, and three tokens carry it
    value, gradient, clipped = slopes("sequence_ratio", advantages)
    np.testing.assert_allclose(value, 3 * mean - 3)
    np.testing.assert_allclose(gradient, [[mean] * 3, [-3, 0, 0], [0, 0, 0]], atol=1e-12)
    assert not (clipped & COUNTED).any()
    _, gradient, clipped = slopes("sequence_ratio", advantages, BOUNDS | {"clip_high": 0.25})
    assert clipped[0].all() and not gradient[0].any()  # the completion is clipped as one

    value, gradient, clipped = slopes("log_prob", advantages)
    np.testing.assert_allclose(value, math.log(0.5 * 0.25 * 0.5) - math.log(0.75))
    np.testing.assert_allclose(gradient, [[1, 1, 1], [-1, 0, 0], [0, 0, 0]])
    assert not clipped.any()


@pytest.mark.parametrize("name", POLICY_TERMS)
def test_advantages_carry_no_gradient(name):
    gradient = jax.grad(lambda a: jnp.sum(POLICY_TERMS[name](CURRENT, OLD, a, COUNTED, BOUNDS)[0]))(np.array([1.0, -1.0, 0.5]))
    np.testing.assert_array_equal(gradient, np.zeros(3))


@pytest.mark.parametrize(
    "name, low, first, second, bounded",
    [
        ("none", 0.2, [1, 1, 1], 1, [0, 0, 0, 0]), ("ratio", 0.2, [2, 0.5, 2], 3, [0, 0, 0, 0]),
        ("sequence_ratio", 0.2, [2, 2, 2], 3, [0, 0, 0, 0]),
        ("clipped_ratio", 0.2, [1.3, 0.8, 1.3], 1.3, [1, 1, 1, 1]), ("clipped_ratio", 1.0, [1.3, 0.5, 1.3], 1.3, [1, 0, 1, 1]),
    ],
)  # fmt: skip
def test_importance_weights_written_out(name, low, first, second, bounded):
    weights, out = IMPORTANCE[name](CURRENT, OLD, COUNTED, low, 0.3)
    np.testing.assert_allclose([*weights[0], weights[1, 0]], [*first, second], rtol=1e-12)
    np.testing.assert_array_equal([*out[0], out[1, 0]], np.array(bounded, bool))


def test_on_policy_every_weight_is_exactly_one():
    for choice in IMPORTANCE.values():
        weights, bounded = choice(CURRENT, CURRENT, COUNTED, 0.2, 0.3)
        assert (weights == 1).all() and not bounded.any()
    for name in ("ratio", "sequence_ratio"):
        values, clipped = POLICY_TERMS[name](CURRENT, CURRENT, np.ones(3), COUNTED, BOUNDS)
        assert (values == 1).all() and not clipped.any()
