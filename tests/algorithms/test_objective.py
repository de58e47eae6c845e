"""The objective against loops over tokens and finite differences."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgrpo_jax.algorithms import objective

EXAMPLES = settings(max_examples=50, deadline=None, derandomize=True)
CLIP = {"clip_low": 0.2, "clip_high": 0.3}


def tokens(seed: int, dtype=np.float64, shape=(5, 4)):
    """Log-probs whose ratios lie on both sides of both bounds; row 2 is empty, row 4 only pads the batch."""
    rng = np.random.default_rng([seed, *shape])
    old = -rng.exponential(1.0, shape)
    log_probs, reference = old + rng.normal(0, 0.8, shape), old + rng.normal(0, 0.5, shape)
    mask = np.arange(shape[1])[None, :] < np.array([4, 1, 0, 3, 2])[:, None]
    for values in (log_probs, old, reference):
        values[~mask] = rng.choice([np.nan, np.inf, -np.inf, 100.0], (~mask).sum())
    advantages = np.array([1.3, -0.7, 2.0, -1.1, np.nan])
    valid = np.array([True, True, True, True, False])
    return *(x.astype(dtype) for x in (log_probs, old, reference, advantages)), mask, valid


def loops(log_probs, old, reference, advantages, mask, valid, *, clip_low, clip_high, kl_coefficient):
    """Loss sum, count and metric sums by the formulas of GRPO's paper, token by token."""
    loss, sums = 0.0, dict.fromkeys(("token_count", "clipped", "ratio", "old_kl", "kl"), 0.0)
    for i in np.flatnonzero(valid):
        length = int(mask[i].sum())
        for t in np.flatnonzero(mask[i]):
            ratio, advantage = math.exp(log_probs[i, t] - old[i, t]), float(advantages[i])
            bounded = min(max(ratio, 1 - clip_low), 1 + clip_high)
            surrogate = min(ratio * advantage, bounded * advantage)
            d = reference[i, t] - log_probs[i, t]
            kl = math.exp(d) - d - 1
            loss -= (surrogate - kl_coefficient * kl) / length
            values = 1, surrogate != ratio * advantage, ratio, ratio - math.log(ratio) - 1, kl
            sums = {name: total + value for (name, total), value in zip(sums.items(), values)}
    return loss, int(valid.sum()), sums


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-5), (np.float64, 1e-12)])
@pytest.mark.parametrize("seed", range(3))
def test_policy_loss_equals_the_loops(seed, dtype, tolerance):
    options = {**CLIP, "kl_coefficient": 0.5}
    with jax.enable_x64(dtype == np.float64):
        arguments = tokens(seed, dtype)
        loss, count, sums = jax.jit(functools.partial(objective.policy_loss, **options))(*arguments)
        assert loss.dtype == dtype
    expected_loss, expected_count, expected_sums = loops(*arguments, **options)
    assert 0 < expected_sums["clipped"] < expected_sums["token_count"] == 8
    np.testing.assert_allclose(loss, expected_loss, rtol=tolerance)
    assert float(count) == expected_count == 4 and sums.keys() == expected_sums.keys()
    for name, value in sums.items():
        np.testing.assert_allclose(value, expected_sums[name], rtol=tolerance, err_msg=name)


@pytest.mark.parametrize("kl_coefficient", [0.0, 0.7])
@pytest.mark.parametrize("seed", range(3))
def test_gradient_equals_finite_differences(seed, kl_coefficient):
    with jax.enable_x64(True):
        log_probs, *rest = tokens(seed)
        loss = jax.jit(lambda x: objective.policy_loss(x, *rest, **CLIP, kl_coefficient=kl_coefficient)[0])
        gradient = np.asarray(jax.jit(jax.grad(loss))(jnp.asarray(log_probs)))
        numeric = np.zeros_like(gradient)
        for index in zip(*np.nonzero(rest[-2] & rest[-1][:, None])):
            up, down = log_probs.copy(), log_probs.copy()
            up[index] += 1e-6
            down[index] -= 1e-6
            numeric[index] = (loss(up) - loss(down)) / 2e-6
    assert np.count_nonzero(numeric) >= 3
    np.testing.assert_allclose(gradient, numeric, rtol=1e-7, atol=1e-8)


def test_gradient_is_mask_times_ratio_times_advantage():
    """RLAX's table: M = 0 where A > 0 and r > 1 + high or A < 0 and r < 1 − low, else 1; at the bounds themselves too."""
    ratios = np.array([0.5, 0.75, 0.9, 1.0, 1.2, 1.25, 2.0])  # 0.75 and 1.25 are the bounds, exact in binary
    for advantage, kept in ((2.0, [1, 1, 1, 1, 1, 1, 0]), (-2.0, [0, 1, 1, 1, 1, 1, 1]), (0.0, [1] * 7)):
        with jax.enable_x64(True):

            def total(log_probs):
                old = jnp.zeros_like(log_probs)
                values, clipped = objective.clipped_surrogate(log_probs, old, jnp.array([advantage]), clip_low=0.25, clip_high=0.25)
                return jnp.sum(values), (values, clipped)

            log_probs = jnp.log(ratios)[None]
            r = np.exp(np.asarray(log_probs[0]))
            kept = np.where(np.isclose(ratios, 1.25) & (advantage > 0), r <= 1.25, kept)  # exp(log 1.25) may round above
            kept = np.where(np.isclose(ratios, 0.75) & (advantage < 0), r >= 0.75, kept)
            gradient, (values, clipped) = jax.grad(total, has_aux=True)(log_probs)
        np.testing.assert_allclose(gradient[0], kept * r * advantage, rtol=1e-12)
        np.testing.assert_array_equal(clipped[0], ~kept.astype(bool))
        np.testing.assert_allclose(values[0], np.minimum(r * advantage, np.clip(r, 0.75, 1.25) * advantage), rtol=1e-12)


