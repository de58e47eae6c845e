"""Presets are data with bounds; each one's loss and gradient on an example written out in docs/algorithm.md, "By hand: the objective"."""

import dataclasses
import math

import jax
import numpy as np
import objective_oracle as oracle
import pytest

from pgrpo_jax.algorithms import presets, reward_history
from pgrpo_jax.algorithms.advantages import AdvantageSettings, estimate
from pgrpo_jax.algorithms.objective import policy_loss

# Two prompts, two completions each, of 2, 1, 1 and 1 tokens; the ratio to the old policy is 2, 1/8, 1/2, 1 and 1.
MASK = np.array([[1, 1], [1, 0], [1, 0], [1, 0]], bool)
PROMPTS = np.array([0, 0, 1, 1], np.int32)
REWARDS = np.array([1.0, 0.0, 1.0, 1.0])
CURRENT = np.log(np.array([[1 / 2, 1 / 16], [1 / 4, 1], [1 / 2, 1], [1 / 2, 1]]))
OLD = np.log(np.array([[1 / 4, 1 / 2], [1 / 2, 1], [1 / 2, 1], [1 / 2, 1]]))
REFERENCE = np.log(np.array([[1 / 2, 1 / 8], [1 / 4, 1], [1 / 2, 1], [1 / 2, 1]]))
PAST = np.array([0.0, 1.0, 0.0, 1.0])  # of the one preference group: mean 1/2, deviation 1/2

S = math.sqrt(3) / 4  # deviation of the four rewards, mean 3/4
LN2 = math.log(2)
# name -> (advantages, loss, gradient of the loss by each of the five log-probs): the table of the documentation
BY_HAND = {
    "grpo": ([1, -1, 0, 0], (-(1.2 + 1 / 8) / 2 + 0.04 * (1 - LN2) / 2 + 0.8) / 4, [0, -0.165 / 8, 0, 0, 0]),
    "p_grpo": ([1, -1, 1, 1], (-(1.2 + 1 / 8) / 2 + 0.04 * (1 - LN2) / 2 + 0.8 - 2) / 4, [0, -0.165 / 8, 0, -1 / 4, -1 / 4]),
    "dr_grpo": ([0.5, -0.5, 0, 0], (-(1.2 + 1 / 8) / 2 + 0.8 / 2) / 16, [0, -1 / 256, 0, 0, 0]),
    "dapo": ([1, -1, 0, 0], (-(1.28 + 1 / 8) + 0.8) / 5, [0, -1 / 40, 0, 0, 0]),
    "rloo": ([1, -1, 0, 0], 3 * LN2 / 4, [-1 / 4, -1 / 4, 1 / 4, 0, 0]),
    "reinforce": ([0.5, -0.5, 0, 0], LN2 / 32, [-1 / 32, -1 / 32, 1 / 16, 0, 0]),
    "reinforce_pp": (
        [0.25 / S, -0.75 / S, 0.25 / S, 0.25 / S],
        (-(1.2 + 1 / 8) / 4 / S + 0.6 / S - 0.5 / S + 0.01 * LN2**2 / 2) / 5,
        [0, (-1 / 32 / S - 0.01 * LN2) / 5, 0, -0.05 / S, -0.05 / S],
    ),
    "cispo": ([1, -1, 0, 0], 0.7 * LN2 / 6, [-1.2 / 6, -1 / 48, 1 / 12, 0, 0]),
    "gspo": ([1, -1, 0, 0], (-1 / 2 + 0.9997) / 4, [-1 / 16, -1 / 16, 0, 0, 0]),
}


