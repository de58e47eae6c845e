"""What the estimators must compute, written as plain loops over Python floats: no segments, no merging, no running moments.

A history is given as the list of all past rewards of each preference group, so the oracle shares no formula with the package
beyond the definitions of mean and deviation. `estimate` is GRPO and P-GRPO on one batch; `every_step` is every option, over several
batches, with a weight beside each past reward.
"""

import dataclasses
import math
from typing import Iterator, NamedTuple

import jax.numpy as jnp
import numpy as np

from pgrpo_jax.algorithms import advantages
from pgrpo_jax.algorithms.advantages import AdvantageSettings
from pgrpo_jax.algorithms.memory import Memory

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


# --- every option, over several batches

K, P, ROWS = 3, 5, 24  # preference groups, prompts, rows of `random_steps`
Past = list[list[tuple[float, float]]]  # of one preference group: for each batch, (reward, weight)


class Step(NamedTuple):
    """One batch, in the order of the arguments of `advantages.estimate`."""

    rewards: np.ndarray
    prompt_index: np.ndarray
    preference_ids: np.ndarray
    history_ids: np.ndarray
    staleness: np.ndarray
    mask: np.ndarray


def random_steps(seed: int, count: int, *, dtype: type = np.float64, components: int = 0) -> Iterator[Step]:
    """Batches with garbage under the mask. History rows are those of strangers (a cyclic shift); one is absent from every other batch.

    Rewards are [ROWS], or [ROWS, components]; float32 holds them exactly.
    """
    rng = np.random.default_rng([seed, count])
    for number in range(count):
        prompts = rng.integers(0, P - 1, ROWS)
        prompts[0] = P - 1  # alone
        ids = rng.integers(0, K - number % 2, P)[prompts]
        rewards = rng.normal(ids[:, None], 1.0 + ids[:, None], (ROWS, max(components, 1))).astype(np.float32)
        staleness, mask = rng.integers(0, 5, ROWS), rng.random(ROWS) < 0.85
        columns = [prompts, ids, (ids + 1) % K, staleness]
        for column in columns:
            column[~mask] = rng.choice([-(10**6), -1, 0, 10**6], (~mask).sum())
        rewards[~mask] = rng.choice([np.nan, np.inf, 1e9], ((~mask).sum(), 1))
        yield Step((rewards if components else rewards[:, 0]).astype(dtype), *(column.astype(np.int32) for column in columns), mask)


