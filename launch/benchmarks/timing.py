"""How long calls take, in turn, so that everybody meets the same machine."""

import time
from typing import Callable, Mapping


def secs(call: Callable[[], object]) -> float:
    """Returns the seconds of one call, which must not return before its work is done."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_turn(rounds: int, contestants: Mapping[str, Callable[[int], float]]) -> dict[str, list[float]]:
    """Lets everybody work once a round; a first round, which compiles and warms up, is not counted.

    Args:
        rounds: that count.
        contestants: name -> what does the work under a seed and returns what is measured of it.

    Returns:
        name -> measurements, round by round.
    """
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for seed in range(rounds + 1):
        for name, work in contestants.items():
            value = work(seed)
            if seed:
                found[name].append(value)
    return found


def ratios(numerators: list[float], denominators: list[float]) -> list[float]:
    """Returns the ratio of two measurements, round by round."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]
