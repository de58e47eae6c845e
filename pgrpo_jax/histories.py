"""Floor 5: the reward histories of a run that is not running: shown, without one user, or under another assignment of users.

A run's newest checkpoint holds the histories, its recorded rollouts what they were made of. Cumulative histories are the merge of what each user
contributed, so a user can be taken out exactly (but for rounding), and users can be dealt to other preference groups as if it had always been so.
The changed run is a new directory; the old one is not touched. The policy was trained on all of it: its weights are not changed by this.
"""

import dataclasses
from typing import Any, Callable, Mapping, Sequence

import jax
import numpy as np
from etils import epath

from pgrpo_jax import algorithm_settings, assembly, contributions, curation, parallel, settings
from pgrpo_jax.checkpoints import Checkpoints
from pgrpo_jax.microscope import read_steps, Step
from pgrpo_jax.policies import Saved
from pgrpo_jax.run_directory import RunDirectory
from pgrpo_jax.structs import Prompt, RewardFailure, RewardHistory, Rollouts

_CLOSE = 1e-3  # of means and deviations: the checkpoint's were merged step by step in float32
_EPOCHS = 64  # of a task's prompts that are looked through for users; in a mixture one epoch does not ask everybody


def recorded_parts(saved: Saved) -> tuple[tuple[Step, ...], dict[str, RewardHistory]]:
    """Reads what each user contributed, and checks that together it is what the checkpoint holds.

    Args:
        saved: of `policies.restore`.

    Returns:
        (steps up to the checkpoint's, user_id -> contribution).

    Raises:
        ValueError: the histories have no such parts (another memory, rewards that are not recorded, no users), or the records are not all of them.
    """
    config, history = saved.config, saved.history
    if config.algorithm.memory != "cumulative":
        raise ValueError(
            f"algorithm.memory = {config.algorithm.memory!r} has faded or dropped rewards, so no user's part can be told exactly: "
            "only cumulative histories can be changed"
        )
    chosen = algorithm_settings.preset(config)
    if chosen.objective.kl_in == "reward" and chosen.kl_coefficient > 0:
        raise ValueError("algorithm.kl_in = 'reward' takes a KL off the rewards that is not recorded: these histories can not be changed exactly")
    steps = tuple(step for step in read_steps([saved.directory.path]) if step.number <= saved.learner.step)
    made = {unit.work.index: step.number - 1 for step in steps for unit in step.units}
    parts = contributions.contributions(
        [unit for step in steps for unit in step.units], history.count.shape[-1], rewards=_entered(config), weights=_weighed(config, made)
    )
    together = contributions.total(parts.values(), history)
    away = [
        f"row {row} has {history.count.reshape(-1)[row]} rewards of mean {history.mean.reshape(-1)[row]:.4f} in the checkpoint, "
        f"{together.count.reshape(-1)[row]} of mean {together.mean.reshape(-1)[row]:.4f} in the records"
        for row in range(history.count.size) if not _alike(history, together, row)
    ]  # fmt: skip
    if away:
        raise ValueError(f"{'; '.join(away)}: the rollouts of {saved.directory.path} are not all that its histories were made of; restore them")
    return steps, parts


def _alike(a: RewardHistory, b: RewardHistory, row: int) -> bool:
    count, mean, m2 = ([np.asarray(getattr(h, name)).reshape(-1)[row] for h in (a, b)] for name in ("count", "mean", "m2"))
    spread = np.sqrt(max(*m2, 0.0) / max(1, count[1]))
    deviations = [np.sqrt(max(x, 0.0) / max(1, count[1])) for x in m2]
    close = _CLOSE * (spread + 1e-3 * abs(mean[1]) + 1e-6)
    return count[0] == count[1] and abs(mean[0] - mean[1]) <= close and abs(deviations[0] - deviations[1]) <= close


def _entered(config: Any) -> Callable[[Rollouts], np.ndarray]:
    """The rewards of a unit as they entered the histories: see `curation.signals`."""
    names, shaping = tuple(algorithm_settings.components(config)), algorithm_settings.curation(config)

    def rewards(unit: Rollouts) -> np.ndarray:
        penalty = curation.overlong_penalty(unit.completion_lengths, shaping)
        if not names:
            return (unit.rewards - penalty).astype(np.float32)
        return (np.stack([unit.reward_components[name] for name in names], axis=1) - penalty[:, None]).astype(np.float32)

    return rewards


