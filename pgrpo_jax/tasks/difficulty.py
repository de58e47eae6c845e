"""How hard prompts are for a policy: mean and deviation of the rewards its answers earned, kept as a JSON file beside the runs.

The file maps a prompt's id to {"mean": …, "std": …, "count": …}. Estimates belong to the prompts they were made of: `prompt_id` is unique within
a task *as loaded*, and `movielens` writes other prompts under the same ids for another seed or another number of tastes, so measure and use
them under one seed.
"""

import json
import math
from typing import Any, Iterable, Mapping, NamedTuple

from etils import epath
import numpy as np

from pgrpo_jax.structs import Rollouts


class Estimate(NamedTuple):
    """Rewards of the answers to one prompt.

    Attributes:
        mean: reward.
        std: population deviation of the rewards.
        count: answers judged, at least 1.
    """

    mean: float
    std: float
    count: int


def measure(rollouts: Iterable[Rollouts]) -> dict[str, Estimate]:
    """Estimates the difficulty of every prompt that was answered.

    Args:
        rollouts: units of work of any steps; a prompt that occurs in several is one prompt.

    Returns:
        prompt_id -> estimate, sorted by id. A prompt whose completions were all dropped has none.

    Raises:
        ValueError: a reward is not finite.
    """
    rewards: dict[str, list[float]] = {}
    for unit in rollouts:
        for prompt, reward in zip(unit.prompt_index.tolist(), unit.rewards.tolist(), strict=True):
            if not math.isfinite(reward):
                raise ValueError(f"reward of prompt {unit.prompt_records[prompt].prompt_id} is {reward}, not finite: fix the task's reward")
            rewards.setdefault(unit.prompt_records[prompt].prompt_id, []).append(reward)
    return {name: Estimate(float(np.mean(found)), float(np.std(found)), len(found)) for name, found in sorted(rewards.items())}


def merge(*parts: Mapping[str, Estimate]) -> dict[str, Estimate]:
    """Merges estimates of different rollouts (Chan et al. 1979): as if `measure` had seen all of them.

    Args:
        *parts: prompt_id -> estimate; the same rollouts in two parts would count twice.

    Returns:
        prompt_id -> estimate, sorted by id.
    """
    merged: dict[str, Estimate] = {}
    for part in parts:
        for name, new in part.items():
            merged[name] = _merged(merged[name], new) if name in merged else new
    return dict(sorted(merged.items()))


def write(path: epath.PathLike, estimates: Mapping[str, Estimate]) -> None:
    """Writes estimates as JSON.

    Args:
        path: of the file; its directory exists.
        estimates: prompt_id -> estimate.
    """
    document = {name: estimate._asdict() for name, estimate in sorted(estimates.items())}
    epath.Path(path).write_text(json.dumps(document, indent=0, ensure_ascii=True) + "\n")


def read(path: epath.PathLike) -> dict[str, Estimate]:
    """Reads the estimates that `write` wrote, or a file like it.

    Args:
        path: of the file.

    Returns:
        prompt_id -> estimate, in the file's order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no JSON object of estimates; the entry at fault is named.
    """
    path = epath.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: measure the difficulty of the prompts first, or name another file")
    try:
        document = json.loads(path.read_text())
    except ValueError as error:  # bytes that are no UTF-8, text that is no JSON
        raise ValueError(f"{path} is no JSON ({error}): measure the difficulty of the prompts again") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path} holds a {type(document).__name__}, not an object of prompt ids: measure the difficulty of the prompts again")
    return {name: _read(f"{path}: {name!r}", entry) for name, entry in document.items()}


def _read(place: str, entry: Any) -> Estimate:
    remedy = 'write {"mean": …, "std": …, "count": …} with finite numbers, std at least 0 and count a whole number from 1'
    if not isinstance(entry, dict) or set(entry) != set(Estimate._fields):
        raise ValueError(f"{place} is {entry!r}: {remedy}")
    found = Estimate(**entry)
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) for value in found)
    if not numbers or found.std < 0 or found.count < 1 or found.count != int(found.count):
        raise ValueError(f"{place} is {entry!r}: {remedy}")
    return Estimate(float(found.mean), float(found.std), int(found.count))


def _merged(one: Estimate, other: Estimate) -> Estimate:
    count = one.count + other.count
    away = other.mean - one.mean
    mean = one.mean + away * other.count / count
    m2 = one.std**2 * one.count + other.std**2 * other.count + away**2 * one.count * other.count / count
    return Estimate(mean, math.sqrt(m2 / count), count)
