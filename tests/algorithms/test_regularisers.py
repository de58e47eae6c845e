"""The three KL estimators as values and as losses, against sums over a whole vocabulary; penalties; the adaptive coefficient."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgrpo_jax.algorithms.regularisers import ESTIMATORS, adapt, k3, penalties

LOGITS = np.array([0.3, -1.0, 0.8, 0.1])
REFERENCE = np.log(np.array([0.1, 0.2, 0.3, 0.4]))


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def forward_kl(logits):
    """KL(π ‖ reference), the sum over the vocabulary."""
    log_probs = jax.nn.log_softmax(logits)
    return jnp.sum(jnp.exp(log_probs) * (log_probs - REFERENCE))


def reverse_kl(logits):
    """KL(reference ‖ π)."""
    return jnp.sum(np.exp(REFERENCE) * (REFERENCE - jax.nn.log_softmax(logits)))


def mean_of(name, logits, sampled_from):
    """The mean of an estimator over the vocabulary, every token weighing as much as the sampler makes it likely."""
    return jnp.sum(sampled_from * ESTIMATORS[name](jax.nn.log_softmax(logits)[None], REFERENCE[None])[0])


def test_values_of_one_token():
    current, reference = np.log([[0.5]]), np.log([[0.25]])  # x = 1/2
    expected = {"k1": math.log(2), "k2": math.log(2) ** 2 / 2, "k3": 0.5 - 1 + math.log(2)}
    for name, value in expected.items():
        np.testing.assert_allclose(ESTIMATORS[name](current, reference), [[value]], rtol=1e-12)


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(name):
    np.testing.assert_allclose(mean_of(name, LOGITS, jax.nn.softmax(LOGITS)), forward_kl(LOGITS), rtol=1e-12)


def test_k2_is_biased_and_near_the_reference_hardly():
    near = REFERENCE + 0.01 * LOGITS
    assert abs(mean_of("k2", LOGITS, jax.nn.softmax(LOGITS)) / forward_kl(LOGITS) - 1) > 0.02
    np.testing.assert_allclose(mean_of("k2", near, jax.nn.softmax(near)), forward_kl(near), rtol=0.02)


@pytest.mark.parametrize("name, divergence", [("k1", lambda x: 0 * jnp.sum(x)), ("k2", forward_kl), ("k3", reverse_kl)])
def test_as_a_loss_each_has_the_gradient_that_its_table_says(name, divergence):
    """The tokens are sampled, so the weights of the mean carry no gradient."""
    sampled_from = jax.nn.softmax(LOGITS)
    np.testing.assert_allclose(
        jax.grad(lambda x: mean_of(name, x, sampled_from))(LOGITS), jax.grad(divergence)(LOGITS), rtol=1e-10, atol=1e-14
    )


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_reference_carries_no_gradient(name):
    gradient = jax.grad(lambda x: jnp.sum(ESTIMATORS[name](LOGITS[None], x)))(REFERENCE[None])
    assert not gradient.any()


def test_k3_is_never_negative_in_float32():
    gaps = np.logspace(-12, 1, 200, dtype=np.float32)[None]
    for sign in (1, -1):
        assert (k3(sign * gaps, np.zeros_like(gaps)) >= 0).all()
    assert (k3(gaps[:, 100:], np.zeros_like(gaps[:, 100:])) > 0).all()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_huge_gaps_stay_finite_without_gradient(name):
    far = np.array([[-1e4, 1e4]], np.float32)
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(ESTIMATORS[name](x, np.zeros_like(far))))(far)
    assert np.isfinite(value) and value.dtype == np.float32 and not gradient.any()


@pytest.mark.parametrize("name, expected", [("k1", [-0.5, 0.25, 0]), ("k2", [0.125 + 0.5, 0.03125, 0]), ("k3", None)])
def test_penalties_add_up_over_the_tokens_that_count(name, expected):
    gaps = np.array([[0.5, -1.0], [0.25, np.nan], [np.inf, -np.inf]])
    counted = np.array([[1, 1], [1, 0], [0, 0]], bool)
    if name == "k3":
        expected = [math.exp(-0.5) - 1 + 0.5 + math.exp(1) - 1 - 1, math.exp(-0.25) - 1 + 0.25, 0]
    reference = np.where(counted, -1.0, np.nan)
    found, gradient = jax.value_and_grad(lambda x: jnp.sum(penalties(x, reference, counted, name)))(reference + gaps)
    np.testing.assert_allclose(penalties(reference + gaps, reference, counted, name), expected, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(found, sum(expected))
    assert not gradient.any()


def test_unknown_estimators_are_named():
    with pytest.raises(ValueError, match="^kl_estimator is 'k4', must be one of k1, k2, k3: set objective.kl_estimator$"):
        penalties(LOGITS[None], REFERENCE[None], np.ones((1, 4), bool), "k4")


def test_the_coefficient_moves_by_at_most_a_fifth_over_the_horizon():
    kl = np.array([0.2, 0.05, 0.11, 0.1, np.nan, np.inf, 0.0])
    moved = adapt(np.full(7, 0.5), kl, np.full(7, 0.1), 10.0)
    np.testing.assert_allclose(moved, 0.5 * np.array([1.02, 0.98, 1.01, 1.0, 1.0, 1.02, 0.98]), rtol=1e-12)
    single = adapt(np.float32(0.5), np.float32(0.2), np.float32(0.1), 1.0)
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, 0.6, rtol=1e-6)


def test_the_coefficient_finds_the_one_that_holds_the_target():
    """A policy whose KL is 0.01/β settles where the KL is the target."""
    beta = np.float64(1.0)
    for _ in range(400):
        beta = adapt(beta, 0.01 / beta, np.float64(0.05), 2.0)
    np.testing.assert_allclose(beta, 0.2, rtol=1e-3)