@pytest.mark.parametrize("name", presets.PRESETS)
def test_the_example_of_the_documentation(name):
    expected, expected_loss, expected_gradient = BY_HAND[name]
    preset = presets.PRESETS[name]
    zeros, ones = np.zeros(4, np.int32), np.ones(4, bool)
    with jax.enable_x64(True):
        history = reward_history.batch_moments(PAST, zeros, ones, 1)
        settings = AdvantageSettings(baseline=preset.baseline, scale=preset.scale, epsilon=0.0, min_count=4.0)
        advantages, *_ = estimate(REWARDS, PROMPTS, zeros, zeros, zeros, ones, history, settings=settings, num_prompts=2)
        objective = dataclasses.replace(preset.objective, max_length=4)
        reference = REFERENCE if preset.kl_coefficient else None
        betas = np.full(4, preset.kl_coefficient)

        def loss(current):
            fixed = OLD, OLD, reference, np.zeros((4, 2)), advantages, betas, MASK, ones, PROMPTS
            total, count, _ = policy_loss(current, *fixed, objective=objective, num_prompts=2)
            return total / count

        advantages, (value, gradient) = jax.device_get((advantages, jax.value_and_grad(loss)(CURRENT)))
    np.testing.assert_allclose(advantages, expected, atol=1e-12)
    np.testing.assert_allclose(value, expected_loss, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(np.asarray(gradient)[MASK], expected_gradient, rtol=1e-9, atol=1e-12)
    total, count, _ = oracle.loop(objective, CURRENT, OLD, OLD, reference, np.zeros((4, 2)), advantages, betas, MASK, ones, PROMPTS)
    np.testing.assert_allclose(total / count, expected_loss, rtol=1e-9, atol=1e-12)


def test_clip_ranges_are_the_published_ones():
    """Those that the example does not reach too."""
    ppo = dict.fromkeys(("grpo", "p_grpo", "dr_grpo", "reinforce_pp"), (0.2, 0.2))
    published = ppo | {"dapo": (0.2, 0.28), "cispo": (1.0, 0.2), "gspo": (3e-4, 4e-4)}
    found = {name: (preset.objective.clip_low, preset.objective.clip_high) for name, preset in presets.PRESETS.items()}
    assert {name: found[name] for name in published} == published


def test_every_preset_holds_its_own_bounds():
    for name, preset in presets.PRESETS.items():
        assert presets.resolve(name) == preset


def test_p_grpo_differs_from_grpo_in_the_estimator_alone():
    assert dataclasses.replace(presets.PRESETS["p_grpo"], baseline="cohort", scale="cohort") == presets.PRESETS["grpo"]


def test_overrides_replace_and_none_keeps():
    overrides = {"clip_low": None, "clip_high": 0.28, "kl_coefficient": 0.0, "aggregation": "sum", "baseline": "cohort", "oversample": 3}
    preset = presets.resolve("p_grpo", **overrides)
    expected = dataclasses.replace(presets.PRESETS["grpo"].objective, clip_high=0.28, aggregation="sum")
    assert preset == presets.Preset(baseline="cohort", scale="history", objective=expected, kl_coefficient=0.0, oversample=3)


@pytest.mark.parametrize(
    "key, value",
    [("clip_low", 0.0), ("clip_low", 1.1), ("clip_low", math.nan), ("clip_high", -0.2), ("clip_high", math.inf), ("dual_clip", 0.5)]
    + [("kl_coefficient", -1e-9), ("kl_coefficient", math.nan), ("entropy_coefficient", -1.0)],
)
def test_values_out_of_bounds_are_one_line(key, value):
    with pytest.raises(ValueError, match=rf"^{key} is {value}, must be .*: set config.algorithm.{key}$"):
        presets.resolve("grpo", **{key: value})


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="^preset is 'pgrpo', must be one of cispo, dapo, dr_grpo, grpo, .*: set config.preset$"):
        presets.resolve("pgrpo")
    with pytest.raises(ValueError, match="^override 'clip' is unknown, must be one of baseline, scale, aggregation"):
        presets.resolve("grpo", clip=0.1)
    with pytest.raises(ValueError, match="^aggregation is 'mean', must be one of completion, .*: set config.algorithm.aggregation$"):
        presets.resolve("grpo", aggregation="mean")
    with pytest.raises(ValueError, match="^oversample is 1.5, must be a whole number of at least 1: set config.curation.oversample$"):
        presets.resolve("dapo", oversample=1.5)
