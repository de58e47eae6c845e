"""Stale rollouts: on-policy all treatments are one, staleness costs, and what is trained on is what the past policy sampled."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgrpo_jax.algorithms.importance import Correction
from pgrpo_jax.algorithms.objective import Objective
from pgrpo_jax.laboratory import staleness, tables
from pgrpo_jax.laboratory.staleness import Budget, Treatment

BUDGET = Budget(num_steps=40, prompts_per_step=4, completions_per_prompt=8, num_contexts=4, length=4, num_tokens=3, num_features=48)
TREATMENTS = {
    "nothing": Treatment(Objective(policy_term="log_prob")),
    "clip": Treatment(Objective(), proximal="generator"),
    "token": Treatment(Objective(policy_term="log_prob", correction=Correction("token"))),
}
GRID = ((0, 16), (2.0, 4.0))


@functools.cache
def found():
    return staleness.sweep(TREATMENTS, *GRID, range(6), BUDGET)


def test_on_policy_all_treatments_learn_alike():
    for rewards in found().values():
        assert rewards.shape == (2, 2, 6)
        np.testing.assert_allclose(rewards[0], found()["nothing"][0], atol=2e-3)
    assert found()["nothing"][0].mean() > 0.5


def test_a_flipped_sign_unlearns():
    assert staleness.sweep({"": TREATMENTS["nothing"]}, (0,), (-2.0,), range(6), BUDGET)[""].mean() < -0.3


def test_staleness_costs_and_a_clip_around_the_sampler_costs_most():
    late = {name: rewards[1].mean() for name, rewards in found().items()}
    assert late["clip"] < late["token"] - 0.05 and late["token"] < found()["token"][0].mean() - 0.02


def test_it_repeats_to_the_bit_with_any_number_of_threads():
    again = staleness.sweep(TREATMENTS, *GRID, range(6), BUDGET, num_threads=1)
    for name, rewards in found().items():
        np.testing.assert_array_equal(again[name], rewards)


def test_a_seed_alone_is_the_seed_among_others():
    alone = staleness.sweep({"token": TREATMENTS["token"]}, (0, 16), (4.0,), (3,), BUDGET)["token"]
    np.testing.assert_allclose(alone[:, 0, 0], found()["token"][:, 1, 3], atol=0.02)


@pytest.mark.parametrize("name", ["nothing", "token"])
def test_the_gradient_is_that_of_what_the_past_policy_sampled(name):
    """Against the same batch drawn by hand and the closed form −1/N Σ A·w·∇log π, mean over tokens."""
    shape = (4, 4, 3, 3)
    generator = np.random.default_rng(2)
    logits, behaviour, utilities = (jnp.asarray(generator.normal(size=shape), jnp.float32) for _ in range(3))
    key = jax.random.key(9)
    gradient = np.asarray(staleness._gradient(TREATMENTS[name], BUDGET, utilities, logits, behaviour, key))
    uniform = np.asarray(jax.random.uniform(key, (4 + 32 * 4,)))
    expected, rewards, samples = np.zeros(shape), [], []
    for n in range(32):
        x, before, sample, total = int(uniform[n // 8] * 4), 0, [], 0.0
        for t, number in enumerate(uniform[4 + 4 * n : 8 + 4 * n]):
            weights = [np.exp(np.asarray(table[x, t, before], np.float64)) for table in (logits, behaviour)]
            own, sampled = (w / w.sum() for w in weights)
            token = int(np.searchsorted(np.cumsum(sampled), number, side="right"))
            sample.append((x, t, before, token, own, sampled))
            total += float(utilities[x, t, before, token]) / 4
            before = token
        samples.append(sample)
        rewards.append(total)
    by_prompt = np.array(rewards).reshape(4, 8)
    advantages = ((by_prompt - by_prompt.mean(1, keepdims=True)) / (by_prompt.std(1, keepdims=True) + 1e-6)).ravel()
    for advantage, sample in zip(advantages, samples):
        for x, t, before, token, own, sampled in sample:
            weight = min(own[token] / sampled[token], 2.0) if name == "token" else 1.0
            expected[x, t, before] -= advantage * weight * ((np.arange(3) == token) - own) / 4 / 32
    np.testing.assert_allclose(gradient, expected, atol=2e-5)


def test_the_report_and_its_table():
    report = staleness.report(found(), *GRID)
    cell = report["clip"]["16"]["4"]
    assert cell["mean"] == pytest.approx(float(found()["clip"][1, 1].mean()), rel=1e-5) and cell["low"] < cell["mean"] < cell["high"]
    rows = tables.staleness(report, "4").splitlines()
    assert len(rows) == 5 and re.search(rf"\| clip +\| .* \| {cell['mean']:.3f}".replace("0.", r"\."), rows[3])


def test_an_unknown_proximal_policy_is_refused():
    with pytest.raises(ValueError, match="odd: proximal is 'newest', must be one of generator, current: change the treatment"):
        staleness.sweep({"odd": Treatment(Objective(), proximal="newest")}, *GRID, range(2), BUDGET)
