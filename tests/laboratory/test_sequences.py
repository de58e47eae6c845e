"""Answers of several tokens: everything against a loop over all of them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgrpo_jax.laboratory import sequences

X, T, A = 2, 3, 3
RNG = np.random.default_rng(5)
LOGITS, UTILITIES = RNG.normal(size=(X, T, A, A)).astype(np.float32), RNG.random((X, T, A, A)).astype(np.float32)


def walk(x, completion):
    """(log-probs, utilities) of the tokens of one answer."""
    before, found = 0, []
    for t, token in enumerate(completion):
        row = LOGITS[x, t, before].astype(np.float64)
        found.append((row[token] - np.log(np.exp(row).sum()), UTILITIES[x, t, before, token]))
        before = token
    return np.array(found).T


def test_all_answers_are_listed_once():
    assert sequences.every_completion(T, A).tolist() == [list(c) for c in itertools.product(range(A), repeat=T)]


def test_log_probs_and_rewards_are_those_of_the_walk():
    every = sequences.every_completion(T, A)
    for x in range(X):
        contexts = jnp.full(len(every), x)
        walks = np.array([walk(x, c) for c in every])
        found = np.asarray(sequences.token_log_probs(LOGITS, contexts, every))
        np.testing.assert_allclose(found, walks[:, 0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(np.exp(found.sum(axis=1)).sum(), 1.0, rtol=1e-5)
        np.testing.assert_allclose(sequences.rewards(UTILITIES, contexts, every), walks[:, 1].mean(axis=1), rtol=1e-5)


def test_expectation_and_optimum_are_those_over_all_answers():
    every = sequences.every_completion(T, A)
    values = np.array([[walk(x, c)[1].mean() for c in every] for x in range(X)])
    probabilities = np.array([[np.exp(walk(x, c)[0].sum()) for c in every] for x in range(X)])
    random, best, expected = values.mean(), values.max(axis=1).mean(), (probabilities * values).sum(axis=1).mean()
    found = sequences.normalised_reward(jnp.asarray(LOGITS), jnp.asarray(UTILITIES))
    np.testing.assert_allclose(found, (expected - random) / (best - random), rtol=1e-4)
    assert sequences.normalised_reward(jnp.zeros_like(LOGITS), jnp.asarray(UTILITIES)) == 0


@pytest.mark.parametrize("x", range(X))
def test_draws_are_of_the_policy(x):
    """20,000 draws: each answer's share within 4.5 deviations of its probability."""
    number = 20_000
    uniform = np.random.default_rng(1).random((number, T)).astype(np.float32)
    drawn = np.asarray(sequences.draw(jnp.asarray(LOGITS), jnp.full(number, x), uniform))
    assert drawn.min() >= 0 and drawn.max() < A
    counts = np.bincount(np.ravel_multi_index(drawn.T, (A,) * T), minlength=A**T)
    probabilities = np.exp([walk(x, c)[0].sum() for c in sequences.every_completion(T, A)])
    assert np.all(np.abs(counts / number - probabilities) < 4.5 * np.sqrt(probabilities / number))


def test_the_last_uniform_number_still_draws_a_token():
    drawn = sequences.draw(jnp.asarray(LOGITS), jnp.zeros(1, jnp.int32), jnp.full((1, T), np.nextafter(np.float32(1), np.float32(0))))
    assert int(jax.device_get(drawn).max()) == A - 1
