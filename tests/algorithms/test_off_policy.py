"""Off-policy by exact expectation: every completion of a tabular policy is enumerated, and the gradients are those of `policy_loss`."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgrpo_jax.algorithms.importance import Correction
from pgrpo_jax.algorithms.objective import Objective, policy_loss

A, T = 3, 2  # answers a token, tokens: 9 completions
SEQUENCES = np.array(list(itertools.product(range(A), repeat=T)))
RNG = np.random.default_rng(11)
ADVANTAGES = RNG.normal(size=len(SEQUENCES))
TARGET = {"first": RNG.normal(size=A), "second": RNG.normal(size=(A, A))}


def shifted(distance: float):
    """A policy `distance` away."""
    rng = np.random.default_rng(12)
    return {name: x + distance * rng.normal(size=x.shape) for name, x in TARGET.items()}


def log_probs(policy):
    """[9, T] log-probs of every completion's tokens: the second depends on the first."""
    first = jax.nn.log_softmax(policy["first"])[SEQUENCES[:, 0]]
    second = jax.nn.log_softmax(policy["second"], axis=1)[SEQUENCES[:, 0], SEQUENCES[:, 1]]
    return jnp.stack([first, second], axis=1)


def expected_gradient(objective: Objective, behaviour, proximal=TARGET):
    """∇ of the loss in expectation over completions drawn by `behaviour`, at the target policy."""
    sampled = log_probs(behaviour)
    probabilities = jnp.exp(sampled.sum(axis=1))
    ones = np.ones((len(SEQUENCES), T), bool)

    def loss(policy):
        current = log_probs(policy)
        total = 0.0
        for i in range(len(SEQUENCES)):
            row = slice(i, i + 1)
            fixed = jax.lax.stop_gradient(log_probs(proximal))[row], sampled[row], None, jnp.zeros((1, T)), jnp.asarray(ADVANTAGES[row]), jnp.zeros(1)
            value, count, _ = policy_loss(
                current[row], *fixed, ones[row], np.ones(1, bool), np.zeros(1, np.int32), objective=objective, num_prompts=1
            )
            total = total + probabilities[i] * value / count
        return total

    return np.concatenate([np.ravel(g) for g in jax.tree.leaves(jax.device_get(jax.grad(loss)(TARGET)))])


def truth():
    """−Σ π(c) A(c) ∇ log π(c), by finite differences of −Σ π(c) A(c)."""
    found = []
    for name in sorted(TARGET):
        for place in np.ndindex(TARGET[name].shape):
            values = []
            for step in (1e-5, -1e-5):
                moved = {key: np.array(x) for key, x in TARGET.items()}
                moved[name][place] += step
                values.append(-float(np.sum(np.exp(np.asarray(log_probs(moved)).sum(axis=1)) * ADVANTAGES)))
            found.append((values[0] - values[1]) / 2e-5)
    return np.array(found)


def objective(**correction):
    return Objective(aggregation="sum", policy_term="log_prob", correction=Correction(**correction))


@pytest.mark.parametrize("distance", [0.0, 0.3, 1.0])
def test_the_untruncated_weight_gives_back_the_on_policy_gradient(distance):
    with jax.enable_x64(True):
        exact = truth()
        np.testing.assert_allclose(expected_gradient(objective(), TARGET), exact, atol=1e-8)
        weighted = expected_gradient(objective(level="sequence", high=math.inf), shifted(distance))
        np.testing.assert_allclose(weighted, exact, atol=1e-6)
        if distance:  # without it, or token by token, the gradient is another
            for other in (objective(), objective(level="token", high=math.inf)):
                assert np.abs(expected_gradient(other, shifted(distance)) - exact).max() > 1e-3


def test_the_bias_of_a_truncation_falls_with_its_bound():
    with jax.enable_x64(True):
        exact, behaviour = truth(), shifted(1.0)
        bias = [np.linalg.norm(expected_gradient(objective(level="sequence", high=high), behaviour) - exact) for high in (1.5, 2.0, 3.0, math.inf)]
    assert bias == sorted(bias, reverse=True) and bias[0] > 1e-3 and bias[-1] < 1e-6


def test_decoupled_ppo_is_the_on_policy_gradient_at_the_proximal_policy():
    """Behaviour is old, the proximal policy is the current one: ratio 1, clipping idle, the correction does all (arXiv:2505.24298)."""
    with jax.enable_x64(True):
        found = expected_gradient(Objective(aggregation="sum", correction=Correction("sequence", high=math.inf)), shifted(0.7))
        np.testing.assert_allclose(found, truth(), atol=1e-6)
