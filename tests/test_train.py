"""The loop on a real, tiny model: resumed runs are the same runs to the bit, records are whole, errors touch nothing."""

import dataclasses
import json
import os
import pathlib
import shutil

import pytest
import small_config
from stops import StopAt

from pgrpo_jax import metric_table
from pgrpo_jax.controller import COUNTERS
from pgrpo_jax.preemption import EXIT_PREEMPTED, Stop
from pgrpo_jax.rollout_files import load_rollouts
from pgrpo_jax.run_directory import check_workdir, RunDirectory
from pgrpo_jax.tasks import JUDGES, TASKS, letters
from pgrpo_jax.train import train

WALL_CLOCK = {"wall_secs", "generation_secs", "wait_secs", "update_secs", "publish_secs", "checkpoint_secs", "tokens_per_sec"}
WALL_CLOCK |= {f"controller/{name}" for name in COUNTERS}  # of timing and faults


pytestmark = pytest.mark.usefixtures("standard_promotion")


def run(workdir, stop=None, **changes):
    return train(small_config.config(**changes), identity=small_config.identity(**changes), workdir=workdir, stop=stop or Stop())


def records(workdir):
    directory = RunDirectory(workdir)
    summary = directory.summary()
    return {
        "metrics": [{key: value for key, value in line.items() if key not in WALL_CLOCK} for line in directory.metrics()],
        "samples": directory.samples(),
        "evaluations": directory.evaluations(),
        "sha256": summary["state_sha256"],
        "evaluation": summary["evaluation"],
        "work": [[unit.work for unit in load_rollouts(path)] for path in sorted((pathlib.Path(workdir) / "rollouts").iterdir())],
    }


