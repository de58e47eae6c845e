"""Evaluation: held-out answers, what they earn per preference group, and what was learned beyond the format."""

from typing import Any, Sequence

import jax
import numpy as np
from etils import epath

from pgrpo_jax import assembly, settings
from pgrpo_jax.actor import Actor
from pgrpo_jax.checkpoints import Checkpoints
from pgrpo_jax.console import Console
from pgrpo_jax.preemption import EXIT_PREEMPTED, Preempted, Stop
from pgrpo_jax.run_directory import RunDirectory
from pgrpo_jax.structs import Rollouts, Work
from pgrpo_jax.tasks import Task

_RESAMPLES = 2000


def evaluate_run(config: Any, *, identity: dict[str, Any], workdir: epath.PathLike, stop: Stop) -> int:
    """Evaluates the newest committed checkpoint of a run and shows the result; of the run's records only this evaluation is touched.

    Args:
        config: every key of configs/base.py; `evaluation` may differ from the run's.
        identity: its identity keys, flat.
        workdir: the run directory, of a run that may still be training.
        stop: set by SIGTERM or SIGINT.

    Returns:
        The exit status: 0, or 75 when stopped before the end.

    Raises:
        ValueError: the configuration, the data, the model or the checkpoint can not be used.
        FileNotFoundError: there is no committed checkpoint.
    """
    settings.check(config, num_devices=jax.local_device_count())
    directory = RunDirectory(workdir)
    saved = directory.path / "checkpoints"
    missing = f"no committed checkpoint in {saved}: give the --workdir of a run that has saved one"
    if not saved.exists():
        raise FileNotFoundError(missing)
    task = assembly.load_task(config)
    base = assembly.load_base(config, task)
    checkpoints = Checkpoints(saved, identity=assembly.run_identity(identity, base), keep=config.checkpoint.keep, read_only=True)
    learner = assembly.make_learner(config, base, checkpoints)
    try:
        if not learner.restore():
            raise FileNotFoundError(missing)
        actor = assembly.make_evaluator(config, base, task)
        weights, num_prompts = learner.state.trainable, config.evaluation.num_prompts
        record = evaluation(directory, actor, weights, step=learner.step, num_prompts=num_prompts, stop=stop)
    except Preempted:
        return EXIT_PREEMPTED
    finally:
        checkpoints.close()
    console = Console(config.num_steps, start_step=learner.step)
    console.note(f"step {learner.step} of {directory.path}")
    console.evaluation(recorded(directory, actor, step=0, num_prompts=num_prompts), record)
    return 0


def evaluation(directory: RunDirectory, actor: Actor, weights: Any, *, step: int, num_prompts: int, stop: Stop) -> dict[str, Any]:
    """Returns the evaluation after `step` updates, made and recorded now unless one with these settings is on record.

    Args:
        directory: the run's records.
        actor: answers the prompts.
        weights: of the policy after `step` updates.
        step: updates the policy had.
        num_prompts: held-out prompts.
        stop: looked at between two units.

    Raises:
        Preempted: a stop was requested.
    """
    record = recorded(directory, actor, step=step, num_prompts=num_prompts)
    if record is None:
        rollouts = collect(actor, weights, version=step, num_prompts=num_prompts, stop=stop)
        record = summarise(actor.task, rollouts, step=step)
        directory.write_evaluation(record)
    return record


def recorded(directory: RunDirectory, actor: Actor, *, step: int, num_prompts: int) -> dict[str, Any] | None:
    """Returns the evaluation on record after `step` updates, None where there is none or it was made with other settings."""
    wanted = {
        "step": step,
        "num_prompts": num_prompts,
        "completions_per_prompt": actor.completions_per_prompt,
        "prompts_per_work": actor.prompts_per_work,
    }
    return next((record for record in directory.evaluations() if all(record.get(k) == v for k, v in wanted.items())), None)


