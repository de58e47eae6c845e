"""Measures speed as a ratio to a ceiling or a peer of the same run.

    python launch/benchmark.py NAME [--rounds=N] [--against=PEER,PEER] [--results=FILE] [--num_prompts=P …]

    generation    tokens per second of sampling, against the model's bare matmuls and cache reads; peers: transformers, trl, tunix
                  --ragged: 256 completions of 8 to 128 tokens by forced stop, 64 at a time, useful tokens per second, and our engine
                  without refill, in batches that stay as they are and in batches that are halved; peers: transformers
    storage       tokens per second with matrices and caches in float32, in bfloat16 and in int8
    update        seconds of an update with reference log-probs, against the bare matmuls that it needs; peers: trl, tunix
                  --ragged: completions of 8 to 128 tokens packed into few rows, against a row for each
    step          seconds of a whole step, cold start with an empty and with a warm compilation cache; peers: trl, tunix
    reward        seconds from the start of a process to a mean training reward of 0.45 over three updates, the demo's job (README); peers: trl
    advantages    microseconds of the learner's advantage kernel, against a loop in NumPy and a copy of the same bytes
    checkpoint    saving and restoring the state, against a plain write of the same bytes; memory it takes
    weights       publish → usable by an actor in another process, 1 GB, against one plain copy into fresh memory; with and without checksums
    overlap       steps per second at staleness (1, 2) against (1, 1), generation and update held up equally long
    actors        units per second of 1, 2, 4 and 8 actors whose generation takes a fixed time

Prints a table (median, least, greatest); --results appends one JSON line with every round, the machine and the commit. Nothing else should run
meanwhile. The first four are of SmolLM2-135M's shape with random weights, float32: 8 prompts of 64 tokens, 8 completions of 64 tokens each.
Each contestant is a process of its own; one that ends (out of memory, say) is reported as such, and the others go on. Peers are installed
into .peers/ at their first use (torch: minutes, 1 GB).
"""

import argparse
import json
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from launch.benchmarks import advantages, checkpoint, contests, pipeline, results, reward, weights  # noqa: E402
from launch.benchmarks.contests import Found  # noqa: E402
from launch.benchmarks.peers import PeerError  # noqa: E402
from launch.peers import job as jobs  # noqa: E402

CONTESTS = ("generation", "storage", "update", "step")
RAGGED = ("generation", "update")
ALONE = {
    "advantages": advantages.measure, "checkpoint": checkpoint.measure, "weights": weights.measure, "overlap": pipeline.measure_overlap,
    "actors": pipeline.measure_actors,
}  # fmt: skip


def parsed() -> tuple[argparse.Namespace, jobs.Job | None, list[str]]:
    """Returns the command line, the job where the benchmark has one, and the peers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=(*CONTESTS, "reward", *ALONE))
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each quantity")
    parser.add_argument("--against", default="", help="peers, with commas between")
    parser.add_argument("--results", type=pathlib.Path, help="file that a JSON line is appended to")
    jobs.add_options(parser)
    arguments = parser.parse_args()
    against = [name for name in arguments.against.split(",") if name]
    try:
        job = jobs.of_options(arguments)
        check(arguments, job, against)
    except ValueError as error:
        parser.error(str(error))
    return arguments, job if arguments.benchmark in CONTESTS else None, against


def check(arguments: argparse.Namespace, job: jobs.Job, against: list[str]) -> None:
    """Refuses what cannot be measured.

    Raises:
        ValueError: says what.
    """
    name = arguments.benchmark
    if arguments.rounds < 1:
        raise ValueError(f"--rounds={arguments.rounds} is below 1: give 1 or more")
    if arguments.results and not arguments.results.parent.is_dir():
        raise ValueError(f"--results={arguments.results}: there is no folder {arguments.results.parent}: make it")
    if name not in CONTESTS and job != jobs.Job():
        raise ValueError(f"{name} has a size of its own: leave the sizes of a job out, they are for {', '.join(CONTESTS)}")
    if job.ragged and name not in RAGGED:
        raise ValueError(f"--ragged: {name} has no ragged form: leave it out, or measure {' or '.join(RAGGED)}")
    contest = contests.find(name, ragged=job.ragged) if name in CONTESTS else None
    known = contest.peers if contest else reward.PEERS if name == "reward" else ()
    if unknown := [peer for peer in against if peer not in known]:
        raise ValueError(f"--against={unknown[0]}: {name} knows {', '.join(known) or 'no peers'}")


def show(found: Found, summary: dict[str, Any]) -> None:
    """Prints a table."""
    for name, row in summary.items():
        print(f"{name:60} {row['median']:10.3f}   [{row['min']:.3f}, {row['max']:.3f}]   n = {len(row['rounds'])}")
    for reason in found.ended.values():
        print(reason)


def main() -> None:
    """Runs one benchmark."""
    arguments, job, against = parsed()
    try:
        if job:
            found = contests.hold(contests.find(arguments.benchmark, ragged=job.ragged), job, rounds=arguments.rounds, against=against)
        elif arguments.benchmark == "reward":
            found = reward.measure(arguments.rounds, against)
        else:
            found = Found(ALONE[arguments.benchmark](arguments.rounds))
    except PeerError as error:
        sys.exit(f"error: {error}")
    row = results.row(arguments.benchmark, found, job=job, against=against)
    show(found, row["results"])
    if arguments.results:
        with arguments.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
    if "pgrpo_jax" in found.ended:
        sys.exit(1)


if __name__ == "__main__":
    main()