def _weighed(config: Any, made: Mapping[int, int]) -> Callable[[Rollouts], np.ndarray]:
    """What each reward of a unit counts for: see `AdvantageSettings.staleness_half_life`. `made` is unit -> updates before the one it went into."""
    half_life, limit = config.algorithm.staleness_half_life, config.algorithm.staleness_limit

    def weights(unit: Rollouts) -> np.ndarray:
        staleness = made[unit.work.index] - unit.work.version
        weight = 2.0 ** (-staleness / half_life) if half_life else 1.0
        return np.full(len(unit.rewards), 0.0 if limit and staleness >= limit else weight)

    return weights


def forget(saved: Saved, user: str, out: epath.PathLike, *, identity: Mapping[str, Any]) -> int:
    """Writes a run directory without one user: neither in the histories of its checkpoint, nor in its samples and rollouts.

    Metrics and evaluations are averages over many users and stay as they are; summary, TensorBoard files and pages are left out. The weights
    were trained on the user's answers, and the task still asks for him: take him out of its data as well before going on.

    Args:
        saved: of `policies.restore`.
        user: pseudonym, `Prompt.user_id`.
        out: the new run directory; empty or not there.
        identity: the run's identity keys, flat.

    Returns:
        How many rewards were taken out.

    Raises:
        ValueError: as `recorded_parts`; the user has no rewards; or the directory is in use.
    """
    steps, parts = recorded_parts(saved)
    if user not in parts:
        raise ValueError(f"user {user!r} has no rewards among those of {len(parts)} users: nothing is to be forgotten")
    history = contributions.without_user(saved.history, parts[user])
    kept = [Step(step.number, tuple(_without(unit, user) for unit in step.units)) for step in steps]
    _write(saved, saved.config, identity, epath.Path(out), history, kept, gone=_asked_by(steps, user))
    return int(np.asarray(parts[user].count).reshape(-1, saved.history.count.shape[-1])[0].sum())


def migrate(saved: Saved, config: Any, out: epath.PathLike, *, identity: Mapping[str, Any]) -> RewardHistory:
    """Writes a run directory whose histories are those of another assignment of users to preference groups, as if it had held from the start.

    Samples and rollouts name the new preference groups; the metrics of the steps so far are by the old ones.

    Args:
        saved: of `policies.restore`.
        config: the run's, with another task.preference_groups, task.num_preference_groups or algorithm.arm.
        out: the new run directory; empty or not there.
        identity: identity keys of `config`, flat.

    Returns:
        The new histories, on the host.

    Raises:
        ValueError: as `recorded_parts`; the task does not know a user; a KL is kept for each preference group and K changes; or the directory is in
            use.
    """
    settings.check(config)
    num_rows = settings.num_preference_groups(config)
    if num_rows != saved.history.count.shape[-1] and "kl_coefficients" in saved.learner.state.objective:
        raise ValueError(
            f"{num_rows} preference groups have no KL coefficients in a run of {saved.history.count.shape[-1]}: keep task.num_preference_groups, "
            "or migrate a run with algorithm.kl_coefficient = 0"
        )
    steps, parts = recorded_parts(saved)
    task = assembly.load_task(config)
    asked: dict[str, Prompt] = {}
    for epoch in range(_EPOCHS):
        asked |= {prompt.user_id: prompt for prompt in task.prompts("train", epoch, task.num_prompts("train"))}
        if parts.keys() <= asked.keys():
            break
    moved = contributions.migrate(parts, {user: prompt.history_row for user, prompt in asked.items()}, num_rows)
    renamed = [Step(step.number, tuple(_assigned(unit, asked) for unit in step.units)) for step in steps]
    history = contributions.as_dtype(moved, saved.history.mean.dtype)
    _write(saved, config, identity, epath.Path(out), history, renamed)
    return history


def _assigned(unit: Rollouts, asked: Mapping[str, Prompt]) -> Rollouts:
    def renamed(prompt: Prompt) -> Prompt:
        now = asked.get(prompt.user_id, prompt)  # who has no rewards needs no row
        return dataclasses.replace(prompt, preference_id=now.preference_id, history_id=now.history_id)

    return dataclasses.replace(unit, prompt_records=tuple(map(renamed, unit.prompt_records)))