def weighted(pairs: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Total weight, mean and Σ w (R − mean)² of (reward, weight) pairs; zeros where nothing weighs anything."""
    total = math.fsum(w for _, w in pairs)
    if total == 0:
        return 0.0, 0.0, 0.0
    mean = math.fsum(w * r for r, w in pairs) / total
    return total, mean, math.fsum(w * (r - mean) ** 2 for r, w in pairs)


def remember(past: Past, arrived: list[tuple[float, float]], memory: Memory) -> Past:
    """What a memory keeps of one preference group, as a list."""
    if memory.kind == "window":
        return (past + [arrived])[-int(memory.length) :] if arrived else past
    passed = {"cumulative": 0.0, "ema": math.fsum(w for _, w in arrived), "discounted": 1.0}[memory.kind]
    fade = 0.5 ** (passed / memory.length) if passed else 1.0
    return [[(r, w * fade) for r, w in batch] for batch in past] + [arrived]


def shrunk(own: tuple[float, float, float], everyone: tuple[float, float, float], size: float) -> tuple[float, float, float]:
    """Moments of one's own rewards and `size` rewards distributed like everyone's."""
    if not size or not everyone[0]:
        return own
    total = own[0] + size
    mean = (own[0] * own[1] + size * everyone[1]) / total
    spread = size * (everyone[2] / everyone[0] + (everyone[1] - mean) ** 2)
    return total, mean, own[2] + own[0] * (own[1] - mean) ** 2 + spread


def deviation(moments: tuple[float, float, float], sample: bool) -> float:
    """Deviation, with n − 1 if asked for; 0 where there is nothing to divide by."""
    divisor = moments[0] - 1 if sample else moments[0]
    return math.sqrt(moments[2] / divisor) if divisor > 0 else 0.0


def compare(reward: float, same: list[float], batch: list[float], history: tuple[float, float, float], s: AdvantageSettings) -> float:
    """(reward − baseline) / scale of one completion; `same` are the rewards of its prompt, its own included."""
    own, whole = (weighted([(r, 1.0) for r in values]) for values in (same, batch))
    others = (math.fsum(same) - reward) / (len(same) - 1) if len(same) > 1 else reward
    mixed = s.blend * own[1] + (1 - s.blend) * history[1]
    baseline = {"none": 0.0, "cohort": own[1], "leave_one_out": others, "batch": whole[1], "history": mixed}[s.baseline]
    sigma = max(deviation(history, s.sample), s.std_floor)
    scales = {"cohort": deviation(own, s.sample), "batch": deviation(whole, s.sample), "history": sigma}
    return (reward - baseline) / (scales[s.scale] + s.epsilon if s.scale != "none" else 1.0)


def one_step(step: Step, past: list[Past], s: AdvantageSettings) -> tuple[np.ndarray, np.ndarray, list[Past]]:
    """([ROWS] advantages; [K] what each history counts for as it is used; the pasts after the batch) of rewards [ROWS]."""
    kept = [i for i in range(len(step.mask)) if step.mask[i]]
    reward = {i: float(step.rewards[i]) for i in kept}
    arrived: Past = [[] for _ in past]
    for i in kept:
        age = int(step.staleness[i])
        if not s.staleness_limit or age < s.staleness_limit:
            arrived[step.history_ids[i]].append((reward[i], 0.5 ** (age / s.staleness_half_life) if s.staleness_half_life else 1.0))
    after = [remember(*pair, s.memory) for pair in zip(past, arrived, strict=True)]
    flat = [[pair for batch in rows for pair in batch] for rows in (past if s.timing == "before" else after)]
    everyone = weighted([pair for pairs in flat for pair in pairs])
    used = [shrunk(weighted(pairs), everyone, s.shrinkage) for pairs in flat]
    advantages, enough = np.zeros(len(step.mask)), max(s.min_count, 1)
    own_terms = dataclasses.replace(s, baseline="cohort", scale="cohort")
    for i in kept:
        context = reward[i], [reward[j] for j in kept if step.prompt_index[j] == step.prompt_index[i]], list(reward.values())
        history = used[step.history_ids[i]]
        advantages[i] = compare(*context, history, s)
        if "history" in (s.baseline, s.scale) and history[0] < enough:
            grpo = compare(*context, history, own_terms)
            pooled = compare(*context, everyone, s) if everyone[0] >= enough else grpo
            advantages[i] = {"cohort": grpo, "zero": 0.0, "pooled": pooled}[s.cold_start]
    return advantages, np.array([moments[0] for moments in used]), after


def every_step(steps: list[Step], s: AdvantageSettings) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each step ([ROWS] advantages; [K] effective counts; [K, 3] total weight, mean, m2 of what is remembered after it).

    With components, advantages are their weighted sum and the other two those of the first.
    """
    if s.component_weights:
        alone = dataclasses.replace(s, component_weights=())
        apart = [every_step([step._replace(rewards=step.rewards[:, c]) for step in steps], alone) for c in range(len(s.component_weights))]
        sums = [sum(w * found[0] for w, found in zip(s.component_weights, rows, strict=True)) for rows in zip(*apart, strict=True)]
        return [(total, *first[1:]) for total, first in zip(sums, apart[0], strict=True)]
    past, found = [[] for _ in range(K)], []
    for step in steps:
        advantages, counts, past = one_step(step, past, s)
        found.append((advantages, counts, np.array([weighted([pair for batch in rows for pair in batch]) for rows in past])))
    return found