def collect(actor: Actor, weights: Any, *, version: int, num_prompts: int, stop: Stop) -> list[Rollouts]:
    """Answers the held-out prompts; the same random streams whatever the weights, so two evaluations are paired.

    Args:
        actor: with the evaluation's units and completions per prompt.
        weights: of the policy.
        version: of the weights.
        num_prompts: a multiple of the actor's prompts per unit.
        stop: looked at between two units.

    Raises:
        Preempted: a stop was requested; the evaluation is made again after the resume.
    """
    rollouts = []
    for index in range(num_prompts // actor.prompts_per_work):
        stop.check("evaluation")
        rollouts.append(actor.rollout(weights, Work(index=index, step=version, version=version, split="test")))
    return rollouts


def summarise(task: Task, rollouts: Sequence[Rollouts], *, step: int) -> dict[str, Any]:
    """Turns held-out answers into the evaluation record (docs/metrics.md).

    Args:
        task: judges which candidate an answer names, and knows the baselines.
        rollouts: of `collect`.
        step: updates the policy had.

    Returns:
        A JSON-serialisable record; a value without answers to take it from is None.
    """
    prompts = [p for r in rollouts for p in r.prompt_records]
    baselines = task.baselines(prompts)
    preference_ids = np.array([p.preference_id for p in prompts])
    per_prompt = len(rollouts[0].texts) // len(rollouts[0].prompt_records)
    rewards = np.concatenate([r.rewards for r in rollouts]).astype(np.float64).reshape(-1, per_prompt)
    named = [task.choice(prompts[i // per_prompt], text) for i, text in enumerate(t for r in rollouts for t in r.texts)]
    answered = np.concatenate([r.reward_components["answered"] for r in rollouts]).reshape(rewards.shape) > 0
    first = np.array([n == 0 for n in named]).reshape(rewards.shape)
    gains = rewards - np.asarray(baselines["random"], np.float64)[:, None]

    def describe(rows: np.ndarray, name: str) -> dict[str, Any]:
        return {
            "num_prompts": int(rows.sum()),
            "reward": _mean(rewards[rows]),
            "answer_rate": _mean(answered[rows]),
            "reward_given_answer": _mean(rewards[rows][answered[rows]]),
            "first_candidate_share": _mean(first[rows][answered[rows]]),
            "advantage_over_random": interval(gains[rows], answered[rows], name=name),
            "intervals": {
                "reward": interval(rewards[rows], np.ones_like(answered[rows]), name=name),
                "answer_rate": interval(answered[rows].astype(np.float64), np.ones_like(answered[rows]), name=name),
            },
            "baselines": {key: _mean(np.asarray(value)[rows]) for key, value in baselines.items()},
        }

    present = [p for p in range(task.num_preference_groups) if (preference_ids == p).any()]
    per_preference_group = {str(p): describe(preference_ids == p, f"preference group {p}") for p in present}
    for p, record in per_preference_group.items():
        record["name"] = task.preference_group_names[int(p)]
    means = {p: record["reward"] for p, record in per_preference_group.items()}
    return {
        "step": step,
        "completions_per_prompt": per_prompt,
        "prompts_per_work": len(rollouts[0].prompt_records),
        **describe(np.ones(len(prompts), bool), "all"),
        "worst_preference_group": min(means, key=means.get),
        "gap": max(means.values()) - min(means.values()),
        "per_preference_group": per_preference_group,
    }


def interval(values: np.ndarray, counted: np.ndarray, *, name: str) -> dict[str, float | None]:
    """Mean over the counted answers with its 95 % interval, by bootstrap over prompts (the answers of a user are not independent).

    Args:
        values: [P, G] float.
        counted: [P, G] bool.
        name: names the random stream of the resamples.

    Returns:
        {"mean", "low", "high"}, None where nothing is counted or only one prompt.
    """
    sums, counts = (values * counted).sum(axis=1), counted.sum(axis=1)
    if counts.sum() == 0:
        return {"mean": None, "low": None, "high": None}
    mean = float(sums.sum() / counts.sum())
    if (counts > 0).sum() < 2:
        return {"mean": mean, "low": None, "high": None}
    rng = np.random.default_rng(np.frombuffer(f"bootstrap/{name}".encode(), np.uint8))
    draws = rng.integers(0, len(sums), (_RESAMPLES, len(sums)))
    totals = counts[draws].sum(axis=1)
    means = sums[draws].sum(axis=1)[totals > 0] / totals[totals > 0]
    low, high = np.quantile(means, [0.025, 0.975])
    return {"mean": mean, "low": float(low), "high": float(high)}


def _mean(values: np.ndarray) -> float | None:
    return float(np.mean(values)) if np.size(values) else None
