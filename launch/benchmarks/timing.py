"""How long calls take, in turn, so that everybody meets the same machine."""

import time
from typing import Any, Callable, Mapping


class EndedError(RuntimeError):
    """A contestant ended, or took too long: there will be no more rounds of it."""


def secs(call: Callable[[], object]) -> float:
    """Returns the seconds of one call, which must not return before its work is done."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_turn(rounds: int, contestants: Mapping[str, Callable[[int], Any]]) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """Lets everybody work once a round; a first round, which compiles and warms up, is not counted. Who ends is left out from then on.

    Args:
        rounds: that count.
        contestants: name -> what does the work under a seed and returns what is measured of it.

    Returns:
        ({name: measurements, round by round}, {name of who ended: why}).
    """
    found: dict[str, list[Any]] = {name: [] for name in contestants}
    ended: dict[str, str] = {}
    for seed in range(rounds + 1):
        for name, work in contestants.items():
            if name in ended:
                continue
            try:
                value = work(seed)
            except EndedError as error:
                ended[name] = str(error)
                continue
            if seed:
                found[name].append(value)
    return found, ended


def ratios(numerators: list[float], denominators: list[float]) -> list[float]:
    """Returns the ratio of two measurements, for each round that both have."""
    return [a / b for a, b in zip(numerators, denominators)]
