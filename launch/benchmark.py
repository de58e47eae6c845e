"""Measures speed as a ratio to a ceiling or a peer of the same run.

    python launch/benchmark.py NAME [--rounds=N] [--against=PEER,PEER] [--json=FILE]

    generation    tokens per second of sampling, against the model's bare matmuls and cache reads; peers: transformers, trl
    update        seconds of an update with reference log-probs, against the bare matmuls that it needs; peers: trl
    weights       publish → usable by an actor in another process, 1 GB, against one plain copy into fresh memory; with and without checksums
    overlap       steps per second at staleness (1, 2) against (1, 1), generation and update held up equally long
    actors        units per second of 1, 2, 4 and 8 actors whose generation takes a fixed time

Prints a table (median, least, greatest) and one JSON line. Nothing else should run meanwhile. The first two are of SmolLM2-135M's shape with random
weights, float32: 8 prompts of 64 tokens, 8 completions of 64 tokens each. Peers are installed into .peers/ at their first use (torch: minutes, 1 GB).
"""

import argparse
import json
import pathlib
import statistics
import sys
from typing import Mapping, Sequence

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from launch.benchmarks import generation, pipeline, update, weights  # noqa: E402
from launch.benchmarks.peers import PeerError  # noqa: E402

BENCHMARKS = {
    "generation": generation.measure, "update": update.measure,
    "weights": weights.measure, "overlap": pipeline.measure_overlap, "actors": pipeline.measure_actors,
}  # fmt: skip
PEERS = {"generation": ("transformers", "trl"), "update": ("trl",)}  # who can be measured against


def summarise(rows: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Returns {quantity: median, min, max} of repeated measurements."""
    return {name: {"median": statistics.median(xs), "min": min(xs), "max": max(xs), "n": len(xs)} for name, xs in rows.items()}


def main() -> None:
    """Runs one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each quantity")
    parser.add_argument("--against", default="", help="peers, with commas between")
    parser.add_argument("--json", type=pathlib.Path, help="file that the JSON line is appended to")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds={arguments.rounds} is below 1")
    against, known = [name for name in arguments.against.split(",") if name], PEERS.get(arguments.benchmark, ())
    if unknown := [name for name in against if name not in known]:
        parser.error(f"--against={unknown[0]}: {arguments.benchmark} knows {', '.join(known) or 'no peers'}")
    try:
        found = summarise(BENCHMARKS[arguments.benchmark](arguments.rounds, **({"against": against} if against else {})))
    except PeerError as error:
        sys.exit(f"error: {error}")
    for name, row in found.items():
        print(f"{name:48} {row['median']:10.3f}   [{row['min']:.3f}, {row['max']:.3f}]   n = {row['n']}")
    line = json.dumps({"benchmark": arguments.benchmark, "results": found})
    print(line)
    if arguments.json:
        with arguments.json.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
