"""What is kept of a benchmark: every measurement, on which machine, of which commit."""

import dataclasses
import datetime
import importlib.metadata
import os
import pathlib
import platform
import statistics
import subprocess
from typing import Any, Mapping, Sequence

import numpy as np

from launch.benchmarks import peers
from launch.benchmarks.contests import Found
from launch.benchmarks.timing import secs
from launch.peers.job import Job

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_MATMUL, _TIMES = 2048, 5
_GIT_SECS = 30.0


def summarise(rows: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    """Returns {quantity: median, min, max, and all rounds} of repeated measurements."""
    return {name: {"median": statistics.median(xs), "min": min(xs), "max": max(xs), "rounds": list(xs)} for name, xs in rows.items() if xs}


def machine() -> dict[str, Any]:
    """Returns what the machine is and how fast NumPy multiplies on it now: the best of five products of 2048³, float32, GFLOP/s."""
    x = np.random.default_rng(0).random((_MATMUL, _MATMUL), np.float32)
    best = min(secs(lambda: x @ x) for _ in range(_TIMES))
    return {
        "cpu": _cpu(), "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, "matmul_gflops": 2 * _MATMUL**3 / best / 1e9,
        "python": platform.python_version(), "jax": importlib.metadata.version("jax"),
    }  # fmt: skip


def _cpu() -> str:
    found = pathlib.Path("/proc/cpuinfo")  # on Linux
    names = [line.split(":", 1)[1].strip() for line in found.read_text().splitlines() if line.startswith("model name")] if found.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str | None:
    """Returns the commit that is checked out, with "+" where files differ from it; None outside of a repository."""
    try:
        head, changes = (
            subprocess.run(["git", *line], cwd=_ROOT, capture_output=True, text=True, check=True, timeout=_GIT_SECS).stdout.strip()
            for line in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head + "+" * bool(changes)


def row(benchmark: str, found: Found, *, job: Job | None, against: Sequence[str]) -> dict[str, Any]:
    """Returns what is appended to a file of results.

    Args:
        benchmark: its name.
        found: what it found.
        job: its size; None where it has none.
        against: peers that took part.
    """
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "benchmark": benchmark, "commit": commit(),
        "job": job and dataclasses.asdict(job), "machine": machine(), "peers": {name: list(peers.REQUIREMENTS[name]) for name in against},
        "results": summarise(found.quantities), "ended": found.ended,
    }  # fmt: skip
