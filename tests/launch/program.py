"""Starts the programs of launch/ as a user does, and reads what they leave behind."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import small_config

from pgrpo_jax.controller import COUNTERS
from pgrpo_jax.rollout_files import load_rollouts

ROOT = pathlib.Path(__file__).parents[2]
SIGNAL_AT = pathlib.Path(__file__).parent / "signal_at.py"
TIMEOUT_SECS = 500  # of one process, on a machine that is busy with others; never waited for when all is well
LONG = {"num_steps": 40, "checkpoint__save_every": 4}  # steps enough to be hit by a signal
WALL_CLOCK = {"wall_secs", "generation_secs", "wait_secs", "update_secs", "publish_secs", "checkpoint_secs", "tokens_per_sec"}
WALL_CLOCK |= {f"controller/{name}" for name in COUNTERS}  # of timing and faults


def command(workdir, *, program="train", config="configs/smoke.py", at=None, **changes):
    """The command line of the small run, with changes (small_config.py). `at`: arguments of signal_at.py."""
    prefix = [sys.executable] if at is None else [sys.executable, str(SIGNAL_AT), *map(str, at)]
    flags = [f"--config.{name}={flag_value(value)}" for name, value in small_config.overrides(**changes).items()]
    return [*prefix, f"launch/{program}.py", f"--config={config}", f"--workdir={workdir}", *flags]


def environment(cache=None):
    """Ours without what would reach into JAX; `cache` is a directory where it keeps what it compiled."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX", "XLA", "PYTHONWARNINGS"))}
    settings = {"JAX_PLATFORMS": "cpu"}
    if cache is not None:
        settings |= {"JAX_COMPILATION_CACHE_DIR": str(cache)}
        settings |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    return kept | settings


def flag_value(value):
    """A value as the command line writes it."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else value


def run(line, *, cache=None, cwd=ROOT, variables=None):
    """Runs a program to its end. `variables` of the environment come on top."""
    return subprocess.run(line, cwd=cwd, env=environment(cache) | (variables or {}), capture_output=True, text=True, timeout=TIMEOUT_SECS, check=False)


def start(line, *, cache=None, variables=None):
    """Starts a program; the caller waits for it. `variables` of the environment come on top."""
    return subprocess.Popen(line, cwd=ROOT, env=environment(cache) | (variables or {}), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def errors(done):
    """The error lines of a program that must have refused to run: exit status 1, nothing on standard error but these lines."""
    lines = done.stderr.splitlines()
    assert done.returncode == 1, done.stdout + done.stderr
    assert lines and all(line.startswith("error: ") for line in lines), done.stderr
    return [line.removeprefix("error: ") for line in lines]


def summary(workdir):
    return json.loads((pathlib.Path(workdir) / "summary.json").read_text())


def records(workdir):
    """Everything a run recorded but for its wall-clock times, to compare two runs with."""
    workdir = pathlib.Path(workdir)
    metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    rollouts = {}
    for path in sorted((workdir / "rollouts").iterdir()):
        units = [dataclasses.asdict(dataclasses.replace(unit, generation_secs=0.0)) for unit in load_rollouts(path)]
        rollouts[path.name] = repr(json.loads(json.dumps(units, default=lambda array: [str(array.dtype), array.tolist()])))
    return {
        "metrics": [{key: value for key, value in line.items() if key not in WALL_CLOCK} for line in metrics],
        "samples": [json.loads(line) for line in (workdir / "samples.jsonl").read_text().splitlines()],
        "rollouts": rollouts,
        "evaluations": {path.name: json.loads(path.read_text()) for path in sorted(workdir.glob("evaluation_*.json"))},
        "summary": {key: value for key, value in summary(workdir).items() if key != "wall_secs"},
    }


def files(directory):
    """Content of every file below a directory, by path."""
    directory = pathlib.Path(directory)
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}
