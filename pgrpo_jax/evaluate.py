"""Evaluation: held-out answers, what they earn per preference group, and what was learned beyond the format."""

import contextlib
from typing import Any, Sequence

import numpy as np
from etils import epath

from pgrpo_jax import batching, settings
from pgrpo_jax.console import Console
from pgrpo_jax.controller import Controller
from pgrpo_jax.deployment import deploy, Deployment
from pgrpo_jax.engines import gather
from pgrpo_jax.preemption import EXIT_PREEMPTED, Preempted, Stop
from pgrpo_jax.run_directory import RunDirectory
from pgrpo_jax.schedule import Schedule
from pgrpo_jax.structs import Prompt, Rollouts
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
    settings.check(config)
    saved = epath.Path(workdir) / "checkpoints"
    missing = f"no committed checkpoint in {saved}: give the --workdir of a run that has saved one"
    if not saved.exists():
        raise FileNotFoundError(missing)
    try:
        parts = deploy(config, identity=identity, workdir=workdir, stop=stop, engine="inline", read_only=True)
        with contextlib.closing(parts):
            if not parts.learner.restore():
                raise FileNotFoundError(missing)
            step = parts.learner.step
            record = evaluation(config, parts, step=step)
            before = recorded(parts.directory, config, step=0)
    except Preempted:
        return EXIT_PREEMPTED
    console = Console(config.num_steps, start_step=step)
    console.note(f"step {step} of {workdir}")
    console.evaluation(before, record)
    return 0


def evaluation(config: Any, parts: Deployment, *, step: int) -> dict[str, Any]:
    """Returns the evaluation of the policy after `step` updates: from the records, or made now and recorded.

    The random streams are the same whatever the weights, so two evaluations are paired.

    Args:
        config: every key of configs/base.py.
        parts: of the run.
        step: the learner's own, or 0, the untrained policy.

    Raises:
        Preempted: a stop was requested; the evaluation is made again after the resume.
    """
    record = parts.agree(recorded(parts.directory, config, step=step))
    if record is not None:
        return record
    parts.learner.offer(step)
    parts.engine.publish(parts.learner)
    wanted = config.evaluation
    controller = Controller(
        Schedule(),  # on-policy: units of this very version
        num_steps=step + 1,
        first_step=step,
        next_work=0,
        work_per_step=wanted.num_prompts // wanted.prompts_per_work,
        split="test",
        lease_secs=config.lease_secs,
        failed_rewards=parts.verdicts("test"),
    )
    rollouts = gather(controller, parts.engine, step, stop=parts.stop, phase="evaluation")
    parts.directory.write_verdicts(rollouts)
    record = summarise(parts.task, rollouts, step=step)
    parts.directory.write_evaluation(record)
    return record


def recorded(directory: RunDirectory, config: Any, *, step: int) -> dict[str, Any] | None:
    """Returns the evaluation on record after `step` updates, None where there is none or it was made with other settings."""
    sizes = ("num_prompts", "completions_per_prompt", "prompts_per_work")
    wanted = {"step": step} | {name: config.evaluation[name] for name in sizes}
    return next((record for record in directory.evaluations() if all(record.get(k) == v for k, v in wanted.items())), None)


def summarise(task: Task, rollouts: Sequence[Rollouts], *, step: int) -> dict[str, Any]:
    """Turns held-out answers into the evaluation record (docs/metrics.md).

    Args:
        task: judges which candidate an answer names, and knows the baselines.
        rollouts: of the held-out prompts, in order; a prompt may have fewer completions where rewards failed.
        step: updates the policy had.

    Returns:
        A JSON-serialisable record; a value without answers to take it from is None.
    """
    prompts = [p for r in rollouts for p in r.prompt_records]
    baselines = task.baselines(prompts)
    preference_ids = np.array([p.preference_id for p in prompts])
    judged, rewards, answered, first = _tables(task, prompts, rollouts)
    gains = rewards - np.asarray(baselines["random"], np.float64)[:, None]

    def describe(rows: np.ndarray, name: str) -> dict[str, Any]:
        return {
            "num_prompts": int(rows.sum()),
            "reward": _mean(rewards[rows][judged[rows]]),
            "answer_rate": _mean(answered[rows][judged[rows]]),
            "reward_given_answer": _mean(rewards[rows][answered[rows]]),
            "first_candidate_share": _mean(first[rows][answered[rows]]),
            "advantage_over_random": interval(gains[rows], answered[rows], name=name),
            "intervals": {
                "reward": interval(rewards[rows], judged[rows], name=name),
                "answer_rate": interval(answered[rows].astype(np.float64), judged[rows], name=name),
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
        "completions_per_prompt": rewards.shape[1],
        "prompts_per_work": len(rollouts[0].prompt_records),
        **describe(np.ones(len(prompts), bool), "all"),
        "worst_preference_group": min(means, key=means.get),
        "gap": max(means.values()) - min(means.values()),
        "per_preference_group": per_preference_group,
    }


def _tables(task: Task, prompts: Sequence[Prompt], rollouts: Sequence[Rollouts]) -> tuple[np.ndarray, ...]:
    """(judged, rewards, answered, first candidate) of every completion, [P, G] each; 0 where one was dropped."""
    per_prompt = int(max(np.bincount(r.prompt_index, minlength=1).max() for r in rollouts))
    order = batching.completion_rows(rollouts, completions_per_prompt=per_prompt)

    def table(values: Sequence[Any]) -> np.ndarray:
        cells = np.zeros(len(prompts) * per_prompt, np.asarray(values).dtype)
        cells[order] = values
        return cells.reshape(len(prompts), per_prompt)

    texts = [text for r in rollouts for text in r.texts]
    return (
        table(np.ones(len(order), bool)),
        table(np.concatenate([r.rewards for r in rollouts]).astype(np.float64)),
        table(np.concatenate([r.reward_components["answered"] for r in rollouts]) > 0),
        table(np.array([task.choice(prompts[row // per_prompt], text) == 0 for row, text in zip(order, texts, strict=True)], bool)),
    )


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