def test_on_policy_the_ratio_is_exactly_one():
    log_probs = jnp.array([[-0.3, -1e-8, -37.123]])

    def total(x):
        values, clipped = objective.clipped_surrogate(x, jax.lax.stop_gradient(x), jnp.array([-3.0]), clip_low=1e-9, clip_high=1e-9)
        return jnp.sum(values), (values, clipped)

    gradient, (values, clipped) = jax.grad(total, has_aux=True)(log_probs)
    np.testing.assert_array_equal(values, [[-3.0] * 3])
    np.testing.assert_array_equal(gradient, [[-3.0] * 3])
    assert not clipped.any()


def test_only_the_trained_log_probs_carry_gradient():
    log_probs, old, reference, advantages, mask, valid = tokens(0, np.float32)
    loss = lambda *x: objective.policy_loss(*x, mask, valid, **CLIP, kl_coefficient=0.5)[0]  # noqa: E731
    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(log_probs, old, reference, advantages)
    assert np.isfinite(gradients[0]).all() and np.any(gradients[0] != 0)
    assert np.all(gradients[0][~(mask & valid[:, None])] == 0)
    for gradient in gradients[1:]:
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


k3_and_gradient = jax.jit(jax.value_and_grad(lambda x, reference: jnp.sum(objective.k3(x, reference))))


@EXAMPLES
@given(difference=st.floats(-1e4, 1e4, width=32), log_prob=st.floats(-100, 0, width=32))
def test_k3_is_finite_and_never_negative(difference, log_prob):
    log_probs, reference = np.float32([[log_prob]]), np.float32([[log_prob + difference]])
    value, gradient = k3_and_gradient(log_probs, reference)
    assert value >= 0 and np.isfinite(value) and np.isfinite(gradient).all()


def test_k3_loses_no_sign_to_rounding():
    """Written as exp(d) − d − 1, a quarter of these would be negative in float32."""
    small = np.logspace(-8, 0, 20001, dtype=np.float32)
    differences = np.concatenate([-small, small])[None]
    value = np.asarray(jax.jit(objective.k3)(np.zeros_like(differences), differences), np.float64)
    exact = np.expm1(differences.astype(np.float64)) - differences
    assert np.all(value >= 0)
    assert np.all(np.abs(value - exact) <= 1e-5 * exact + 5e-7 * np.abs(differences))


def test_k3_value_and_gradient():
    differences = np.array([-25.0, -3.0, -0.1, -1e-4, 0.0, 1e-4, 0.1, 3.0, 25.0])[None]
    with jax.enable_x64(True):
        log_probs = jnp.full((1, 9), -1.5)
        _, gradient = k3_and_gradient(log_probs, log_probs + differences)
        value = objective.k3(log_probs, log_probs + differences)
    held = np.clip(differences, -20, 20)
    np.testing.assert_allclose(value, np.exp(held) - held - 1, rtol=1e-7, atol=1e-15)
    np.testing.assert_allclose(gradient, np.where(np.abs(differences) > 20, 0, 1 - np.exp(differences)), rtol=1e-9, atol=1e-12)


def test_completion_weights():
    mask = np.array([[True, True, False], [False, False, False], [True, True, True], [True, False, False]])
    weights, count = objective.completion_weights(mask, np.array([True, True, False, True]))
    np.testing.assert_array_equal(weights, np.float32([[0.5, 0.5, 0], [0, 0, 0], [0, 0, 0], [1, 0, 0]]))
    assert count == 3.0 and weights.dtype == count.dtype == jnp.float32


def test_micro_batches_add_up():
    arguments = tokens(1, np.float32)
    fn = jax.jit(functools.partial(objective.policy_loss, **CLIP, kl_coefficient=0.1))
    whole = fn(*arguments)
    parts = [fn(*(x[s] for x in arguments)) for s in (slice(0, 1), slice(1, 5))]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), jax.tree.map(jnp.add, *parts), whole)


def test_nothing_to_train_on_is_zero_not_nan():
    log_probs, old, reference, advantages, mask, valid = tokens(0, np.float32)
    for m, v, expected in ((np.zeros_like(mask), valid, 4), (mask, np.zeros_like(valid), 0)):
        loss, count, sums = objective.policy_loss(log_probs, old, reference, advantages, m, v, **CLIP, kl_coefficient=0.1)
        assert loss == 0 and count == expected and all(value == 0 for value in sums.values())


def test_no_reference_computes_no_kl():
    log_probs, old, reference, advantages, mask, valid = tokens(0, np.float32)
    fn = lambda ref, beta: objective.policy_loss(log_probs, old, ref, advantages, mask, valid, **CLIP, kl_coefficient=beta)  # noqa: E731
    without, measured = fn(None, 0.0), fn(reference, 0.0)
    assert "kl" not in without[2] and measured[2]["kl"] > 0 and without[0] == measured[0]
    with pytest.raises(ValueError, match="kl_coefficient is 0.1 without a reference, must be 0"):
        fn(None, 0.1)


def test_extreme_ratios_stay_finite():
    log_probs, old = jnp.array([[0.0, -400.0, 0.0]]), jnp.array([[-400.0, 0.0, -90.0]])

    @jax.jit
    @jax.value_and_grad
    def loss(x, advantage):
        mask, valid = jnp.ones((1, 3), bool), jnp.ones(1, bool)
        return objective.policy_loss(x, old, old, advantage, mask, valid, **CLIP, kl_coefficient=0.1)[0]

    for advantage in (-1.0, 0.0, 1.0):
        value, gradient = loss(log_probs, jnp.array([advantage]))
        assert np.isfinite(value) and np.isfinite(gradient).all()