def files(directory):
    return {path: path.read_bytes() for path in sorted(pathlib.Path(directory).rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert run(workdir) == 0
    return workdir


@pytest.fixture
def copy(finished, tmp_path):
    return pathlib.Path(shutil.copytree(finished, tmp_path / "copy"))


SCHEDULES = {
    "(1, 2)": {"staleness__reload": 1, "staleness__accept": 2},
    "(4, 8)": {"staleness__reload": 4, "staleness__accept": 8},
    "(2, 8) lag 5": {"staleness__reload": 2, "staleness__accept": 8, "staleness__lag": 5},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_stopped_run_goes_on_with_the_versions_it_had(schedule, tmp_path):
    changes = SCHEDULES[schedule] | {"algorithm__kl_coefficient": 0.1, "algorithm__proximal": "generator"}
    assert run(tmp_path / "whole", **changes) == 0
    stops = 0
    for count in (3, 13, 9, 11):  # in the evaluation before, then at several places of several steps
        stops += run(tmp_path / "torn", StopAt(count), **changes) == EXIT_PREEMPTED
    assert stops == 4 and not (tmp_path / "torn" / "summary.json").exists()
    assert run(tmp_path / "torn", **changes) == 0
    whole, torn = records(tmp_path / "whole"), records(tmp_path / "torn")
    assert [line["step"] for line in torn["metrics"]] == list(range(1, 13))
    assert {line["staleness"] for line in torn["metrics"]} != {0.0}
    check_keys(RunDirectory(tmp_path / "torn").metrics())
    assert whole["metrics"][-1]["kl"] > 0 and whole["metrics"][-1]["old_kl"] > 0  # it has left the reference and what generated
    for part, value in whole.items():
        assert torn[part] == value, part


@pytest.mark.parametrize("policy", ["zero", "drop"])
def test_rewards_that_failed_are_repeated_by_a_resumed_run(policy, tmp_path, monkeypatch):
    """The reward is broken until the run is stopped, and sound afterwards: what was decided stays decided."""
    changes = {"rewards__on_failure": policy}
    sound = letters.Letters.reward

    def broken(self, prompt, answer):
        if sum(answer.encode(errors="ignore")) % 5 == 0:
            raise ArithmeticError("the judge is ill")
        return sound(self, prompt, answer)

    monkeypatch.setattr(letters.Letters, "reward", broken)
    assert run(tmp_path / "whole", **changes) == 0
    assert run(tmp_path / "torn", StopAt(17), checkpoint__save_every=100, **changes) == EXIT_PREEMPTED
    done = len(RunDirectory(tmp_path / "torn").metrics())
    assert 2 <= done < 12
    kept = [json.loads(line) for line in (tmp_path / "torn" / "verdicts.jsonl").read_text().splitlines()]
    shutil.rmtree(tmp_path / "torn" / "checkpoints")  # as if the save had not come to its end: every step is made again
    monkeypatch.setattr(letters.Letters, "reward", sound)
    assert run(tmp_path / "torn", StopAt(17), **changes) == EXIT_PREEMPTED
    whole, torn = RunDirectory(tmp_path / "whole"), RunDirectory(tmp_path / "torn")
    assert kept and {failure["policy"] for failure in kept} == {policy} and all("the judge is ill" in failure["reason"] for failure in kept)
    steps = len(torn.metrics())
    assert steps >= 2 and [line["reward"] for line in torn.metrics()] == [line["reward"] for line in whole.metrics()][:steps]
    assert torn.samples() == [sample for sample in whole.samples() if sample["step"] <= steps]
    rows = {"zero": 8, "drop": 8 - len([f for f in kept if f["split"] == "train" and f["index"] in (0, 1)])}[policy]
    assert len([sample for sample in torn.samples() if sample["step"] == 1]) == rows
    assert whole.summary()["reproducible"] is False


def test_eight_devices_resume_to_the_bit(tmp_path):
    changes = {"prompts_per_step": 8, "num_steps": 4, "learner__num_devices": 8, "evaluation__num_prompts": 4}
    assert run(tmp_path / "whole", **changes) == 0
    assert run(tmp_path / "torn", StopAt(12), **changes) == EXIT_PREEMPTED
    assert 0 < len(RunDirectory(tmp_path / "torn").metrics()) < 4
    assert run(tmp_path / "torn", **changes) == 0
    assert records(tmp_path / "torn") == records(tmp_path / "whole")


def check_keys(lines):
    found = {metric_table.describe(key).name for line in lines for key in line}
    assert {metric.name for metric in metric_table.METRICS if not metric.option} == found
    assert all(line.keys() == lines[0].keys() for line in lines)


def test_every_metric_is_recorded_and_described(finished):
    lines = RunDirectory(finished).metrics()
    check_keys(lines)
    assert {line["kl"] for line in lines} == {None} and {line["old_kl"] for line in lines} == {0.0}
    assert {line["ratio"] for line in lines} == {1.0}


def test_a_finished_run_is_left_alone(copy, capsys):
    before = files(copy)
    assert run(copy) == 0
    shown = capsys.readouterr().out
    assert RunDirectory(copy).summary()["state_sha256"] in shown and "step 12/12" not in shown
    assert files(copy) == before


def test_other_evaluation_settings_evaluate_a_finished_run_anew(copy):
    before = RunDirectory(copy).summary()
    assert run(copy, evaluation__num_prompts=12) == 0
    after = RunDirectory(copy).summary()
    assert after["state_sha256"] == before["state_sha256"]
    assert [after["evaluation"][side]["num_prompts"] for side in ("before", "after")] == [12, 12]
    assert run(copy) == 0
    assert RunDirectory(copy).summary()["evaluation"] == before["evaluation"]  # the untrained policy's as well, from its own weights


def test_an_evaluation_that_was_deleted_is_made_again(copy):
    before = (copy / "evaluation_000000.json").read_text()
    (copy / "evaluation_000000.json").unlink()
    assert run(copy) == 0
    assert (copy / "evaluation_000000.json").read_text() == before


def test_stopped_before_the_first_step_leaves_no_checkpoint(tmp_path, capsys):
    assert run(tmp_path / "a", StopAt(1)) == EXIT_PREEMPTED  # before the model is loaded
    assert not (tmp_path / "a").exists()
    assert run(tmp_path / "b", StopAt(4)) == EXIT_PREEMPTED  # in the evaluation before
    assert not any((tmp_path / "b" / "checkpoints").iterdir()) and not RunDirectory(tmp_path / "b").metrics()
    assert "run the same command to go on" in capsys.readouterr().out


@dataclasses.dataclass(frozen=True)
class Faulty(letters.Letters):
    """A task with a strange reward for one prompt of the third step."""

    strange: float

    def reward(self, prompt, answer):
        verdict = super().reward(prompt, answer)
        poisoned = self.prompts("train", 2, 4)[1].prompt_id
        return dataclasses.replace(verdict, total=self.strange) if prompt.prompt_id == poisoned else verdict


def give(monkeypatch, strange):
    for tasks in (TASKS, JUDGES):
        monkeypatch.setitem(tasks, "letters", lambda *args, **kwargs: Faulty(**vars(letters.load(*args, **kwargs)), strange=strange))


def test_a_reward_that_is_no_number_ends_the_run_between_two_records(monkeypatch, tmp_path):
    give(monkeypatch, float("nan"))
    with pytest.raises(ValueError, match=r"^reward of prompt train-\d+-\d, answer .*: reward nan is not finite: fix the task's reward"):
        run(tmp_path)
    assert [line["step"] for line in RunDirectory(tmp_path).metrics()] == [1, 2]
    assert [step.name for step in (tmp_path / "checkpoints").iterdir()] == ["2"]
    monkeypatch.undo()
    assert run(tmp_path, StopAt(5)) == EXIT_PREEMPTED  # the checkpoint is whole
    assert (tmp_path / "checkpoints" / "2").exists()


def test_a_loss_that_is_no_number_ends_the_run_between_two_records(monkeypatch, tmp_path):
    give(monkeypatch, 3e38)
    with pytest.raises(FloatingPointError, match=r"^(loss|grad_norm) = (nan|inf) at step \d+ is not finite: .*optimiser.learning_rate"):
        run(tmp_path)
    assert [line["step"] for line in RunDirectory(tmp_path).metrics()] == [1, 2]
    assert [step.name for step in (tmp_path / "checkpoints").iterdir()] == ["2"]


def test_a_checkpoint_of_another_configuration_is_refused_with_every_difference(copy):
    before = files(copy)
    with pytest.raises(ValueError) as error:
        run(copy, optimiser__learning_rate=0.5, preset="grpo", metrics__samples_every=1)
    message = str(error.value)
    assert "\n" not in message and "use another --workdir" in message
    assert "optimiser.learning_rate: 0.003 there, 0.5 here" in message and "preset: p_grpo there, grpo here" in message
    assert "samples_every" not in message and files(copy) == before


def largest(directory):
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_a_corrupt_checkpoint_is_refused_and_nothing_is_touched(copy):
    victim = largest(copy / "checkpoints" / "12" / "state")
    content = bytearray(victim.read_bytes())
    content[::512] = bytes(byte ^ 0xFF for byte in content[::512])  # not one only: parts of the file are never read
    victim.write_bytes(content)
    before = files(copy)
    with pytest.raises(ValueError, match=r"^checkpoint \S+/12 is corrupt .*: delete that directory to go on from the step before it$"):
        run(copy)
    assert files(copy) == before
    shutil.rmtree(copy / "checkpoints" / "12")
    assert run(copy) == 0  # the remedy it names


def test_check_workdir(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    check_workdir(tmp_path)
    check_workdir(tmp_path / "new" / "deeper")
    check_workdir("gs://bucket/run")
    monkeypatch.chdir(tmp_path)
    check_workdir("relative/new")
    for path in ("file", "file/run", "file/run/deeper"):
        with pytest.raises(NotADirectoryError, match=rf"^--workdir \S*{path}: \S*file is a file, .*give another path$"):
            check_workdir(tmp_path / path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(PermissionError, match=r"may not be written to: give another path"):
        check_workdir(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
