"""Ourselves without refill: the same engine, batch after batch, each until its last completion has ended."""

import pathlib
import sys

import protocol  # beside this file

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from launch.benchmarks import generation  # noqa: E402


def main() -> None:
    """Answers rounds."""
    _, job = protocol.asked()
    work = generation.batches(job)
    for seed in protocol.rounds():
        protocol.answer(**work(seed))


if __name__ == "__main__":
    main()
