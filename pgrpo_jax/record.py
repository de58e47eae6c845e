"""Floor 5: rollout-only: what the untrained policy answers, judged and recorded, without a learner.

For looking before paying (`microscope.py`), for estimates of the prompts' difficulty (`curation.difficulty`), and to train on later (`engines/replay.py`).

    config.json              as of a run
    rollouts/step_*.npz      as of a run; all of weight version 0
    verdicts.jsonl           as of a run
    difficulty.json          {prompt_id: {"mean", "std", "count"}} over all steps
"""

import contextlib
import math
from typing import Any, Callable, Collection, Mapping

from etils import epath

from pgrpo_jax import assembly, policies, settings
from pgrpo_jax.actor import Actor
from pgrpo_jax.models import lora
from pgrpo_jax.preemption import EXIT_PREEMPTED, Preempted, Stop
from pgrpo_jax.rollout_files import find_rollouts, load_rollouts, pack_rollouts
from pgrpo_jax.run_directory import check_workdir, RunDirectory, write_atomically
from pgrpo_jax.structs import Rollouts, Work
from pgrpo_jax.tasks import difficulty


def record(
    config: Any, *, identity: Mapping[str, Any], workdir: epath.PathLike, stop: Stop, say: Callable[[str], None] = print
) -> int:
    """Generates and judges the units of the first `num_steps` updates with the untrained policy; calling it again goes on.

    It runs in this process, on the devices that an inline actor has, whatever `engine` says. The first step's rollouts are those of a run.

    Args:
        config: every key of configs/base.py.
        identity: its identity keys, flat.
        workdir: where to record; not of a training run.
        stop: set by SIGTERM or SIGINT.
        say: shows a line.

    Returns:
        The exit status: 0 when all is recorded, 75 when stopped; the same command goes on.

    Raises:
        ValueError: the configuration, the data or the model can not be used, or the directory is of something else.
    """
    settings.check(config)
    if config.distributed.enabled:
        raise ValueError("distributed.enabled = True has no place in recording, which runs in one process: unset it")
    check_workdir(workdir)
    directory = RunDirectory(workdir)
    _check_records(directory, identity)
    try:
        with contextlib.ExitStack() as resources:
            task = assembly.load_task(config)
            stop.check("start-up")
            base = assembly.load_base(config, task)
            rewards = assembly.make_rewards(config)
            resources.callback(rewards.close)
            actor = assembly.make_actor(config, base, task, rewards)
            weights = policies.published(config, base, lora.joined(base.frozen(), base.trainable()))
            directory.write_config(settings.flat(config))
            for step in range(config.num_steps):
                _step(config, actor, weights, directory, step, stop, say)
    except Preempted as reason:
        say(f"{reason}: what is recorded stays in {directory.path}; run the same command to go on")
        return EXIT_PREEMPTED
    estimates = difficulty.measure(unit for file in find_rollouts(directory.path) for unit in load_rollouts(file))
    difficulty.write(directory.path / "difficulty.json", estimates)
    say(f"{directory.path / 'difficulty.json'}: {len(estimates)} prompts")
    return 0


def _check_records(directory: RunDirectory, identity: Mapping[str, Any]) -> None:
    """The directory is new, or of an earlier attempt; more steps may be asked for."""
    if (directory.path / "metrics.jsonl").exists() or (directory.path / "checkpoints").exists():
        raise ValueError(f"{directory.path} holds a training run, whose rollouts are recorded already: give another --workdir")
    earlier = directory.config()
    if earlier is not None and (different := differences(earlier, identity, but=("num_steps",))):
        raise ValueError(f"{directory.path} holds rollouts of another configuration ({'; '.join(different)}): use another --workdir")


def differences(earlier: Mapping[str, Any], identity: Mapping[str, Any], *, but: Collection[str] = ()) -> list[str]:
    """Compares a recorded configuration with one that is to go on from it.

    Args:
        earlier: of `RunDirectory.config`, where a number that is not finite is None.
        identity: the identity keys, flat.
        but: keys that may differ.

    Returns:
        "key: value there, value here" of each identity key that differs, in the order of the keys.
    """
    infinite = {key for key, value in identity.items() if isinstance(value, float) and not math.isfinite(value)}
    wanted = {key: None if key in infinite else value for key, value in sorted(identity.items()) if key not in but}
    return [f"{key}: {earlier.get(key, '(absent)')} there, {value} here" for key, value in wanted.items() if earlier.get(key, "(absent)") != value]


def _step(config: Any, actor: Actor, weights: Any, directory: RunDirectory, step: int, stop: Stop, say: Callable[[str], None]) -> None:
    """Records one step, unless it is recorded already."""
    path = directory.path / "rollouts" / f"step_{step + 1:06d}.npz"
    if path.exists():
        return
    known, count = directory.verdicts("train"), settings.work_per_step(config)
    units: list[Rollouts] = []
    for index in range(step * count, (step + 1) * count):
        stop.check("recording")
        units.append(actor.rollout(weights, Work(index=index, step=step, version=0, failed_rewards=known.get((index, 0), ()))))
    directory.write_verdicts(units)
    write_atomically(path, pack_rollouts(units))
    rewards = [float(reward) for unit in units for reward in unit.rewards]
    mean = f"mean reward {sum(rewards) / len(rewards):.3f}" if rewards else "no rewards"
    say(f"step {step + 1} of {config.num_steps}: {len(rewards)} completions, {mean}")
