"""What the machine could do (launch/benchmarks/ceilings.py), on the same protocol as the peers."""

import importlib
import pathlib
import sys

import protocol  # beside this file

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))


def main() -> None:
    """Answers rounds."""
    benchmark, job = protocol.asked()
    work = importlib.import_module(f"launch.benchmarks.{benchmark}").ceiling(job)  # the others would only take memory
    for seed in protocol.rounds():
        protocol.answer(**work(seed))


if __name__ == "__main__":
    main()
