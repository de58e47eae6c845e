"""The training program: one loop, the same text in every deployment. Calling it again resumes.

    prompts → rollouts → rewards → advantages → update → weights, and round again
"""

import contextlib
import sys
import time
from typing import Any

from etils import epath

from pgrpo_jax import evaluate, settings
from pgrpo_jax.alarms import Watch
from pgrpo_jax.console import Console
from pgrpo_jax.controller import Controller
from pgrpo_jax.deployment import deploy
from pgrpo_jax.engines import gather, issue, LearnerLost
from pgrpo_jax.preemption import EXIT_PREEMPTED, Preempted, remove_stale_lock, Stop
from pgrpo_jax.step_records import generation_metrics, samples_of


class Run:
    """One run: its parts, and the phases of the program over them. Use through `train`."""

    def __init__(self, config: Any, identity: dict[str, Any], workdir: epath.PathLike, stop: Stop):
        self._started = time.perf_counter()
        self._config = config
        settings.check(config)
        self.parts = deploy(config, identity=identity, workdir=workdir, stop=stop)
        self.learner, self.engine, self.directory = self.parts.learner, self.parts.engine, self.parts.directory
        self._controller: Controller | None = None
        self._stop = self.parts.stop  # of all processes, where this is one of several
        with contextlib.ExitStack() as on_error:
            on_error.callback(self.parts.close)
            self.resumed = self.restore()
            self.directory.write_config(settings.flat(config))
            records = self.directory.metrics()
            self._earlier_secs = float(records[-1]["wall_secs"]) if records else 0.0
            on_error.pop_all()

    def restore(self) -> bool:
        """Goes on from the newest committed step; returns whether there was one. A learner that is lost is made again; actors keep running."""
        while True:
            try:
                if self.learner.lost:
                    self.learner.restart()
                resumed = self.learner.restore()
            except LearnerLost:
                continue
            self.directory.truncate_after(self.learner.step)
            return resumed

    def wall_secs(self) -> float:
        """Returns seconds spent on the run, earlier attempts included."""
        return self._earlier_secs + time.perf_counter() - self._started

    def loop(self, console: Console) -> None:
        """Generates and trains until the last step, or until a stop is requested."""
        config, learner, engine = self._config, self.learner, self.engine
        earlier = 0 if self._controller is None else self._controller.next_work(learner.step)
        self._controller = controller = Controller(
            settings.schedule(config),
            num_steps=config.num_steps,
            first_step=learner.step,
            next_work=max(learner.next_work, earlier),  # "freshest" skips what may still be under way for a learner that was lost
            work_per_step=settings.work_per_step(config),
            lease_secs=config.lease_secs,
            failed_rewards=self.parts.verdicts("train"),
        )
        engine.publish(learner)
        secs = {"checkpoint_secs": 0.0}
        watch = Watch()
        for record in self.directory.metrics():  # so that a resumed run raises the alarms of one that was never stopped
            watch.step(record)
        while learner.step < config.num_steps:
            with timed(secs, "wait_secs"):
                rollouts = gather(controller, engine, learner.step, stop=self._stop, phase="training")
            self._stop.check("training")
            self.directory.write_verdicts(rollouts)  # before they are trained on: a resumed run must repeat them
            with timed(secs, "update_secs"):
                metrics, advantages = learner.update(rollouts, next_work=controller.next_work(learner.step + 1))
            with timed(secs, "publish_secs"):
                engine.publish(learner)
            issue(controller, engine, learner.step)
            record = {"step": learner.step} | metrics | secs | {"wall_secs": self.wall_secs()}
            record |= controller.metrics() | generation_metrics(rollouts, num_preference_groups=settings.num_preference_groups(config))
            record["alarms"] = [alarm._asdict() for alarm in watch.step(record)]
            samples = samples_of(rollouts, advantages, step=learner.step)
            # The step goes on record before its checkpoint: a committed step is never missing from the records.
            self.directory.write_step(record, samples, rollouts)
            console.step(record, samples)
            with timed(secs, "checkpoint_secs"):
                if learner.step % config.checkpoint.save_every == 0 and learner.step < config.num_steps:
                    learner.save()
            if learner.stopping:  # the node of one of its processes is going away
                learner.save(wait=True)
                learner.kill()
                raise LearnerLost(f"a process of the learner was asked to stop; step {learner.step} is saved")

    def to_the_end(self, console: Console) -> tuple[dict[str, Any], dict[str, Any]]:
        """Evaluates, trains, saves and evaluates again; returns both evaluations."""
        asked = f"{self._config.evaluation.num_prompts} users, {self._config.evaluation.completions_per_prompt} answers each"
        console.note(f"held-out evaluation of the untrained policy: {asked}")
        before = evaluate.evaluation(self._config, self.parts, step=0)
        if self.learner.step == 0:
            console.evaluation(before, None)
        self.loop(console)
        self.learner.save(wait=True)
        console.note(f"held-out evaluation of the trained policy: {asked}")
        return before, evaluate.evaluation(self._config, self.parts, step=self.learner.step)

    def summary(self, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
        """Returns the content of summary.json, written now unless the run finished earlier with the same evaluations."""
        evaluation = {"before": before, "after": after, "baselines": after["baselines"]}
        summary = self.parts.agree(self.directory.summary())
        if summary is None or summary["evaluation"] != evaluation:
            summary = {
                "steps": self.learner.step,
                "wall_secs": self.wall_secs(),
                "evaluation": evaluation,
                "state_sha256": self.learner.digest(),
                "config": settings.flat(self._config),
                "reproducible": self._config.staleness.policy == "deterministic" and not any(map(self.directory.verdicts, ("train", "test"))),
            }
            self.directory.write_summary(summary)
        return summary

    def save(self) -> None:
        """Commits the state of a run that stops; with the learner lost, the last committed step stands."""
        if self.learner.step > 0:
            with contextlib.suppress(LearnerLost):
                self.learner.save(wait=True)

    def close(self) -> None:
        """Waits for checkpoints in the background, ends every process and thread of the run, and closes the records."""
        self.parts.close()


@contextlib.contextmanager
def timed(secs: dict[str, float], name: str):
    """Notes under `name` how many seconds the block took."""
    start = time.perf_counter()
    yield
    secs[name] = time.perf_counter() - start


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
    if (said := remove_stale_lock()):
        print(said, file=sys.stderr)
    try:
        run = Run(config, identity, workdir, stop.set_budget(config.checkpoint.must_save_by))
    except Preempted:
        return EXIT_PREEMPTED
    learner = run.learner
    try:
        console = Console(
            config.num_steps, start_step=learner.step, samples_every=config.metrics.samples_every, stream=run.parts.console_stream
        )
        with console:
            if run.resumed:
                console.note(f"resumed from step {learner.step} in {run.directory.path}")
            while True:
                try:
                    if learner.lost:
                        run.restore()
                    before, after = run.to_the_end(console)
                    summary = run.summary(before, after)
                    break
                except LearnerLost as reason:
                    console.note(f"{reason}: going on from the last committed step")
                except Preempted as reason:
                    run.save()
                    console.note(f"{reason}: step {learner.step} is saved in {run.directory.path}; run the same command to go on")
                    return EXIT_PREEMPTED
            console.evaluation(before, after)
            console.note(f"state_sha256 {summary['state_sha256']}")
    finally:
        run.close()
    return 0
