"""What the estimators must compute, written as plain loops over Python floats: no segments, no merging, no running moments.

A history is given as the list of all past rewards of each preference group, so the oracle shares no formula with the package
beyond the definitions of mean and population deviation.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from pgrpo_jax.algorithms import advantages
from pgrpo_jax.algorithms.advantages import AdvantageSettings

PARTS = {"grpo": ("cohort", "cohort"), "p_grpo": ("history", "history")}  # baseline, scale


class Case(NamedTuple):
    """Arguments of an estimator, and the past rewards its history summarises."""

    rewards: np.ndarray
    prompt_index: np.ndarray
    preference_ids: np.ndarray
    mask: np.ndarray
    past: list[list[float]]
    num_prompts: int


def random_case(seed: int, dtype: type, *, rows: int = 48, prompts: int = 7, preference_groups: int = 5) -> Case:
    """Rows in random order (the completions of a prompt lie anywhere), uneven sizes, garbage under the mask.

    Preference group 1 is cold, the last but one has no past, the last has neither past nor rows; prompt 0 has one completion,
    all completions of prompt 1 earn the same, the last prompt has none.
    """
    rng = np.random.default_rng([seed, rows])
    preference_of_prompt = rng.integers(0, preference_groups - 1, prompts)
    preference_of_prompt[:4] = np.arange(4) % (preference_groups - 1)
    prompt_index = rng.integers(1, prompts - 1, rows)
    prompt_index[rng.integers(rows)] = 0
    rewards = rng.normal(0.4, 1.0, rows) + 0.5 * prompt_index
    rewards[prompt_index == 1] = 0.7
    mask = rng.random(rows) < 0.85
    mask[prompt_index == 0] = True
    preference_ids = preference_of_prompt[prompt_index]
    rewards[~mask] = rng.choice([np.nan, np.inf, 1e9], (~mask).sum())
    prompt_index[~mask] = rng.choice([-1, 0, prompts, 10**6], (~mask).sum())
    preference_ids[~mask] = rng.choice([-1, 0, preference_groups, 10**6], (~mask).sum())
    sizes = [40, 3, 25, 0, 0] if preference_groups == 5 else [40] * preference_groups
    past = [list(rng.normal(k, 0.5 + k, size).astype(dtype).astype(float)) for k, size in enumerate(sizes)]
    ids = prompt_index.astype(np.int32), preference_ids.astype(np.int32)
    return Case(rewards.astype(dtype), *ids, mask, past, prompts)


def moments(values: list[float]) -> tuple[int, float, float]:
    """Count, mean and population deviation; zeros for an empty list."""
    if not values:
        return 0, 0.0, 0.0
    mean = math.fsum(values) / len(values)
    return len(values), mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))


def estimate(case: Case, *, epsilon: float, std_floor: float, min_count: int) -> dict[str, np.ndarray]:
    """Both advantages, the history after the batch and the diagnostics, as float64 arrays."""
    rows, num_preference_groups = len(case.rewards), len(case.past)
    own, against_history, scales, biases = np.zeros((4, rows))
    of_batch: list[list[int]] = [[] for _ in range(num_preference_groups)]
    for i in range(rows):
        if not case.mask[i]:
            continue
        reward, p = float(case.rewards[i]), int(case.preference_ids[i])
        of_batch[p].append(i)
        same = [float(case.rewards[j]) for j in range(rows) if case.mask[j] and case.prompt_index[j] == case.prompt_index[i]]
        _, mean, deviation = moments(same)
        count, past_mean, past_deviation = moments(case.past[p])
        divisor = max(past_deviation, std_floor) + epsilon
        own[i] = (reward - mean) / (deviation + epsilon)
        warm = count >= min_count
        against_history[i] = (reward - past_mean) / divisor if warm else own[i]
        scales[i] = (deviation + epsilon) / divisor if warm else 0.0
        biases[i] = (mean - past_mean) / divisor if warm else 0.0
    batch = [[float(case.rewards[i]) for i in of_batch[p]] for p in range(num_preference_groups)]
    result = {"grpo": own, "p_grpo": against_history}
    result["history"] = np.array([moments(case.past[p] + batch[p]) for p in range(num_preference_groups)])
    result["batch"] = np.array([moments(values) for values in batch])
    result["past"] = np.array([moments(values) for values in case.past])
    result["advantage_scale"], result["bias"] = [
        np.array([np.mean(x[members]) if members else 0.0 for members in of_batch]) for x in (scales, biases)
    ]
    return result


def assert_close(actual, expected: np.ndarray, *, tolerance: float, what: str) -> None:
    """Raises AssertionError unless |actual − expected| <= tolerance · max(1, max |expected|), NaN never equal."""
    actual = np.asarray(actual, np.float64)
    error = np.abs(actual - expected)
    bound = tolerance * max(1.0, float(np.max(np.abs(expected), initial=0.0)))
    assert actual.shape == expected.shape and np.all(error <= bound), f"{what}: {actual} is not {expected}, off by {error.max()}"


def assert_matches(result, case: Case, name: str, *, tolerance: float, **options) -> None:
    """Compares (advantages, history, diagnostics) of estimator `name` with the loops above."""
    advantages, history, diagnostics = result
    expected = estimate(case, **options)
    assert_close(advantages, expected[name], tolerance=tolerance, what="advantages")
    assert np.all(np.asarray(advantages)[~case.mask] == 0)
    deviation = np.sqrt(np.asarray(history.m2, np.float64) / np.maximum(np.asarray(history.count), 1))
    reported = {
        "history": (history.count, history.mean, deviation),
        "batch": (diagnostics.batch_count, diagnostics.batch_mean, diagnostics.batch_std),
        "past": (diagnostics.history_count, diagnostics.history_mean, diagnostics.history_std),
    }
    for key, columns in reported.items():
        for column, values in enumerate(columns):
            assert_close(values, expected[key][:, column], tolerance=tolerance, what=f"{key}, column {column}")
    for key in ("advantage_scale", "bias"):
        assert_close(getattr(diagnostics, key), expected[key], tolerance=tolerance, what=key)


def settings_of(name: str, *, epsilon: float, std_floor: float, min_count: float) -> AdvantageSettings:
    """The settings of GRPO or P-GRPO."""
    baseline, scale = PARTS[name]
    return AdvantageSettings(baseline=baseline, scale=scale, epsilon=epsilon, std_floor=std_floor, min_count=float(min_count))


def named(name: str):
    """GRPO or P-GRPO as a function of (rewards, prompt_index, preference_ids, mask, history)."""

    def run(rewards, prompt_index, preference_ids, mask, history, *, num_prompts, epsilon, std_floor, min_count, axis_name=None):
        settings = settings_of(name, epsilon=epsilon, std_floor=std_floor, min_count=min_count)
        rows = rewards, prompt_index, preference_ids, preference_ids, jnp.zeros_like(preference_ids), mask
        return advantages.estimate(*rows, history, settings=settings, num_prompts=num_prompts, axis_name=axis_name)

    return run


grpo, p_grpo = named("grpo"), named("p_grpo")
ESTIMATORS = {"grpo": grpo, "p_grpo": p_grpo}
