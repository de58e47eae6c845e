"""The table of biases: what theory fixes is met, and one cell is the loop over all answers."""

import functools
import math

import numpy as np

from pgrpo_jax.algorithms.importance import Correction
from pgrpo_jax.laboratory import sequences, truncation

SIZES = truncation.Sizes(length=3, num_tokens=3, spread=1.0)
SEEDS = range(6)
CORRECTIONS = {
    "none": Correction(), "token": Correction("token", high=math.inf), "sequence": Correction("sequence", high=math.inf),
    "2": Correction("sequence", high=2.0), "5": Correction("sequence", high=5.0), "mask": Correction("sequence", "mask", low=0.5, high=2.0),
}  # fmt: skip


@functools.cache
def found():
    return truncation.table(CORRECTIONS, (0.0, 0.5, 1.0), SEEDS, SIZES)


def mean(name, distance, part="bias"):
    return found()[name][distance][part]["mean"]


def test_on_policy_no_correction_is_biased():
    for name in CORRECTIONS:
        assert mean(name, 0.0) < 1e-5
        assert abs(mean(name, 0.0, "deviation") / mean("none", 0.0, "deviation") - 1) < 1e-5
    assert mean(truncation.GAP, 0.0, "gap") < 1e-6


def test_only_the_unbounded_weight_of_the_completion_has_no_bias():
    for distance in (0.5, 1.0):
        assert mean("sequence", distance) < 1e-4
        assert all(mean(name, distance) > 0.01 for name in CORRECTIONS if name != "sequence" and not (name == "5" and distance == 0.5))
    assert mean("none", 0.5) < mean("none", 1.0) and mean(truncation.GAP, 0.5, "gap") < mean(truncation.GAP, 1.0, "gap")


def test_a_bound_buys_less_scatter_with_more_bias():
    assert mean("sequence", 1.0) < mean("5", 1.0) < mean("2", 1.0) < mean("mask", 1.0)
    assert mean("sequence", 1.0, "deviation") > mean("5", 1.0, "deviation") > mean("2", 1.0, "deviation") > mean("mask", 1.0, "deviation")


def test_one_cell_is_the_loop_over_all_answers():
    """∇ of −A·w·log π(c) by the logits, answer by answer, for one seed and the weight of the completion truncated at 2."""
    policy, sampler, rewards = (np.asarray(x, np.float64) for x in truncation._world(SIZES, np.float32(1.0), np.int32(3)))
    every = sequences.every_completion(3, 3)

    def walk(logits, completion):
        total, gradient, before = 0.0, np.zeros_like(logits), 0
        for t, token in enumerate(completion):
            probabilities = np.exp(logits[0, t, before]) / np.exp(logits[0, t, before]).sum()
            total += math.log(probabilities[token])
            gradient[0, t, before] = (np.arange(3) == token) - probabilities
            before = token
        return total, gradient.ravel()

    own, scores = zip(*(walk(policy, c) for c in every))
    sampled = np.exp([walk(sampler, c)[0] for c in every])
    centre = sampled @ rewards
    advantages = (rewards - centre) / math.sqrt(sampled @ (rewards - centre) ** 2)
    exact = -(np.exp(own) * advantages) @ np.array(scores)
    each = -(np.minimum(np.exp(own) / sampled, 2.0) * advantages)[:, None] * np.array(scores)
    expected = sampled @ each
    errors = truncation._errors(CORRECTIONS["2"], SIZES, np.float32(1.0), np.array([3], np.int32))
    np.testing.assert_allclose(errors.bias[0], np.linalg.norm(expected - exact) / np.linalg.norm(exact), rtol=1e-3)
    deviation = math.sqrt(sampled @ ((each - expected) ** 2).sum(axis=1))
    np.testing.assert_allclose(errors.deviation[0], deviation / np.linalg.norm(exact), rtol=1e-3)
