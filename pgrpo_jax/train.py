"""The training program: one loop, the same text in every deployment. Calling it again resumes.

    prompts → rollouts → rewards → advantages → update → weights, and round again
"""

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
from pgrpo_jax.tasks import Task

_POLL_SECS = 10.0


class Run:
    """One run: its parts, and the phases of the program over them. Use through `train`."""

    def __init__(self, config: Any, identity: dict[str, Any], workdir: epath.PathLike, stop: Stop):
        self._started = time.perf_counter()
        self._config, self._stop = config, stop
        settings.check(config, num_devices=jax.local_device_count())
        self.task: Task = assembly.load_task(config)
        stop.check("start-up")
        base = assembly.load_base(config, self.task)
        stop.check("start-up")
        self.evaluator: Actor = assembly.make_evaluator(config, base, self.task)
        self.directory = RunDirectory(workdir, tensorboard=config.metrics.tensorboard)
        self.checkpoints = Checkpoints(
            self.directory.path / "checkpoints", identity=assembly.run_identity(identity, base), keep=config.checkpoint.keep
        )
        self.learner: Learner = assembly.make_learner(config, base, self.checkpoints)
        self.engine = InlineEngine(assembly.make_actor(config, base, self.task))
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

    def evaluation(self, step: int) -> dict[str, Any]:
        """Returns the evaluation after `step` updates, made now unless it is on record."""
        for record in self.directory.evaluations():
            if record["step"] == step:
                return record
        weights = self.learner.state.trainable
        rollouts = evaluate.collect(self.evaluator, weights, version=step, num_prompts=self._config.evaluation.num_prompts, stop=self._stop)
        record = evaluate.summarise(self.task, rollouts, step=step)
        self.directory.write_evaluation(record)
        return record

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
        """Returns the content of summary.json."""
        return {
            "steps": self.learner.step,
            "wall_secs": self.wall_secs(),
            "evaluation": {"before": before, "after": after, "baselines": after["baselines"]},
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
                before = _evaluation_before(run, console)
                run.loop(console)
                learner.save(wait=True)
                after = run.evaluation(learner.step)
            except Preempted as reason:
                if learner.step > 0:
                    learner.save(wait=True)
                console.note(f"{reason}: step {learner.step} is saved in {run.directory.path}; run the same command to go on")
                return EXIT_PREEMPTED
            summary = run.summary(before, after)
            run.directory.write_summary(summary)
            console.evaluation(before, after)
            console.note(f"state_sha256 {summary['state_sha256']}")
    finally:
        run.close()
    return 0


def _evaluation_before(run: Run, console: Console) -> dict[str, Any]:
    """The evaluation of the untrained policy; a resumed run finds it on record."""
    before = run.evaluation(0) if run.learner.step == 0 else next(r for r in run.directory.evaluations() if r["step"] == 0)
    if run.learner.step == 0:
        console.evaluation(before, None)
    return before


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
        flat |= _flat(value, f"{prefix}{key}.") if hasattr(value, "items") else {f"{prefix}{key}": list(value) if isinstance(value, tuple) else value}
    return flat
