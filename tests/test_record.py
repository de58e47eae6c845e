"""Recording without training: what a run's first step generates, resumable, with the difficulty of the prompts; and it trains a run later."""

import numpy as np
import pytest
import small_config
from stops import StopAt

from pgrpo_jax.preemption import EXIT_PREEMPTED, Stop
from pgrpo_jax.record import record
from pgrpo_jax.rollout_files import find_rollouts, load_rollouts
from pgrpo_jax.run_directory import RunDirectory
from pgrpo_jax.structs import RewardFailure
from pgrpo_jax.tasks import difficulty, letters

CHANGES = {"num_steps": 3}


pytestmark = pytest.mark.usefixtures("standard_promotion")


def run(workdir, stop=None, **changes):
    said = []
    changes = CHANGES | changes
    status = record(small_config.config(**changes), identity=small_config.identity(**changes), workdir=workdir, stop=stop or Stop(), say=said.append)
    return status, said


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("recorded") / "run"
    status, said = run(workdir)
    assert status == 0 and len(said) == 4 and said[0].startswith("step 1 of 3: 8 completions, mean reward ")
    return workdir


def units(workdir):
    return [unit for file in find_rollouts(workdir) for unit in load_rollouts(file)]


def test_all_steps_are_of_the_untrained_policy(recorded):
    assert [file.name for file in find_rollouts(recorded)] == [f"step_{n:06d}.npz" for n in (1, 2, 3)]
    assert [(u.work.index, u.work.step, u.work.version) for u in units(recorded)] == [(i, i // 2, 0) for i in range(6)]
    assert not (recorded / "metrics.jsonl").exists() and not (recorded / "checkpoints").exists()
    assert RunDirectory(recorded).config()["num_steps"] == 3


def test_difficulty_is_that_of_the_recorded_rewards(recorded):
    found = difficulty.read(recorded / "difficulty.json")
    rewards = {}
    for unit in units(recorded):
        for p, reward in zip(unit.prompt_index, unit.rewards):
            rewards.setdefault(unit.prompt_records[p].prompt_id, []).append(float(reward))
    assert set(found) == set(rewards)
    for name, values in rewards.items():
        assert found[name] == pytest.approx((np.mean(values), np.std(values), len(values)))


def test_a_stopped_recording_goes_on_where_it_was(recorded, tmp_path):
    statuses = [run(tmp_path / "torn", StopAt(count))[0] for count in (1, 4, 3)]
    assert statuses == [EXIT_PREEMPTED] * 3 and not (tmp_path / "torn" / "difficulty.json").exists()
    assert run(tmp_path / "torn")[0] == 0
    for ours, theirs in zip(units(tmp_path / "torn"), units(recorded), strict=True):
        assert (ours.work, ours.texts) == (theirs.work, theirs.texts)
        np.testing.assert_array_equal(ours.behaviour_log_probs, theirs.behaviour_log_probs)
    assert (tmp_path / "torn" / "difficulty.json").read_bytes() == (recorded / "difficulty.json").read_bytes()


def test_more_steps_can_be_recorded_later_but_not_others(tmp_path):
    assert run(tmp_path / "run", num_steps=1)[0] == 0
    with pytest.raises(ValueError, match=r"holds rollouts of another configuration \(seed: 0 there, 5 here\): use another --workdir"):
        run(tmp_path / "run", seed=5)
    assert run(tmp_path / "run", num_steps=2)[1][0].startswith("step 2 of 2")


def test_a_training_run_is_left_alone(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds a training run"):
        run(tmp_path)
    with pytest.raises(ValueError, match="distributed.enabled = True has no place in recording"):
        run(tmp_path / "other", distributed__enabled=True, learner__num_devices=0)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_failed_rewards_go_on_record_and_are_repeated(tmp_path, monkeypatch):
    def fails(self, prompt, answer):
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(letters.Letters, "reward", fails)
    status, said = run(tmp_path / "run", num_steps=1, rewards__on_failure="drop")
    assert status == 0 and said[0] == "step 1 of 1: 0 completions, no rewards" and said[1].endswith("0 prompts")
    verdicts = RunDirectory(tmp_path / "run").verdicts("train")
    assert sorted(verdicts) == [(0, 0), (1, 0)] and all(isinstance(failure, RewardFailure) for failure in verdicts[0, 0])
    monkeypatch.undo()
    (tmp_path / "run" / "rollouts" / "step_000001.npz").unlink()
    assert run(tmp_path / "run", num_steps=1, rewards__on_failure="drop")[1][0] == "step 1 of 1: 0 completions, no rewards"
