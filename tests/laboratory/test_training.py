"""Training of the tabular policy: gradients against the closed form, learning, determinism, controls."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgrpo_jax.laboratory import environment, training

BUDGET = training.Budget(
    num_steps=40, early_step=8, prompts_per_step=8, completions_per_prompt=4, num_contexts=3, num_actions=4
)
K = 3
SEEDS = jnp.arange(6, dtype=jnp.int32)


def regimes(**changed):
    values = {"shares": [0.5, 0.35, 0.15], "offsets": [0.0] * K, "scales": [1.0] * K, "noise": [0.2] * K}
    values |= {"disagreement": 0.75, "visibility": 1.0, "difficulty": 0.0, "exponent": 1.0, "binary": 0.0}
    return environment.Regime(**{name: jnp.asarray([value], jnp.float32) for name, value in (values | changed).items()})


def arm(advantage="grpo", learning_rate=1.0):
    return training.Arm(advantage=advantage, learning_rate=learning_rate)


def test_the_gradient_is_the_closed_form_of_a_softmax_bandit():
    """On policy, ∂(−J)/∂L[k, x, a] = −1/N Σ_n [k_n = k, x_n = x]·A_n·([a_n = a] − π(a | k, x))."""
    generator = np.random.default_rng(0)
    size = 20
    logits = generator.normal(size=(K, 3, 4))
    batch = {name: generator.integers(high, size=size) for name, high in (("preference_ids", K), ("contexts", 3), ("actions", 4))}
    advantage = generator.normal(size=size)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = np.zeros_like(logits)
    for n in range(size):
        k, x, a = (batch[name][n] for name in ("preference_ids", "contexts", "actions"))
        expected[k, x] -= advantage[n] * ((np.arange(4) == a) - probabilities[k, x]) / size
    arrays = {name: jnp.asarray(value, jnp.int32) for name, value in batch.items()}
    drawn = training._Batch(prompt_index=jnp.zeros(size, jnp.int32), rewards=jnp.zeros(size), **arrays)
    found = jax.grad(training._loss)(jnp.asarray(logits, jnp.float32), drawn, jnp.asarray(advantage, jnp.float32))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_every_preference_group_learns_and_its_negative_unlearns():
    learned = np.asarray(training.train(arm(), regimes(), SEEDS, BUDGET).curve)[0]
    assert learned.shape == (6, 40, K)
    assert learned[:, -1].mean(axis=0).min() > 0.2
    unlearned = np.asarray(training.train(arm(learning_rate=-1.0), regimes(), SEEDS, BUDGET).curve)[0]
    assert unlearned[:, -1].mean(axis=0).max() < -0.2


def test_the_same_bits_every_time_whoever_else_trains():
    first = training.train(arm("p_grpo"), regimes(), SEEDS, BUDGET)
    again = training.train(arm("p_grpo"), regimes(), SEEDS, BUDGET)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again)):
        np.testing.assert_array_equal(a, b)
    alone = training.train(arm("p_grpo"), regimes(), SEEDS[2:3], BUDGET)
    np.testing.assert_allclose(alone.curve[0, 0], first.curve[0, 2], atol=1e-4)


def test_nobody_is_suppressed_where_all_want_the_same_and_look_the_same():
    curve = np.asarray(training.train(arm(), regimes(disagreement=0.0, visibility=0.0), SEEDS, BUDGET).curve)[0]
    np.testing.assert_allclose(curve, np.broadcast_to(curve[..., :1], curve.shape), atol=1e-5)
    assert curve[:, -1].mean() > 0.4


def test_arms_of_one_seed_see_the_same_prompts_and_draws():
    """Before the first update all policies are equal, so the first step's gradient shares are too wherever advantages are."""
    short = dataclasses.replace(BUDGET, num_steps=1, early_step=1)
    first, second = [training.train(arm(name), regimes(), SEEDS, short) for name in ("grpo", "p_grpo")]  # cold: GRPO's advantage
    np.testing.assert_allclose(first.gradient_share, second.gradient_share, atol=1e-6)
    np.testing.assert_allclose(first.curve, second.curve, atol=1e-6)


@pytest.mark.parametrize("name", ["grpo", "p_grpo"])
def test_a_user_who_rates_higher_or_flatter_learns_as_fast(name):
    """Offset and scale of one preference group leave GRPO's advantages as they are, and P-GRPO's too."""
    plain = training.train(arm(name), regimes(), SEEDS, BUDGET)
    other = training.train(arm(name), regimes(offsets=[0.0, 0.0, -1.0], scales=[1.0, 1.0, 0.5]), SEEDS, BUDGET)
    np.testing.assert_allclose(np.asarray(plain.curve).mean(1), np.asarray(other.curve).mean(1), atol=0.02)
