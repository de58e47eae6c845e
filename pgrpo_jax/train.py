"""The training program: one loop, the same text in every deployment. Calling it again resumes.

    prompts → rollouts → rewards → advantages → update → weights, and round again
"""

import os
import time
from typing import Any, Sequence

import jax
import numpy as np
from etils import epath

from pgrpo_jax import assembly, evaluate, settings
from pgrpo_jax.actor import Actor
from pgrpo_jax.checkpoints import Checkpoints, state_sha256
from pgrpo_jax.console import Console
from pgrpo_jax.controller import Controller
from pgrpo_jax.engines.inline import InlineEngine
from pgrpo_jax.learner import Learner
from pgrpo_jax.preemption import EXIT_PREEMPTED, Preempted, Stop
from pgrpo_jax.run_directory import RunDirectory
from pgrpo_jax.structs import Rollouts

_POLL_SECS = 10.0


class Run:
    """One run: its parts, and the phases of the program over them. Use through `train`."""

    def __init__(self, config: Any, identity: dict[str, Any], workdir: epath.PathLike, stop: Stop):
        self._started = time.perf_counter()
        self._config, self._stop = config, stop
        settings.check(config, num_devices=jax.local_device_count())
        check_workdir(workdir)
        task = assembly.load_task(config)
        stop.check("start-up")
        base = assembly.load_base(config, task)
        stop.check("start-up")
        self._evaluator: Actor = assembly.make_evaluator(config, base, task)
        self._untrained = base.params
        self.directory = RunDirectory(workdir, tensorboard=config.metrics.tensorboard)
        self.checkpoints = Checkpoints(
            self.directory.path / "checkpoints", identity=assembly.run_identity(identity, base), keep=config.checkpoint.keep
        )
        self.learner: Learner = assembly.make_learner(config, base, self.checkpoints)
        self.engine = InlineEngine(assembly.make_actor(config, base, task))
        self.resumed = self.learner.restore()
        self.directory.truncate_after(self.learner.step)
        self.directory.write_config(_flat(config))
        self._earlier_secs = self._recorded_secs()

    def _recorded_secs(self) -> float:
        """Wall seconds of the attempts before this one, as far as they were recorded."""
        records = self.directory.metrics()
        return float(records[-1]["wall_secs"]) if records else 0.0

    def wall_secs(self) -> float:
        """Returns seconds spent on the run, earlier attempts included."""
        return self._earlier_secs + time.perf_counter() - self._started

    def evaluation_before(self) -> dict[str, Any]:
        """Returns the evaluation of the untrained policy, whose parameters are let go afterwards; a resumed run finds it on record."""
        trained, untrained, self._untrained = self.learner.state.trainable, self._untrained, None
        if self.learner.step == 0:
            return self._evaluation(trained, 0)
        num_prompts = self._config.evaluation.num_prompts
        record = evaluate.recorded(self.directory, self._evaluator, step=0, num_prompts=num_prompts)
        if record is not None:
            return record
        return self._evaluation(jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), untrained, trained), 0)

    def evaluation_after(self) -> dict[str, Any]:
        """Returns the evaluation of the policy as it is now."""
        return self._evaluation(self.learner.state.trainable, self.learner.step)

    def _evaluation(self, weights: Any, step: int) -> dict[str, Any]:
        num_prompts = self._config.evaluation.num_prompts
        return evaluate.evaluation(self.directory, self._evaluator, weights, step=step, num_prompts=num_prompts, stop=self._stop)

    def loop(self, console: Console) -> None:
        """Generates and trains until the last step, or until a stop is requested."""
        config, learner, engine = self._config, self.learner, self.engine
        controller = Controller(
            settings.schedule(config),
            num_steps=config.num_steps,
            first_step=learner.step,
            next_work=int(learner.state.next_work),
            work_per_step=config.prompts_per_step // config.prompts_per_work,
        )
        engine.publish(learner)
        checkpoint_secs = 0.0
        while learner.step < config.num_steps:
            self._stop.check("training")
            for work in controller.due(learner.step):
                engine.submit(work)
            for event in engine.poll(timeout_secs=_POLL_SECS):
                controller.on(event)
            if not controller.ready(learner.step):
                continue
            self._stop.check("training")
            rollouts = controller.take(learner.step)
            start = time.perf_counter()
            metrics, advantages = learner.update(rollouts)
            metrics |= {"update_secs": time.perf_counter() - start, "checkpoint_secs": checkpoint_secs, "wall_secs": self.wall_secs()}
            engine.publish(learner)
            record = {"step": learner.step} | metrics | generation_metrics(rollouts)
            samples = samples_of(rollouts, advantages, step=learner.step)
            # The step goes on record before its checkpoint: a committed step is never missing from the records.
            self.directory.write_step(record, samples, rollouts)
            console.step(record, samples)
            start = time.perf_counter()
            if learner.step % config.checkpoint.save_every == 0 and learner.step < config.num_steps:
                learner.save()
            checkpoint_secs = time.perf_counter() - start

    def summary(self, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
        """Returns the content of summary.json, written now unless the run finished earlier with the same evaluations."""
        evaluation = {"before": before, "after": after, "baselines": after["baselines"]}
        summary = self.directory.summary()
        if summary is None or summary["evaluation"] != evaluation:
            summary = self._summary(evaluation)
            self.directory.write_summary(summary)
        return summary

    def _summary(self, evaluation: dict[str, Any]) -> dict[str, Any]:
        return {
            "steps": self.learner.step,
            "wall_secs": self.wall_secs(),
            "evaluation": evaluation,
            "state_sha256": state_sha256(self.learner.state),
            "config": _flat(self._config),
            "reproducible": True,
        }

    def close(self) -> None:
        """Waits for checkpoints in the background and closes the records."""
        self.engine.close()
        self.checkpoints.close()
        self.directory.close()


def train(config: Any, *, identity: dict[str, Any], workdir: epath.PathLike, stop: Stop) -> int:
    """Trains to the end, or until a stop is requested; calling it again goes on from the last committed checkpoint.

    Args:
        config: every key of configs/base.py.
        identity: its identity keys, flat.
        workdir: the run directory; may be a bucket.
        stop: set by SIGTERM or SIGINT.

    Returns:
        The exit status: 0 when the last step is reached and evaluated, 75 when the run was stopped and saved.

    Raises:
        ValueError: the configuration, the data, the model or the checkpoint can not be used; one line (or one for each error).
    """
    try:
        run = Run(config, identity, workdir, stop)
    except Preempted:
        return EXIT_PREEMPTED
    learner = run.learner
    try:
        with Console(config.num_steps, start_step=learner.step, samples_every=config.metrics.samples_every) as console:
            if run.resumed:
                console.note(f"resumed from step {learner.step} in {run.directory.path}")
            try:
                asked = f"{config.evaluation.num_prompts} users, {config.evaluation.completions_per_prompt} answers each"
                console.note(f"held-out evaluation of the untrained policy: {asked}")
                before = run.evaluation_before()
                if learner.step == 0:
                    console.evaluation(before, None)
                run.loop(console)
                learner.save(wait=True)
                console.note(f"held-out evaluation of the trained policy: {asked}")
                after = run.evaluation_after()
            except Preempted as reason:
                if learner.step > 0:
                    learner.save(wait=True)
                console.note(f"{reason}: step {learner.step} is saved in {run.directory.path}; run the same command to go on")
                return EXIT_PREEMPTED
            summary = run.summary(before, after)
            console.evaluation(before, after)
            console.note(f"state_sha256 {summary['state_sha256']}")
    finally:
        run.close()
    return 0


def check_workdir(workdir: epath.PathLike) -> None:
    """Refuses a run directory that nothing could be written to, without making it.

    Raises:
        NotADirectoryError: it, or a part of its path, is a file.
        PermissionError: it may not be written to.
    """
    path = epath.Path(workdir)
    if "://" in os.fspath(path):  # a bucket says so itself, at the first write
        return
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"--workdir {path}: {existing} is a file, a directory is needed: give another path")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"--workdir {path}: {existing} may not be written to: give another path or change its permissions")


