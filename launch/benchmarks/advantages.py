"""Microseconds of the learner's advantage kernel, rewards and histories in and out of the host, against a loop in NumPy and a plain copy."""

from typing import Any

import jax
import numpy as np

from launch.benchmarks.timing import in_turn, ratios, secs
from pgrpo_jax import parallel
from pgrpo_jax.algorithms import reward_history
from pgrpo_jax.algorithms.advantages import AdvantageSettings
from pgrpo_jax.structs import RewardHistory

REWARDS, PREFERENCE_GROUPS, COMPLETIONS_PER_PROMPT = 4096, 256, 8
SETTINGS = AdvantageSettings()
_CALLS = 20  # of a round


def batch(seed: int, rewards: int, preference_groups: int) -> tuple[np.ndarray, ...]:
    """Returns the kernel's arguments but for the history: rewards [B] float32, prompt_index, preference_ids, history_ids, staleness, mask."""
    rng, prompts = np.random.default_rng(seed), rewards // COMPLETIONS_PER_PROMPT
    index = np.repeat(np.arange(prompts, dtype=np.int32), COMPLETIONS_PER_PROMPT)
    ids = rng.integers(0, preference_groups, prompts).astype(np.int32)[index]
    return rng.random(rewards, np.float32), index, ids, ids, np.zeros(rewards, np.int32), np.ones(rewards, bool)


def in_numpy(rewards: np.ndarray, prompt_index: np.ndarray, history_ids: np.ndarray, history: RewardHistory) -> tuple[np.ndarray, RewardHistory]:
    """P-GRPO as one would write it down: a loop over preference groups, another over the prompts of those whose history is cold.

    Args:
        rewards: [B] float32.
        prompt_index: [B] int.
        history_ids: [B] int.
        history: of weight 1, [K].

    Returns:
        (advantages [B], the history after the batch).
    """
    advantages = np.zeros_like(rewards)
    count, mean, m2 = (np.array(x) for x in (history.count, history.mean, history.m2))
    for row in np.unique(history_ids):
        of_row = history_ids == row
        if count[row] >= SETTINGS.min_count:
            deviation = np.sqrt(m2[row] / count[row])
            advantages[of_row] = (rewards[of_row] - mean[row]) / (max(deviation, SETTINGS.std_floor) + SETTINGS.epsilon)
        else:
            for prompt in np.unique(prompt_index[of_row]):
                place = prompt_index == prompt
                advantages[place] = (rewards[place] - rewards[place].mean()) / (rewards[place].std() + SETTINGS.epsilon)
        added, between = of_row.sum(), rewards[of_row].mean() - mean[row]
        total = count[row] + added
        m2[row] += ((rewards[of_row] - rewards[of_row].mean()) ** 2).sum() + between**2 * count[row] * added / total
        mean[row] += between * added / total
        count[row] = total
    return advantages, RewardHistory(count=count, weight=np.ones_like(mean), mean=mean, m2=m2)


def copies(tree: Any) -> None:
    """Copies every array into fresh memory."""
    for leaf in jax.tree.leaves(tree):
        np.array(leaf)


def measure(rounds: int, rewards: int = REWARDS, preference_groups: int = PREFERENCE_GROUPS) -> dict[str, list[float]]:
    """Returns microseconds of a call of everybody, and the kernel's speed as a multiple of the others', round by round.

    Args:
        rounds: that count.
        rewards: B of a batch.
        preference_groups: K.
    """
    kernel = parallel.advantage_kernel(SETTINGS, jax.devices()[:1], num_prompts=rewards // COMPLETIONS_PER_PROMPT)
    history = jax.device_get(reward_history.init(preference_groups, np.float32))
    for seed in range(100, 104):  # most histories are warm then
        history = kernel(*batch(seed, rewards, preference_groups), history)[1]
    moved = (batch(0, rewards, preference_groups), history, kernel(*batch(0, rewards, preference_groups), history))
    works = {
        "kernel": lambda arguments: kernel(*arguments, history),
        "NumPy loop": lambda arguments: in_numpy(arguments[0], arguments[1], arguments[3], history),
        "copy": lambda arguments: copies(moved),
    }

    def microseconds(work: Any, seed: int) -> float:
        arguments = batch(seed, rewards, preference_groups)
        return 1e6 * secs(lambda: [work(arguments) for _ in range(_CALLS)]) / _CALLS

    times, _ = in_turn(rounds, {name: lambda seed, work=work: microseconds(work, seed) for name, work in works.items()})
    return {
        **{f"{name}, µs": values for name, values in times.items()},
        **{f"kernel / {name}, speed": ratios(times[name], times["kernel"]) for name in ("NumPy loop", "copy")},
    }
