"""Training of the tabular policy: gradients against the closed form, learning, determinism, controls."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_laboratory import A, BUDGET, GRPO, K, P_GRPO, SEEDS, WORLDS, X, world

from pgrpo_jax.algorithms.preference_weights import PreferenceWeights
from pgrpo_jax.laboratory import environment, training


@functools.cache
def curve(arm, budget=BUDGET):
    """World -> [M, S, K] of the normalised true reward."""
    found = training.train(arm, environment.stack(list(WORLDS.values())), SEEDS, budget).curve
    return dict(zip(WORLDS, np.asarray(found), strict=True))


def change(arm, **changes):
    return dataclasses.replace(arm, **changes)


def test_the_gradient_is_the_closed_form_of_a_softmax_bandit():
    """On policy, −∂J/∂L[k, x, a] = −1/N Σ_n [n at k, x]·(A_n − β_n·(1 − 1/(A·π_n)))·([a_n = a] − π(a | k, x))."""
    generator = np.random.default_rng(0)
    size = 20
    logits = generator.normal(size=(K, X, A))
    drawn = {name: generator.integers(high, size=size) for name, high in (("preference_ids", K), ("contexts", X), ("actions", A))}
    advantage, beta = generator.normal(size=size), generator.uniform(size=size)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected, kl = np.zeros_like(logits), []
    for n in range(size):
        k, x, a = (drawn[name][n] for name in ("preference_ids", "contexts", "actions"))
        reference_ratio = 1 / (A * probabilities[k, x, a])
        kl.append(reference_ratio - np.log(reference_ratio) - 1)
        signal = advantage[n] - beta[n] * (1 - reference_ratio)
        expected[k, x] -= signal * ((np.arange(A) == a) - probabilities[k, x]) / size
    arrays = {name: jnp.asarray(value, jnp.int32) for name, value in drawn.items()}
    batch = training._Batch(
        prompt_index=jnp.zeros(size, jnp.int32), placebo_ids=jnp.zeros(size, jnp.int32), rewards=jnp.zeros(size), **arrays
    )
    numbers = [jnp.asarray(value, jnp.float32) for value in (advantage, beta)]
    found, measured = jax.grad(training._loss, has_aux=True)(jnp.asarray(logits, jnp.float32), batch, *numbers, 1)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(measured, kl, atol=1e-5)


def test_one_step_by_hand():
    """The first step has the length of the learning rate; a gradient ten times as long is clipped at twice the one before."""
    policy = environment.Policy(shared=jnp.zeros((1, 2)), own=jnp.zeros((1, 1, 2)))
    gradient = environment.Policy(shared=jnp.asarray([[3.0, 0.0]]), own=jnp.asarray([[[0.0, 4.0]]]))
    moved, square = training.descend(policy, gradient, jnp.zeros(()), jnp.int32(0), jnp.float32(0.5))
    np.testing.assert_allclose(moved.shared, [[-0.5 * 3 / 5, 0.0]], rtol=1e-5)
    np.testing.assert_allclose(moved.own, [[[0.0, -0.5 * 4 / 5]]], rtol=1e-5)
    longer = jax.tree.map(lambda g: 10 * g, gradient)
    again, square = training.descend(moved, longer, square, jnp.int32(1), jnp.float32(0.5))
    root = np.sqrt((0.95 * 0.05 * 25 + 0.05 * 100) / (1 - 0.95**2))  # 100 = (2·5)²
    np.testing.assert_allclose(again.shared - moved.shared, [[-0.5 * (10 * 3 / 5) / root, 0.0]], rtol=1e-5)
    np.testing.assert_allclose(square, 0.95 * 0.05 * 25 + 0.05 * 100, rtol=1e-5)


def test_no_gradient_moves_nothing():
    policy = environment.Policy(shared=jnp.ones((1, 2)), own=jnp.ones((1, 1, 2)))
    nothing = jax.tree.map(jnp.zeros_like, policy)
    moved, square = training.descend(policy, nothing, jnp.zeros(()), jnp.int32(0), jnp.float32(1.0))
    np.testing.assert_array_equal(moved.shared, policy.shared)
    moved, _ = training.descend(moved, jax.tree.map(jnp.ones_like, policy), square, jnp.int32(1), jnp.float32(1.0))
    assert np.all(np.isfinite(moved.own)) and np.all(np.asarray(moved.own) < 1)


@pytest.mark.parametrize("arm", [GRPO, P_GRPO], ids=["grpo", "p_grpo"])
def test_every_preference_group_learns_and_a_flipped_sign_unlearns(arm):
    assert curve(arm)["base"].shape == (6, 40, K)
    assert curve(arm)["base"][:, -1].mean(axis=0).min() > 0.2
    assert curve(change(arm, learning_rate=-1.0))["base"][:, -1].mean(axis=0).max() < -0.2


def test_the_same_bits_every_time_whoever_else_trains():
    worlds = environment.stack(list(WORLDS.values()))
    for a, b in zip(*[jax.tree.leaves(training.train(P_GRPO, worlds, SEEDS, BUDGET)) for _ in range(2)]):
        np.testing.assert_array_equal(a, b)
    turned = np.asarray(training.train(P_GRPO, worlds, SEEDS[::-1], BUDGET).curve)
    np.testing.assert_allclose(turned[0, ::-1], curve(P_GRPO)["base"], atol=1e-5)


def test_nobody_is_suppressed_where_all_want_the_same_and_look_the_same():
    found = curve(GRPO)["same"]
    np.testing.assert_allclose(found, np.broadcast_to(found[..., :1], found.shape), atol=1e-5)
    assert found[:, -1].mean() > 0.4


@pytest.mark.parametrize("arm", [GRPO, P_GRPO], ids=["grpo", "p_grpo"])
def test_offset_and_scale_of_one_preference_group_change_nothing(arm):
    """Facts 1 and 6 of the algorithm's page: GRPO removes a user's scale and offset, P-GRPO a preference group's."""
    np.testing.assert_allclose(curve(arm)["base"].mean(0), curve(arm)["rated otherwise"].mean(0), atol=0.02)


