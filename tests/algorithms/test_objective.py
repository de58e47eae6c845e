"""Every composition of the objective against a plain Python loop over tokens, value and gradient; degenerate cases; slices."""

import dataclasses
import itertools
import math

import jax
import numpy as np
import objective_oracle as oracle
import pytest

from pgrpo_jax.algorithms import aggregation, policy_terms, regularisers
from pgrpo_jax.algorithms.importance import Correction
from pgrpo_jax.algorithms.objective import Objective, policy_loss

N, T, P = 8, 5, 3
LENGTHS = np.array([5, 1, 0, 3, 2, 4, 5, 2])
PROMPTS = np.array([0, 0, 0, 1, 1, 1, 2, 2], np.int32)
VALID = np.array([1, 1, 1, 1, 1, 1, 0, 0], bool)  # the last prompt only pads


def example(dtype=np.float64):
    """Ratios on both sides of the clip; what does not count holds garbage."""
    rng = np.random.default_rng(5)
    mask = np.arange(T)[None, :] < LENGTHS[:, None]
    current = -rng.exponential(1.0, (N, T))
    others = [current + rng.normal(0, scale, (N, T)) for scale in (0.4, 0.6, 0.5)]
    entropies = rng.random((N, T))
    counted = mask & VALID[:, None]
    for values in (current, *others, entropies):
        values[~counted] = rng.choice([np.nan, np.inf, -np.inf, 1e6], (~counted).sum())
    advantages, betas = rng.normal(0.2, 1.0, N), rng.random(N)
    advantages[~VALID] = np.nan
    return *(x.astype(dtype) for x in (current, *others, entropies, advantages, betas)), mask, VALID, PROMPTS


def evaluate(arguments, objective):
    """`policy_loss` in the precision of its arguments, on the host."""
    with jax.enable_x64(arguments[0].dtype == np.float64):
        return jax.device_get(policy_loss(*arguments, objective=objective, num_prompts=P))


COMPOSITIONS = [
    Objective(aggregation=a, importance=i, policy_term=p, kl_estimator=k, max_length=7, clip_low=0.25, clip_high=0.35)
    for a, i, p, k in itertools.product(
        aggregation.AGGREGATIONS, policy_terms.IMPORTANCE, policy_terms.POLICY_TERMS, regularisers.ESTIMATORS
    )
] + [
    Objective(kl_estimator=k, kl_in=where, dual_clip=c, entropy_coefficient=0.3, correction=Correction(level, bound, 0.8, 1.3))
    for (k, where), c, (level, bound) in itertools.product(
        [("k1", "loss"), ("k2", "loss"), ("k3", "loss"), ("k3", "reward")], [0.0, 1.1],
        [("none", "truncate"), ("token", "truncate"), ("token", "mask"), ("sequence", "mask"), ("geometric", "truncate")],
    )
]  # fmt: skip


@pytest.mark.parametrize("objective", COMPOSITIONS, ids=lambda o: "-".join(map(str, dataclasses.astuple(o)[:3])))
def test_values_equal_the_loop(objective):
    arguments = example()
    loss, count, sums = evaluate(arguments, objective)
    expected, expected_count, rows = oracle.loop(objective, *arguments)
    np.testing.assert_allclose(loss, expected, rtol=1e-10)
    assert count == expected_count
    for i in range(N):
        for name in oracle.NAMES:
            np.testing.assert_allclose(sums[name][i], rows[i][name] if i in rows else 0.0, rtol=1e-10, atol=1e-12, err_msg=f"{name} of {i}")


def gradient(objective, arguments):
    with jax.enable_x64(True):
        current, *rest = arguments
        return jax.device_get(jax.grad(lambda x: policy_loss(x, *rest, objective=objective, num_prompts=P)[0])(current))