def _without(unit: Rollouts, user: str) -> Rollouts:
    """A unit as if the user's prompts had not been in it; rows of failed rewards are counted anew."""
    kept = np.array([prompt.user_id != user for prompt in unit.prompt_records], bool)
    rows = kept[unit.prompt_index]
    place = np.cumsum(kept) - 1
    arrays = ("completions", "completion_lengths", "behaviour_log_probs", "truncated", "rewards")
    return dataclasses.replace(
        unit,
        work=dataclasses.replace(unit.work, failed_rewards=_failures(unit.work.failed_rewards, unit, kept)),
        prompt_records=tuple(prompt for prompt, stays in zip(unit.prompt_records, kept) if stays),
        prompts=unit.prompts[kept], prompt_lengths=unit.prompt_lengths[kept],
        prompt_index=place[unit.prompt_index[rows]].astype(np.int32),
        texts=tuple(text for text, stays in zip(unit.texts, rows) if stays),
        reward_components={name: values[rows] for name, values in unit.reward_components.items()},
        reward_failures=_failures(unit.reward_failures, unit, kept),
        **{name: getattr(unit, name)[rows] for name in arrays},
    )  # fmt: skip


def _failures(failures: Sequence[RewardFailure], unit: Rollouts, kept: np.ndarray) -> tuple[RewardFailure, ...]:
    dropped = sum(failure.policy == "drop" for failure in unit.reward_failures)
    per_prompt = (len(unit.rewards) + dropped) // max(1, len(unit.prompt_records))
    place = np.cumsum(kept) - 1
    return tuple(
        dataclasses.replace(f, row=int(place[f.row // per_prompt]) * per_prompt + f.row % per_prompt) for f in failures if kept[f.row // per_prompt]
    )


def _asked_by(steps: Sequence[Step], user: str) -> set[tuple[int, str]]:
    return {(step.number, p.prompt_id) for step in steps for unit in step.units for p in unit.prompt_records if p.user_id == user}


def _write(
    saved: Saved, config: Any, identity: Mapping[str, Any], out: epath.Path, history: RewardHistory, steps: Sequence[Step],
    *, gone: set[tuple[int, str]] = frozenset(),
) -> None:
    """Writes the new run directory: records first, the checkpoint last, so that a directory with a checkpoint is whole."""
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is in use: give a new directory with --out")
    source, target = saved.directory, RunDirectory(out)
    target.write_config(settings.flat(config))
    samples: dict[int, list[dict[str, Any]]] = {}
    for sample in source.samples():
        if (sample["step"], sample["prompt_id"]) not in gone:
            samples.setdefault(sample["step"], []).append(sample)
    records = {record["step"]: record for record in source.metrics()}
    for step in steps:
        ids = {p.prompt_id: p.preference_id for unit in step.units for p in unit.prompt_records}
        theirs = [sample | {"preference_id": ids[sample["prompt_id"]]} for sample in samples.get(step.number, [])]
        target.write_verdicts(step.units)
        target.write_step(records.get(step.number, {"step": step.number}), theirs, step.units)
    for record in source.evaluations():
        if record["step"] <= saved.learner.step:
            target.write_evaluation(record)
    state, learner = saved.learner.state, saved.learner
    places = jax.tree.map(lambda old: old.sharding, state.history)
    checkpoints = Checkpoints(out / "checkpoints", identity=assembly.run_identity(config, identity, saved.base))
    try:
        versions = {v: weights for v, weights in learner.versions.items() if v != learner.step}
        checkpoints.save(state.replace(history=parallel.place(history, places)), versions, wait=True)
    finally:
        checkpoints.close()


def table(history: RewardHistory) -> list[str]:
    """Returns the histories as lines for the terminal, a block for each reward component that is kept apart.

    Args:
        history: [K] or [C, K], or with the slots of a window before K, on the host.
    """
    lines = []
    flat = {name: np.asarray(getattr(history, name)).reshape(-1, history.count.shape[-1]) for name in ("count", "weight", "mean", "m2")}
    for block in range(flat["count"].shape[0]):
        lines += [f"component or slot {block}"] if flat["count"].shape[0] > 1 else []
        lines.append(f"{'row':>4} {'rewards':>9} {'count for':>10} {'mean':>10} {'deviation':>10}")
        for row in range(flat["count"].shape[1]):
            count, weight, mean, m2 = (flat[name][block, row] for name in ("count", "weight", "mean", "m2"))
            deviation = np.sqrt(max(m2, 0.0) / (count * weight)) if count * weight > 0 else 0.0
            lines.append(f"{row:>4} {count:>9} {count * weight:>10.1f} {mean:>10.4f} {deviation:>10.4f}")
    return lines
