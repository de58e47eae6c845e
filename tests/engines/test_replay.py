"""The replay engine: a run's own rollouts train it again to the bit, and what is not theirs is refused."""

import contextlib
import dataclasses
import pathlib
import shutil
import types

import jax
import numpy as np
import pytest
import small_config

from pgrpo_jax import settings
from pgrpo_jax.controller import Controller
from pgrpo_jax.deployment import deploy
from pgrpo_jax.engines import gather
from pgrpo_jax.engines.replay import ReplayEngine
from pgrpo_jax.preemption import Stop
from pgrpo_jax.record import record
from pgrpo_jax.rollout_files import find_rollouts, load_rollouts, pack_rollouts
from pgrpo_jax.run_directory import RunDirectory
from pgrpo_jax.structs import Finished, Started, Tick, Work
from pgrpo_jax.train import train

SHORT = {"num_steps": 4, "staleness__accept": 2, "algorithm__min_count": 4}


pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The directory of a finished run, off-policy by one version from its second step on."""
    workdir = tmp_path_factory.mktemp("recorded") / "run"
    config = small_config.config(**SHORT)
    assert train(config, identity=small_config.identity(**SHORT), workdir=workdir, stop=Stop()) == 0
    return workdir


def offer(*versions):
    return types.SimpleNamespace(versions=dict.fromkeys(versions))


def trained_on(config, parts, engine):
    """The loop of train.py without its records."""
    learner = parts.learner
    controller = Controller(
        settings.schedule(config), num_steps=config.num_steps, first_step=0, next_work=0, work_per_step=settings.work_per_step(config)
    )
    engine.publish(learner)
    while learner.step < config.num_steps:
        learner.update(gather(controller, engine, learner.step, stop=parts.stop, phase="test"))
        engine.publish(learner)
    return learner.digest()


def test_the_rollouts_of_a_run_train_it_again_to_the_bit(recorded, tmp_path):
    config = small_config.config(**SHORT)
    parts = deploy(config, identity=small_config.identity(**SHORT), workdir=tmp_path / "again", stop=Stop(), engine="inline")
    with contextlib.closing(parts):
        parts.engine.close()  # nothing may be generated
        digest = trained_on(config, parts, ReplayEngine(find_rollouts(recorded), task=parts.task))
    assert digest == RunDirectory(recorded).summary()["state_sha256"]


def replaying(path, **changes):
    """Configuration and identity of a run on recorded rollouts."""
    changes = changes | {"engine": "replay", "replay__path": str(path)}
    return small_config.config(**changes), small_config.identity(**changes)


def test_a_replayed_run_is_the_run_that_was_recorded(recorded, tmp_path):
    config, identity = replaying(recorded, **SHORT)
    assert train(config, identity=identity, workdir=tmp_path / "again", stop=Stop()) == 0
    ours, theirs = (RunDirectory(path).summary() for path in (tmp_path / "again", recorded))
    assert (ours["state_sha256"], ours["evaluation"]) == (theirs["state_sha256"], theirs["evaluation"])


def test_under_another_configuration_the_same_answers_are_off_policy(recorded, tmp_path):
    changes = SHORT | {"preset": "grpo", "algorithm__arm": "pooled"}
    config, identity = replaying(recorded, **changes)
    wanted = r"algorithm.arm: preference there, pooled here; preset: p_grpo there, grpo here\), .*: set staleness.policy to freshest"
    with pytest.raises(ValueError, match=wanted):
        deploy(config, identity=identity, workdir=tmp_path / "other", stop=Stop())
    assert not (tmp_path / "other").exists()
    config, identity = replaying(recorded, **changes | {"staleness__policy": "freshest", "staleness__accept": 0})
    parts = deploy(config, identity=identity, workdir=tmp_path / "other", stop=Stop())
    with contextlib.closing(parts):
        digest = trained_on(config, parts, parts.engine)
        history = jax.device_get(parts.learner.state.history)
        parts.learner.offer(4)
        parts.engine.publish(parts.learner)
        parts.engine.submit(Work(0, 0, 4, "test"))
        held_out = [event for event in parts.engine.poll(1.0) if isinstance(event, Finished)]
    assert digest != RunDirectory(recorded).summary()["state_sha256"]
    assert held_out[0].rollouts.work.split == "test" and len(held_out[0].rollouts.texts) == 8
    rewards = np.concatenate([unit.rewards for file in find_rollouts(recorded) for unit in load_rollouts(file)])
    assert history.count.tolist() == [len(rewards), 0, 0]  # the arm is this run's, the rewards are the recorded ones
    assert history.mean[0] == pytest.approx(rewards.mean(), abs=1e-6)


def test_a_recording_without_training_begins_as_the_run_does(recorded, tmp_path):
    changes = SHORT | {"num_steps": 1}
    config, identity = small_config.config(**changes), small_config.identity(**changes)
    assert record(config, identity=identity, workdir=tmp_path, stop=Stop(), say=lambda line: None) == 0
    for ours, theirs in zip(*(load_rollouts(find_rollouts(path)[0]) for path in (tmp_path, recorded)), strict=True):
        assert (ours.work, ours.texts, ours.prompt_records) == (theirs.work, theirs.texts, theirs.prompt_records)
        np.testing.assert_array_equal(ours.behaviour_log_probs, theirs.behaviour_log_probs)


def test_units_come_back_under_the_work_that_was_asked_for(recorded):
    engine = ReplayEngine(find_rollouts(recorded))
    wanted = [Work(1, 0, 0), Work(6, 3, 2), Work(0, 0, 0)]
    engine.publish(offer(0, 2))
    for work in wanted:
        engine.submit(work)
    events = engine.poll(timeout_secs=0.0)
    assert [type(event) for event in events] == [Started, Finished] * 3 + [Tick]
    assert [event.rollouts.work for event in events[1:-1:2]] == wanted and {event.worker for event in events[:-1:2]} == {"replay"}
    originals = {unit.work.index: unit for file in find_rollouts(recorded) for unit in load_rollouts(file)}
    for event in events[1:-1:2]:
        np.testing.assert_array_equal(event.rollouts.completions, originals[event.rollouts.work.index].completions)
    assert [type(event) for event in engine.poll(0.0)] == [Tick]


def test_another_version_is_refused_unless_it_is_relabelled(recorded):
    asked = Work(6, 3, 0)
    strict, lenient = ReplayEngine(find_rollouts(recorded)), ReplayEngine(find_rollouts(recorded), relabel=True)
    for engine in (strict, lenient):
        engine.publish(offer(0))
        engine.submit(asked)
    with pytest.raises(ValueError, match="unit 6 was recorded under weight version 2, version 0 must generate it: .*staleness.policy to freshest"):
        strict.poll(0.0)
    assert lenient.poll(0.0)[1].rollouts.work == asked


@pytest.mark.parametrize(
    "work, message",
    [
        (Work(8, 4, 0), r"unit 8 of split 'train' is not recorded, units 0 to 7 \(8\) are: lower num_steps"),
        (Work(0, 0, 0, "test"), "unit 0 of split 'test' is not recorded, none are"),
        (Work(0, 0, 5), r"needs weight version 5, published are \[0\]"),
    ],
)
def test_units_that_can_not_be_answered_are_named(recorded, work, message):
    engine = ReplayEngine(find_rollouts(recorded))
    engine.publish(offer(0))
    with pytest.raises(ValueError, match=message):
        engine.submit(work)


def test_units_of_another_task_are_refused(recorded):
    class Other:
        def prompts(self, split, index, size):
            return tuple(dataclasses.replace(unit_prompt, text="another") for unit_prompt in first.prompt_records)

    first = load_rollouts(find_rollouts(recorded)[0])[0]
    engine = ReplayEngine(find_rollouts(recorded), task=Other())
    engine.publish(offer(0))
    engine.submit(Work(0, 0, 0))
    with pytest.raises(ValueError, match="unit 0 was recorded with prompt .*, the task asks"):
        engine.poll(0.0)


def test_files_that_are_no_one_run_are_refused(recorded, tmp_path):
    with pytest.raises(ValueError, match="0 rollout files"):
        ReplayEngine([])
    copy = pathlib.Path(shutil.copy(find_rollouts(recorded)[0], tmp_path / "copy.npz"))
    with pytest.raises(ValueError, match="unit 0 of split 'train' is recorded in .* and in .*copy.npz"):
        ReplayEngine([*find_rollouts(recorded), copy])
    units = load_rollouts(copy)
    copy.write_bytes(pack_rollouts([units[0], units[0]]))
    with pytest.raises(ValueError, match="holds a work unit twice"):
        ReplayEngine([copy])


def test_units_of_other_splits_go_to_the_other_engine(recorded):
    class Others:
        slots, said = 3, []

        def publish(self, learner):
            self.said.append(sorted(learner.versions))

        def submit(self, work):
            self.said.append(work)

        def poll(self, timeout_secs):
            self.said.append(timeout_secs)
            return [Tick(0.5)]

        def close(self):
            self.said.append("closed")

    others = Others()
    engine = ReplayEngine(find_rollouts(recorded), others=others)
    engine.publish(offer(0))
    engine.submit(Work(3, 0, 0, "test"))
    engine.submit(Work(0, 0, 0))
    assert [type(event) for event in engine.poll(2.0)] == [Started, Finished, Tick]  # one tick, the other engine's
    assert engine.poll(2.0) == [Tick(0.5)] and engine.slots == 3
    engine.close()
    assert others.said == [[0], Work(3, 0, 0, "test"), 0.0, 2.0, "closed"]