@pytest.mark.parametrize(
    "objective",
    [
        Objective(), Objective(policy_term="sequence_ratio"), Objective(policy_term="log_prob", aggregation="prompt_tokens"),
        Objective(kl_estimator="k1"), Objective(kl_estimator="k2", dual_clip=1.1), Objective(aggregation="max_length", max_length=7),
    ],
)  # fmt: skip
def test_gradients_equal_finite_differences_of_the_loop(objective):
    """Where no weight without gradient depends on the policy, the loop itself can be differentiated."""
    arguments = example()
    found, current = np.asarray(gradient(objective, arguments)), arguments[0]
    for i, t in itertools.product(range(N), range(T)):
        if not (VALID[i] and t < LENGTHS[i]):
            assert found[i, t] == 0
            continue
        values = []
        for step in (1e-6, -1e-6):
            moved = current.copy()
            moved[i, t] += step
            values.append(oracle.loop(objective, moved, *arguments[1:])[0])
        np.testing.assert_allclose(found[i, t], (values[0] - values[1]) / 2e-6, rtol=1e-5, atol=1e-8, err_msg=f"{i}, {t}")


@pytest.mark.parametrize("importance", list(policy_terms.IMPORTANCE))
def test_importance_and_correction_carry_no_gradient(importance):
    """The gradient of w·log π is w·A/len, whatever w depends on."""
    objective = Objective(importance=importance, policy_term="log_prob", kl_in="reward", correction=Correction("token", high=1.3))
    arguments = example()
    found, (current, old, behaviour, *_), advantages = np.asarray(gradient(objective, arguments)), arguments, arguments[5]
    for i, t in itertools.product(np.flatnonzero(VALID), range(T)):
        if t >= LENGTHS[i]:
            continue
        r = math.exp(current[i, t] - old[i, t])
        whole = math.exp(sum(current[i, u] - old[i, u] for u in range(LENGTHS[i])))
        w = {"none": 1.0, "ratio": r, "sequence_ratio": whole, "clipped_ratio": min(max(r, 0.8), 1.2)}[importance]
        w *= min(math.exp(old[i, t] - behaviour[i, t]), 1.3)
        np.testing.assert_allclose(found[i, t], -w * advantages[i] / LENGTHS[i], rtol=1e-9)


@pytest.mark.parametrize("name", list(aggregation.AGGREGATIONS))
def test_slices_of_whole_prompts_add_up(name):
    objective = Objective(aggregation=name, max_length=7)
    arguments = example()
    whole, count, _ = evaluate(arguments, objective)
    parts = [evaluate([x[s] for x in arguments], objective) for s in (slice(0, 3), slice(3, 8))]
    np.testing.assert_allclose(sum(loss for loss, *_ in parts), whole, rtol=1e-12)
    np.testing.assert_allclose(sum(c for _, c, _ in parts), count)


def test_all_masked_is_zero_with_gradient_zero():
    arguments = list(example())
    arguments[8] = np.zeros(N, bool)
    for objective in (Objective(), Objective(policy_term="sequence_ratio", importance="sequence_ratio", aggregation="batch_tokens")):
        loss, count, sums = evaluate(arguments, objective)
        assert loss == 0 and count == 0 and not any(np.any(x) for x in sums.values())
        assert not np.any(gradient(objective, arguments))


def test_on_policy_the_ratio_is_exactly_one():
    arguments = list(example(np.float32))
    arguments[1] = arguments[0]
    _, _, sums = evaluate(arguments, Objective())
    np.testing.assert_array_equal(sums["ratio"], sums["token_count"])
    assert not np.any(sums["clipped"]) and not np.any(sums["old_kl"])


def test_huge_gaps_stay_finite():
    arguments = list(example(np.float32))
    arguments[0] = np.full((N, T), -1e4, np.float32)
    reinforce = Objective(importance="sequence_ratio", policy_term="log_prob")
    for objective in (Objective(), reinforce, Objective(correction=Correction("sequence"))):
        assert np.isfinite(evaluate(arguments, objective)[0])


def test_a_coefficient_without_a_reference_shows():
    arguments = list(example())
    arguments[3] = None
    assert np.isnan(evaluate(arguments, Objective())[0])
    arguments[6] = np.zeros(N)
    assert np.isfinite(evaluate(arguments, Objective())[0])


@pytest.mark.parametrize("part", ["aggregation", "importance", "policy_term", "kl_estimator", "kl_in"])
def test_unknown_parts_are_named(part):
    with pytest.raises(ValueError, match=f"{part} is 'nonsense', must be"):
        evaluate(example(), dataclasses.replace(Objective(), **{part: "nonsense"}))
