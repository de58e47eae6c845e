"""Ourselves, and the machine at its ceiling, on the same protocol as the peers: so memory and cold starts are counted alike.

    own_driver.py FUNCTION BENCHMARK --num_prompts=8 …        the function of launch/benchmarks/BENCHMARK.py that does the work (`peers.OWN`)
"""

import importlib
import pathlib
import sys

_WHO = sys.argv.pop(1)  # the rest of the line is every driver's

import protocol  # noqa: E402  (beside this file)

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))


def main() -> None:
    """Answers rounds."""
    benchmark, job = protocol.asked()
    work = getattr(importlib.import_module(f"launch.benchmarks.{benchmark}"), _WHO)(job)  # the other benchmarks would only take memory
    for seed in protocol.rounds():
        protocol.answer(**work(seed))


if __name__ == "__main__":
    main()
