"""Every option of the estimators against lists of (reward, weight) in plain Python, and the properties that tie options to each other."""

import dataclasses
import math

import advantage_oracle as oracle
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgrpo_jax.algorithms import memory, preference_weights, reward_history
from pgrpo_jax.algorithms.advantages import AdvantageSettings, estimate
from pgrpo_jax.algorithms.memory import Memory
from pgrpo_jax.algorithms.preference_weights import PreferenceWeights

EXAMPLES = settings(max_examples=25, deadline=None, derandomize=True)
K, P, ROWS = 3, 4, 24
BASE = AdvantageSettings(epsilon=1e-3, std_floor=1e-2, min_count=4.0)


def batches(seed: int, count: int = 4):
    """Batches of (rewards, prompt_index, preference_ids, staleness, mask); preference group 2 is in every other one only."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        of_prompt = rng.integers(0, K - number % 2, P)
        prompts = rng.integers(0, P, ROWS).astype(np.int32)
        ids = of_prompt[prompts].astype(np.int32)
        yield rng.normal(ids, 1.0 + ids, ROWS), prompts, ids, rng.integers(0, 5, ROWS).astype(np.int32), rng.random(ROWS) < 0.9


def weighted(values):
    """(total weight, mean, m2) of (reward, weight) pairs."""
    total = math.fsum(w for _, w in values)
    if total == 0:
        return 0.0, 0.0, 0.0
    mean = math.fsum(w * r for r, w in values) / total
    return total, mean, math.fsum(w * (r - mean) ** 2 for r, w in values)


def deviation(moments, s, floor=0.0):
    total, _, m2 = moments
    divisor = total - 1 if s.deviation == "sample" else total
    return max(math.sqrt(m2 / divisor) if divisor > 0 and total > (1 if s.deviation == "sample" else 0) else 0.0, floor)


def loops(steps, s: AdvantageSettings):
    """Advantages of every step, by keeping all past rewards with their weights; returns them and the last pasts."""
    past, found = [[] for _ in range(K)], []
    for rewards, prompts, ids, staleness, mask in steps:
        rows = [i for i in range(ROWS) if mask[i]]
        arrived = [[] for _ in range(K)]
        for i in rows:
            weight = 2.0 ** (-staleness[i] / s.staleness_half_life) if s.staleness_half_life else 1.0
            if not s.staleness_limit or staleness[i] < s.staleness_limit:
                arrived[ids[i]].append((rewards[i], weight))
        merged = []
        for k in range(K):
            seen = math.fsum(w for _, w in arrived[k])
            fade = {"ema": 2.0 ** (-seen / s.memory.length) if s.memory.kind == "ema" else 1, "discounted": 2.0 ** (-1 / (s.memory.length or 1))}
            factor = fade.get(s.memory.kind, 1.0)
            old = [(r, w * factor) for r, w in past[k]] if s.memory.kind != "window" else past[k]
            merged.append(old + ([arrived[k]] if s.memory.kind == "window" and arrived[k] else [] if s.memory.kind == "window" else arrived[k]))
            if s.memory.kind == "window":
                merged[k] = merged[k][-int(s.memory.length):]
        source = past if s.timing == "before" else merged
        flat = [[pair for slot in source[k] for pair in slot] if s.memory.kind == "window" else source[k] for k in range(K)]
        everyone = weighted([pair for k in range(K) for pair in flat[k]])
        used = []
        for k in range(K):
            total, mean, m2 = weighted(flat[k])
            if s.shrinkage and everyone[0] > 0:
                n0 = s.shrinkage
                joined = (total * mean + n0 * everyone[1]) / (total + n0)
                prior = everyone[2] * n0 / everyone[0]
                m2 = m2 + prior + total * (mean - joined) ** 2 + n0 * (everyone[1] - joined) ** 2
                total, mean = total + n0, joined
            used.append((total, mean, m2))
        batch = weighted([(rewards[i], 1.0) for i in rows])
        advantages = np.zeros(ROWS)
        for i in rows:
            same = [rewards[j] for j in rows if prompts[j] == prompts[i]]
            own = weighted([(r, 1.0) for r in same])

            def against(history):
                others = (sum(same) - rewards[i]) / (len(same) - 1) if len(same) > 1 else rewards[i]
                history_mean = s.blend * own[1] + (1 - s.blend) * history[1]
                baseline = {"none": 0.0, "cohort": own[1], "leave_one_out": others, "batch": batch[1], "history": history_mean}[s.baseline]
                scale = {
                    "none": 1.0, "cohort": deviation(own, s) + s.epsilon, "batch": deviation(batch, s) + s.epsilon,
                    "history": deviation(history, s, s.std_floor) + s.epsilon,
                }[s.scale]  # fmt: skip
                return (rewards[i] - baseline) / scale

            grpo = (rewards[i] - own[1]) / (deviation(own, s) + s.epsilon)
            advantages[i] = against(used[ids[i]])
            if "history" in (s.baseline, s.scale) and used[ids[i]][0] < max(s.min_count, 1):
                warm = everyone[0] >= max(s.min_count, 1)
                advantages[i] = {"cohort": grpo, "zero": 0.0, "pooled": against(everyone) if warm else grpo}[s.cold_start]
        found.append(advantages)
        past = merged
    return found


def run(steps, s: AdvantageSettings, dtype=np.float64):
    """The same through `estimate`, jitted."""
    with jax.enable_x64(dtype == np.float64):
        program = jax.jit(lambda *a: estimate(*a, settings=s, num_prompts=P))
        history, found = memory.init(s.memory, K, dtype), []
        for rewards, prompts, ids, staleness, mask in steps:
            advantages, history, _ = program(np.where(mask, rewards, np.nan).astype(dtype), prompts, ids, ids, staleness, mask, history)
            found.append(np.asarray(advantages))
        return found, jax.device_get(history)


OPTIONS = {
    "p_grpo": {}, "dr_grpo": {"baseline": "cohort", "scale": "none"}, "rloo": {"baseline": "leave_one_out", "scale": "none"},
    "batch": {"baseline": "batch", "scale": "batch"}, "none": {"baseline": "none", "scale": "none"},
    "scale only": {"baseline": "cohort", "scale": "history"}, "blend": {"blend": 0.3}, "after": {"timing": "after"},
    "sample": {"deviation": "sample"}, "zero": {"cold_start": "zero", "min_count": 12.0}, "pooled": {"cold_start": "pooled", "min_count": 12.0},
    "shrinkage": {"shrinkage": 5.0}, "ema": {"memory": Memory("ema", 6.0)}, "window": {"memory": Memory("window", 2.0)},
    "discounted": {"memory": Memory("discounted", 1.5)}, "stale": {"staleness_half_life": 2.0}, "limit": {"staleness_limit": 3},
    "all": {"memory": Memory("ema", 9.0), "shrinkage": 2.0, "blend": 0.5, "staleness_half_life": 3.0, "staleness_limit": 4, "timing": "after"},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_equals_the_loops(name):
    s = dataclasses.replace(BASE, **OPTIONS[name])
    steps = list(batches(1, 5))
    for found, expected in zip(run(steps, s)[0], loops(steps, s), strict=True):
        oracle.assert_close(found, expected, tolerance=1e-10, what=name)
    for found, expected in zip(run(steps, s, np.float32)[0], loops(steps, s), strict=True):
        oracle.assert_close(found, expected, tolerance=2e-5, what=f"{name}, float32")


def test_components_are_standardised_apart_and_weighted():
    s = dataclasses.replace(BASE, component_weights=(1.0, -0.5))
    steps, others = list(batches(2)), list(batches(3))
    with jax.enable_x64(True):
        history = memory.init(s.memory, K, np.float64, num_components=2)
        for (rewards, prompts, ids, staleness, mask), (second, *_) in zip(steps, others):
            both = np.stack([rewards, second], axis=1)
            found, history, diagnostics = estimate(both, prompts, ids, ids, staleness, mask, history, settings=s, num_prompts=P)
    paired = [(second, *rest) for (_, *rest), (second, *_) in zip(steps, others)]
    expected = loops(steps, BASE)[-1] - 0.5 * loops(paired, BASE)[-1]
    oracle.assert_close(found, expected, tolerance=1e-10, what="components")
    np.testing.assert_array_equal(diagnostics.batch_count, np.bincount(ids[mask], minlength=K))


def test_history_rows_may_be_other_peoples():
    """pooled is one preference group; diagnostics stay by the true one."""
    rewards, prompts, ids, staleness, mask = next(batches(4))
    zeros = np.zeros_like(ids)
    with jax.enable_x64(True):
        past = reward_history.batch_moments(np.arange(8.0), np.zeros(8, np.int32), np.ones(8, bool), K)
        pooled = estimate(rewards, prompts, ids, zeros, staleness, mask, past, settings=BASE, num_prompts=P)
        alone = estimate(rewards, prompts, zeros, zeros, staleness, mask, past, settings=BASE, num_prompts=P)
    np.testing.assert_array_equal(pooled[0], alone[0])
    np.testing.assert_array_equal(pooled[2].batch_count, np.bincount(ids[mask], minlength=K))
    assert pooled[1].count[0] == 8 + mask.sum() and not pooled[1].count[1:].any()


@pytest.mark.parametrize(
    "a, b",
    [
        ({"memory": Memory("window", 50.0)}, {}), ({"memory": Memory("ema", 1e9)}, {}), ({"memory": Memory("discounted", 1e9)}, {}),
        ({"blend": 1.0}, {"baseline": "cohort", "scale": "history"}), ({"shrinkage": 1e-12}, {}),
    ],
)  # fmt: skip
def test_limits_are_each_other(a, b):
    steps = list(batches(5, 6))
    first, second = [run(steps, dataclasses.replace(BASE, **changes))[0] for changes in (a, b)]
    for found, expected in zip(first, second):
        oracle.assert_close(found, expected, tolerance=1e-6, what=str(a))


def test_an_absent_preference_group_is_forgotten_only_by_the_clock():
    """After 40 updates without it: ema keeps its weight, discounted does not, window keeps its batch."""
    one = reward_history.batch_moments(np.float32([1.0, 3.0]), np.int32([0, 0]), np.ones(2, bool), 2)
    other = reward_history.batch_moments(np.float32([5.0]), np.int32([1]), np.ones(1, bool), 2)
    expected = {"cumulative": 2.0, "ema": 2.0, "window": 2.0, "discounted": 2.0 * 2.0 ** (-40 / 10)}
    for kind, weight in expected.items():
        m = Memory(kind, 10.0)
        history = memory.absorb(m, memory.init(m, 2), one)
        for _ in range(40):
            history = memory.absorb(m, history, other)
        found = memory.read(m, history)
        np.testing.assert_allclose(reward_history.effective_count(found)[0], weight, rtol=1e-5)
        np.testing.assert_allclose(found.mean[0], 2.0)
        np.testing.assert_allclose(reward_history.std(found)[0], 1.0, rtol=1e-5)


FINITE = st.floats(-100, 100, allow_nan=False)


@EXAMPLES
@given(kept=st.lists(FINITE, max_size=8), gone=st.lists(FINITE, min_size=1, max_size=8))
def test_removed_is_never_seen(kept, gone):
    def moments(values):
        rewards = np.zeros(8)
        rewards[: len(values)] = values
        return reward_history.batch_moments(rewards, np.zeros(8, np.int32), np.arange(8) < len(values), 1)

    with jax.enable_x64(True):
        never, part = moments(kept), moments(gone)
        after = reward_history.remove(reward_history.merge(never, part), part)
        for name in ("count", "weight", "mean", "m2"):
            np.testing.assert_allclose(getattr(after, name), getattr(never, name), rtol=1e-6, atol=1e-6, err_msg=name)
        if not kept:
            assert [float(x[0]) for x in (after.mean, after.m2, after.count)] == [0, 0, 0]
        with pytest.raises(ValueError, match="can not be taken out"):
            reward_history.remove(never, reward_history.merge(never, part))


@EXAMPLES
@given(values=st.lists(FINITE, min_size=2, max_size=8), scale=st.floats(0.1, 10), offset=FINITE)
def test_affine_moments_are_those_of_changed_rewards(values, scale, offset):
    with jax.enable_x64(True):
        rewards, zeros, ones = np.array(values), np.zeros(len(values), np.int32), np.ones(len(values), bool)
        found = reward_history.affine(reward_history.batch_moments(rewards, zeros, ones, 1), scale, offset)
        expected = reward_history.batch_moments(scale * rewards + offset, zeros, ones, 1)
        np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-9, atol=1e-8)
        np.testing.assert_allclose(found.m2, expected.m2, rtol=1e-7, atol=1e-7)


def test_preference_weights():
    means, counts = np.float32([0.8, 0.2, 0.5]), np.int32([12, 4, 0])
    for kind, raw in (("none", [1.0, 1.0]), ("balanced", [1 / 12, 1 / 4]), ("dro", [math.exp(-8), math.exp(-2)])):
        found = preference_weights.weights(PreferenceWeights(kind, 0.1), means, counts)
        mean = (12 * raw[0] + 4 * raw[1]) / 16
        np.testing.assert_allclose(found, [raw[0] / mean, raw[1] / mean, 1.0], rtol=1e-5)
        np.testing.assert_allclose(np.sum(np.asarray(found) * counts) / 16, 1.0, rtol=1e-6)
        np.testing.assert_array_equal(preference_weights.weights(PreferenceWeights(kind, 0.1), means, np.int32([0, 0, 0])), np.ones(3))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Memory("forever"), "memory is 'forever', must be one of cumulative, ema"), (lambda: Memory("ema"), "has length 0.0, must be above 0"),
        (lambda: Memory("window", 1.5), "must be a whole number of batches"),
        (lambda: AdvantageSettings(baseline="mean"), "baseline is 'mean', must be one of none, cohort"),
    ],
)  # fmt: skip
def test_wrong_names_and_lengths(make, message):
    with pytest.raises(ValueError, match=message):
        make()