def test_a_pooled_history_is_moved_by_another_ones_offset():
    pooled = curve(change(P_GRPO, rows="pooled"))
    assert np.abs(pooled["base"] - pooled["rated otherwise"]).max() > 0.1


def test_pooled_over_one_preference_group_is_p_grpo():
    alone = {"shares": (1.0,), "offsets": (0.3,), "scales": (2.0,), "noise": (0.2,)}
    worlds = environment.stack([world(**alone)])
    first, second = [training.train(change(P_GRPO, rows=rows), worlds, SEEDS, BUDGET) for rows in ("preference", "pooled")]
    np.testing.assert_array_equal(first.curve, second.curve)


def test_arms_of_one_seed_see_the_same_prompts_and_draws():
    """Until a history is warm P-GRPO's advantages are GRPO's; with the same draws the two policies are one."""
    cold = change(P_GRPO, settings=dataclasses.replace(P_GRPO.settings, min_count=1e6))
    np.testing.assert_allclose(curve(GRPO)["base"], curve(cold)["base"], atol=1e-5)
    assert np.abs(curve(GRPO)["base"] - curve(P_GRPO)["base"]).max() > 0.01


def test_the_placebo_history_is_none_of_ones_own():
    placebo = curve(change(P_GRPO, rows="placebo"))
    assert np.abs(placebo["rated otherwise"] - curve(P_GRPO)["rated otherwise"]).max() > 0.1


def test_stratified_sampling_teaches_the_minority_faster():
    more = curve(change(GRPO, share_floor=0.33))
    assert more["base"][:, 7, -1].mean() > curve(GRPO)["base"][:, 7, -1].mean() + 0.05


def test_balanced_weights_teach_the_minority_faster():
    more = curve(change(GRPO, weights=PreferenceWeights(kind="balanced")))
    assert more["base"][:, 7, -1].mean() > curve(GRPO)["base"][:, 7, -1].mean() + 0.02


def test_a_kl_budget_keeps_the_policy_near_the_first_one():
    free, held = curve(GRPO)["base"][:, -1].mean(), curve(change(GRPO, kl_target=0.2))["base"][:, -1].mean()
    assert 0.2 < held < free - 0.05
    wide = curve(change(GRPO, kl_target=1e6))["base"]  # never reached, yet there is a coefficient at first
    assert np.abs(wide - curve(GRPO)["base"]).max() > 1e-4


def test_instruments_of_a_seed():
    found = training.train(P_GRPO, environment.stack(list(WORLDS.values())), SEEDS, BUDGET)
    np.testing.assert_allclose(found.gradient_share.sum(-1), 1.0, atol=1e-5)
    assert np.all(np.asarray(found.gradient_share) > 0)
    assert np.all(np.asarray(found.scale[0]) > 0.2) and np.all(np.asarray(found.scale[0]) < 2)
    np.testing.assert_allclose(found.scale[0].mean(0), found.scale[1].mean(0), atol=0.03)  # scale-free


def test_unknown_rows_are_refused():
    with pytest.raises(ValueError, match="rows is 'all', must be one of preference, pooled, placebo: change the arm"):
        training.train(change(GRPO, rows="all"), environment.stack(list(WORLDS.values())), SEEDS, BUDGET)
