"""Seconds from the start of a process to a mean training reward: the demo's model, prompts and reward, our run and TRL's.

Ours is configs/movielens.py at a constant learning rate, with an empty compilation cache and what a run does besides: it is evaluated before (as
much as an update samples) and writes its records. TRL is launch/peers/trl_reward.py. Each is a fresh process, stopped when it has arrived.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from typing import Sequence

from configs import movielens
from launch.benchmarks import peers
from launch.benchmarks.contests import Found
from launch.benchmarks.timing import EndedError, ratios
from pgrpo_jax import assembly
from pgrpo_jax.models import tokenizer as tokenizers

GOAL, STEPS = 0.45, 3  # the mean reward of so many updates
PEERS = ("trl",)
MOST_UPDATES = 60
RUN_SECS, LOOK_SECS, STOP_SECS = 3600.0, 0.2, 120.0
_ROOT = pathlib.Path(__file__).resolve().parents[2]
_MODEL = pathlib.Path(movielens.get_config().model.path)


def measure(rounds: int, against: Sequence[str]) -> Found:
    """Returns everybody's seconds to the goal, and the updates that they took.

    Args:
        rounds: runs of each, under seeds 0, 1, …: other prompts, other random numbers.
        against: of `PEERS`.

    Raises:
        PeerError: a peer could not be installed, or the demo's model and data are missing.
    """
    if not (_MODEL.is_dir() and any(_MODEL.glob("*.gguf"))):
        raise peers.PeerError(f"{_MODEL} holds no model: run launch/fetch_assets.py first")
    for name in against:
        peers.installed(name)  # before anybody has worked
    runs: dict[str, list[tuple[float, int]]] = {name: [] for name in ("pgrpo_jax", *against)}
    ended: dict[str, str] = {}
    for seed in range(rounds):
        for name in [name for name in runs if name not in ended]:
            with tempfile.TemporaryDirectory() as directory:
                line, file = _STARTS[name](pathlib.Path(directory), seed)
                try:
                    runs[name].append(watch(line, file, log=pathlib.Path(directory) / "log.txt"))
                except EndedError as error:
                    ended[name] = f"{name}, seed {seed}: {error}"
    secs = {name: [taken for taken, _ in of_name] for name, of_name in runs.items() if of_name}
    found = {f"{name}, s to a mean reward of {GOAL} over {STEPS} updates": values for name, values in secs.items()}
    found |= {f"{name}, updates": [updates for _, updates in runs[name]] for name in secs}
    ours = secs.pop("pgrpo_jax", [])
    return Found(found | {f"pgrpo_jax / {name}, speed": ratios(theirs, ours) for name, theirs in secs.items() if ours}, ended)


def watch(line: Sequence[object], file: pathlib.Path, *, log: pathlib.Path) -> tuple[float, int]:
    """Runs a program until the rewards that it writes reach the goal, then ends it.

    Args:
        line: its command line.
        file: where it appends one JSON object for each update, with "reward".
        log: where what it prints goes.

    Returns:
        (seconds from its start, updates).

    Raises:
        EndedError: it ended before, or took too long.
    """
    start = time.perf_counter()
    variables = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}  # may hold what we compiled before
    with log.open("w") as output:
        process = subprocess.Popen(list(map(str, line)), cwd=_ROOT, env=variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        while (secs := time.perf_counter() - start) < RUN_SECS:
            running = process.poll() is None
            rewards = [json.loads(row)["reward"] for row in file.read_text().splitlines(keepends=True) if row.endswith("\n")] if file.exists() else []
            if reached(rewards):
                return secs, len(rewards)
            if not running:
                words = log.read_text(errors="replace").strip().splitlines()[-1:]
                raise EndedError(f"ended with status {process.returncode} after {len(rewards)} updates, rewards {rewards[-STEPS:]} ({''.join(words)})")
            time.sleep(LOOK_SECS)
        raise EndedError(f"has not reached a mean reward of {GOAL} within {RUN_SECS:g} s: rewards {rewards[-STEPS:]}")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=STOP_SECS)


def reached(rewards: Sequence[float]) -> bool:
    """Returns whether the mean of the newest rewards is at the goal."""
    return len(rewards) >= STEPS and sum(rewards[-STEPS:]) / STEPS >= GOAL


def _ours(directory: pathlib.Path, seed: int) -> tuple[list[object], pathlib.Path]:
    """Our command line, and the file of its rewards."""
    config = movielens.get_config()
    sizes = {
        "num_steps": MOST_UPDATES, "seed": seed, "evaluation.num_prompts": config.prompts_per_step, "evaluation.prompts_per_work": config.prompts_per_work,
        "evaluation.completions_per_prompt": config.completions_per_prompt, "optimiser.schedule": "constant",
    }  # fmt: skip
    flags = [f"--config.{name}={value}" for name, value in sizes.items()]
    line = [sys.executable, "launch/train.py", "--config=configs/movielens.py", f"--workdir={directory / 'run'}", *flags]
    return line, directory / "run" / "metrics.jsonl"


def _trl(directory: pathlib.Path, seed: int) -> tuple[list[object], pathlib.Path]:
    """TRL's command line, and the file of its rewards; it is given our prompts, in our order, and our hyperparameters."""
    config = movielens.get_config()
    config.seed = seed
    task, tokenizer = assembly.load_task(config), tokenizers.load(next(_MODEL.glob("*.gguf")))
    prompts, file = directory / "prompts.jsonl", directory / "rewards.jsonl"
    with prompts.open("w") as rows:
        for prompt in task.prompts("train", 0, MOST_UPDATES * config.prompts_per_step):
            row = {"prompt": prompt.text, "ids": tokenizer.render_chat(prompt.text), **{name: prompt.facts[name] for name in ("names", "decoys", "ratings")}}
            rows.write(json.dumps(row) + "\n")
    sizes = {
        "model": next(_MODEL.glob("*.gguf")), "prompts": prompts, "rewards": file, "steps": MOST_UPDATES, "seed": seed,
        "prompts_per_step": config.prompts_per_step, "completions_per_prompt": config.completions_per_prompt,
        "new_tokens": config.generation.max_new_tokens, "learning_rate": config.optimiser.learning_rate, "warmup_steps": config.optimiser.warmup_steps,
    }  # fmt: skip
    python, _ = peers.installed("trl")
    return [python, _ROOT / "launch" / "peers" / "trl_reward.py", *(f"--{name}={value}" for name, value in sizes.items())], file


_STARTS = {"pgrpo_jax": _ours, "trl": _trl}