def generation_metrics(rollouts: Sequence[Rollouts]) -> dict[str, float]:
    """Returns the metrics that only the rollouts know.

    Args:
        rollouts: of one step.
    """
    secs = sum(r.generation_secs for r in rollouts)
    tokens = sum(int(r.completion_lengths.sum()) for r in rollouts)
    components = {name: np.concatenate([r.reward_components[name] for r in rollouts]).mean() for name in rollouts[0].reward_components}
    return {
        "answered": float(components["answered"]),
        "truncated": float(np.concatenate([r.truncated for r in rollouts]).mean()),
        "generation_secs": secs,
        "tokens_per_sec": tokens / secs if secs > 0 else float("nan"),
    }


def samples_of(rollouts: Sequence[Rollouts], advantages: np.ndarray, *, step: int) -> list[dict[str, Any]]:
    """Returns one record for each completion of a step, for samples.jsonl.

    Args:
        rollouts: of one step, in canonical order.
        advantages: [N], in the same order.
        step: updates done.
    """
    rows = [(r, i) for r in rollouts for i in range(len(r.texts))]
    return [
        {
            "step": step,
            "prompt_id": r.prompt_records[r.prompt_index[i]].prompt_id,
            "preference_id": r.prompt_records[r.prompt_index[i]].preference_id,
            "prompt": r.prompt_records[r.prompt_index[i]].text,
            "answer": r.texts[i],
            "reward": float(r.rewards[i]),
            "advantage": float(advantage),
            "truncated": bool(r.truncated[i]),
        }
        for (r, i), advantage in zip(rows, advantages, strict=True)
    ]


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """A nested configuration as {dotted key: plain value}."""
    flat = {}
    for key, value in config.items():
        plain = list(value) if isinstance(value, tuple) else value
        flat |= _flat(value, f"{prefix}{key}.") if hasattr(value, "items") else {f"{prefix}{key}": plain}
    return flat
