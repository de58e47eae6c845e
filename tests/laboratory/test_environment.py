"""The laboratory's world against plain loops."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgrpo_jax.laboratory import environment

K, X, A = 3, 4, 5
PLAIN = {
    "shares": (0.5, 0.35, 0.15), "offsets": (0.0, 2.0, -1.0), "scales": (1.0, 0.5, 2.0), "noise": (0.1, 0.2, 0.3),
    "disagreement": 0.75, "visibility": 1.0, "difficulty": 0.5, "exponent": 2.0, "binary": 0.0,
}


def regime(**changed):
    return jax.tree.map(lambda leaf: leaf[0], environment.stack([PLAIN | changed]))


def tastes(seed=0, **changed):
    return environment.utilities(jax.random.key(seed), regime(**changed), num_contexts=X, num_actions=A)


def test_expected_reward_is_the_sum_over_every_context_and_answer():
    generator = np.random.default_rng(0)
    policy = environment.Policy(
        shared=jnp.asarray(generator.normal(size=(X, A)), jnp.float32), own=jnp.asarray(generator.normal(size=(K, X, A)), jnp.float32)
    )
    utilities, visibility = np.asarray(tastes(), np.float64), 0.3
    found = environment.normalised_rewards(environment.log_probs(policy, jnp.float32(visibility)), jnp.asarray(utilities, jnp.float32))
    for k in range(K):
        expected = random = best = 0.0
        for x in range(X):
            logits = [float(policy.shared[x, a]) + visibility * float(policy.own[k, x, a]) for a in range(A)]
            total = sum(np.exp(logit) for logit in logits)
            expected += sum(np.exp(logit) / total * utilities[k, x, a] for a, logit in enumerate(logits)) / X
            random += sum(utilities[k, x]) / (X * A)
            best += max(utilities[k, x]) / X
        assert found[k] == pytest.approx((expected - random) / (best - random), abs=1e-5)


def test_the_scale_runs_from_random_to_optimal():
    utilities = tastes()
    start = environment.initial_policy(K, num_contexts=X, num_actions=A)
    uniform = environment.log_probs(start, jnp.float32(1.0))
    np.testing.assert_allclose(environment.normalised_rewards(uniform, utilities), 0.0, atol=1e-6)
    best = jax.nn.log_softmax(1e3 * jax.nn.one_hot(jnp.argmax(utilities, axis=-1), A), axis=-1)
    np.testing.assert_allclose(environment.normalised_rewards(best, utilities), 1.0, atol=1e-6)


def test_invisible_preference_groups_share_one_policy():
    own = jnp.asarray(np.random.default_rng(1).normal(size=(K, X, A)), jnp.float32)
    table = environment.log_probs(environment.Policy(shared=jnp.ones((X, A)), own=own), jnp.float32(0.0))
    np.testing.assert_array_equal(table, jnp.broadcast_to(table[:1], table.shape))


def test_disagreement_runs_from_one_taste_to_independent_ones():
    same = tastes(disagreement=0.0)
    np.testing.assert_array_equal(same, jnp.broadcast_to(same[:1], same.shape))
    apart = np.asarray(environment.utilities(jax.random.key(0), regime(disagreement=1.0, difficulty=0.0), num_contexts=40, num_actions=50))
    for i, j in itertools.combinations(range(K), 2):
        assert abs(np.corrcoef(apart[i].ravel(), apart[j].ravel())[0, 1]) < 0.1


def test_the_exponent_makes_good_answers_rare():
    plain, rare = [np.asarray(tastes(exponent=exponent, difficulty=0.0)) for exponent in (1.0, 4.0)]
    np.testing.assert_allclose(rare, plain**4, rtol=1e-5)


def test_the_gradient_of_the_policy_is_that_of_its_logits_through_the_chain_rule():
    generator = np.random.default_rng(3)
    weights, shared, own = [jnp.asarray(generator.normal(size=size), jnp.float32) for size in ((K, X, A), (X, A), (K, X, A))]
    visibility = jnp.float32(0.3)

    def loss(policy):
        return jnp.sum(weights * environment.log_probs(policy, visibility))

    policy = environment.Policy(shared=shared, own=own)
    by_logits = jax.grad(lambda logits: jnp.sum(weights * jax.nn.log_softmax(logits, axis=-1)))(shared[None] + visibility * own)
    found, expected = environment.policy_gradient(by_logits, visibility), jax.grad(loss)(policy)
    np.testing.assert_allclose(found.shared, expected.shared, atol=1e-5)
    np.testing.assert_allclose(found.own, expected.own, atol=1e-5)


def test_difficulty_keeps_a_share_of_the_hardest_context():
    easy, hard = tastes(difficulty=0.0), tastes(difficulty=0.9)
    np.testing.assert_allclose(hard[:, 0], easy[:, 0], rtol=1e-6)
    np.testing.assert_allclose(hard[:, -1], 0.1 * easy[:, -1], rtol=1e-5)


def test_one_uniform_number_is_one_draw():
    probabilities = jnp.asarray([0.2, 0.0, 0.5, 0.3])
    uniform = jnp.asarray([0.0, 0.19, 0.21, 0.69, 0.71, 0.9999999])
    drawn = environment.draw_from(jnp.broadcast_to(probabilities, (6, 4)), uniform)
    assert drawn.tolist() == [0, 0, 2, 2, 3, 3]
    assert environment.draw_from(jnp.asarray([[0.0, 1.0]]), jnp.asarray([0.0])).tolist() == [1]  # never what has no probability
    short = environment.draw_from(jnp.asarray([[0.5, 0.4999]]), jnp.asarray([0.99999]))  # rounding left the sum below 1
    assert short.tolist() == [1]


@pytest.mark.parametrize("binary", [0.0, 1.0])
def test_observed_rewards_row_by_row(binary):
    world = regime(binary=binary)
    utility, who = [0.1, 0.6, 0.6, 0.9], [0, 1, 2, 2]
    uniform, normal = [0.05, 0.7, 0.5, 0.95], [1.0, -1.0, 0.5, 0.0]
    found = environment.observed_rewards(
        world, jnp.asarray(utility), jnp.asarray(who, jnp.int32), jnp.asarray(uniform), jnp.asarray(normal)
    )
    for n, k in enumerate(who):
        base = float(uniform[n] < utility[n]) if binary else utility[n]
        expected = float(world.offsets[k]) + float(world.scales[k]) * (base + float(world.noise[k]) * normal[n])
        assert found[n] == pytest.approx(expected, abs=1e-6)


def test_a_floor_lifts_the_small_and_the_others_give_way():
    lifted = environment.at_least(jnp.asarray([0.5, 0.35, 0.15]), jnp.float32(0.25))
    np.testing.assert_allclose(lifted, [0.25 + 0.25 * 0.25 / 0.35, 0.25 + 0.1 * 0.25 / 0.35, 0.25], rtol=1e-5)
    shares = jnp.asarray([0.5, 0.35, 0.15])
    np.testing.assert_allclose(environment.at_least(shares, jnp.float32(0.0)), shares, rtol=1e-6)
    np.testing.assert_allclose(environment.at_least(shares, jnp.float32(1 / 3)), np.full(3, 1 / 3), rtol=1e-5)


def test_stacks_worlds_and_refuses_wrong_ones():
    stacked = environment.stack([PLAIN, PLAIN | {"visibility": 0.0}])
    assert stacked.shares.shape == (2, 3) and stacked.visibility.tolist() == [1.0, 0.0]
    for changed, message in (
        ({"shares": (0.5, 0.3, 0.1)}, "shares add up to 0.9, must add up to 1: change them"),
        ({"noise": (0.1, 0.1)}, r"have lengths \[2, 3\]: give one number for each preference group"),
        ({"difficulty": 1.5}, r"difficulty = 1.5 is outside \[0, 1\]: change it"),
        ({"visible": 1.0}, "the world has .*, must have .*: name each once"),
    ):
        with pytest.raises(ValueError, match=message):
            environment.stack([PLAIN | changed])
