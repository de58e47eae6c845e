"""What every driver shares: its command line, the turn-taking on standard input and output, and the model that all are timed on.

    NAME_driver.py BENCHMARK --num_prompts=8 …        `round SEED` a line in, one JSON object a line out
"""

import argparse
import json
import os
import pathlib
import resource
import sys
from typing import Any, Iterator

import job as jobs  # beside this file

_STATUS = pathlib.Path("/proc/self/status")  # on Linux

# Answers go where standard output was; whatever a library prints goes to the log.
_ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def asked() -> tuple[str, jobs.Job]:
    """Returns the benchmark and the job of the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("benchmark")
    jobs.add_options(parser)
    arguments = parser.parse_args()
    return arguments.benchmark, jobs.of_options(arguments)


def shape(job: jobs.Job) -> dict[str, Any]:
    """Returns the model's sizes under transformers' names: launch/benchmarks/work.py has them under ours."""
    return {
        "hidden_size": 576, "num_hidden_layers": job.layers, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
        "intermediate_size": 1536, "vocab_size": jobs.VOCABULARY, "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "rope_theta": 100000,
        "max_position_embeddings": max(2048, job.prompt_tokens + job.new_tokens),
    }  # fmt: skip


def rounds() -> Iterator[int]:
    """Yields the seed of each round that is asked for, until standard input ends."""
    for line in sys.stdin:
        yield int(line.split()[1])


def answer(**measured: Any) -> None:
    """Answers a round."""
    measured["peak_gib"] = peak_gib()
    _ANSWERS.write(json.dumps(measured) + "\n")
    _ANSWERS.flush()


def peak_gib() -> float:
    """Returns the peak memory of this process, GiB.

    Linux counts in ru_maxrss what the parent held when it started us; VmHWM is this program's own.
    """
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
