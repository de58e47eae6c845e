"""The records of a run: durable at once, standard JSON, and after a resume no step missing or twice, on disk and in a bucket."""

import dataclasses
import json
import os
import pathlib
import signal
import struct
import subprocess
import sys

import fsspec
from fsspec.implementations.memory import MemoryFileSystem
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from pgrpo_jax.rollout_files import load_rollouts
from pgrpo_jax.run_directory import RunDirectory, write_atomically
from pgrpo_jax.structs import Prompt, RewardFailure, Rollouts, Work

ROOT = pathlib.Path(__file__).parent.parent


def rollouts(step):
    return Rollouts(
        work=Work(index=step, step=step - 1, version=step - 1), prompt_records=(Prompt("u", "hello", 0, {}),),
        prompts=np.ones((1, 2), np.int32),
        prompt_lengths=np.array([2], np.int32), completions=np.full((2, 2), step, np.int32), completion_lengths=np.array([2, 1], np.int32),
        prompt_index=np.zeros(2, np.int32), behaviour_log_probs=np.zeros((2, 2), np.float32), truncated=np.zeros(2, bool), texts=("a", "b"),
        rewards=np.zeros(2, np.float32), reward_components={})


def sample(step, i):
    return {"step": step, "prompt_id": f"u{i}", "preference_id": i, "prompt": "p\u2028\n", "answer": "é \udc80", "reward": 0.5,
            "advantage": -1.0, "truncated": False}


def write(run, step):
    run.write_step({"step": step, "reward": step / 7}, [sample(step, 0), sample(step, 1)], [rollouts(step)])


def recorded(run):
    steps = [record["step"] for record in run.metrics()]
    assert [record["step"] for record in run.samples()] == [step for step in steps for _ in range(2)]
    files = sorted(path.name for path in (run.path / "rollouts").iterdir())
    assert files == [f"step_{step:06d}.npz" for step in steps]
    return steps


class Bucket(MemoryFileSystem):
    """Objects in memory under s3://; like those of a bucket they can not be appended to."""

    protocol = "s3"
    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(str(path).removeprefix("s3:/"))

    def _open(self, path, mode="rb", **kwargs):
        assert "a" not in mode and "+" not in mode, f"{path} opened with mode {mode}"
        return super()._open(path, mode, **kwargs)


@pytest.fixture(params=["disk", "bucket"])
def workdir(request, tmp_path):
    if request.param == "disk":
        return tmp_path / "run"
    fsspec.register_implementation("s3", Bucket, clobber=True)
    Bucket.store.clear()
    return "s3://bucket/run"


def test_steps_are_read_back(workdir):
    run = RunDirectory(workdir)
    run.write_config({"seed": 0, "generation.prompt_buckets": (64, 128), "algorithm.clip_low": None})
    for step in (1, 2, 3):
        write(run, step)
    assert run.config() == {"seed": 0, "generation.prompt_buckets": [64, 128], "algorithm.clip_low": None}
    assert recorded(run) == [1, 2, 3]
    assert run.metrics()[1] == {"step": 2, "reward": 2 / 7}
    assert run.samples()[3] == sample(2, 1)
    assert load_rollouts(run.path / "rollouts" / "step_000003.npz")[0].work == Work(index=3, step=2, version=2)


def test_resume_leaves_no_step_missing_or_twice(workdir):
    run = RunDirectory(workdir)
    run.truncate_after(0)
    run.write_evaluation({"step": 0, "reward": 0.1})
    for step in range(1, 8):
        write(run, step)
    run.write_evaluation({"step": 5, "reward": 0.2})
    run.write_evaluation({"step": 7, "reward": 0.3})
    run.write_summary({"steps": 7})
    resumed = RunDirectory(workdir)
    resumed.truncate_after(5)
    assert recorded(resumed) == [1, 2, 3, 4, 5]
    assert [record["step"] for record in resumed.evaluations()] == [0, 5]
    assert resumed.summary() is None
    for step in (6, 7):
        write(resumed, step)
    assert recorded(resumed) == [1, 2, 3, 4, 5, 6, 7]
    resumed.truncate_after(7)
    assert recorded(resumed) == [1, 2, 3, 4, 5, 6, 7]


def test_summary_of_a_finished_run_is_kept(workdir):
    run = RunDirectory(workdir)
    run.write_summary({"steps": 7, "state_sha256": "ab"})
    run.truncate_after(7)
    assert run.summary() == {"steps": 7, "state_sha256": "ab"}


def test_a_line_torn_anywhere_costs_only_itself(tmp_path):
    run = RunDirectory(tmp_path)
    for step in (1, 2, 3):
        write(run, step)
    for name, read in (("metrics.jsonl", run.metrics), ("samples.jsonl", run.samples)):
        whole = (tmp_path / name).read_bytes()
        last = whole[:-1].rindex(b"\n") + 1
        expected = [json.loads(line) for line in whole[:last].splitlines()]
        for cut in {last, last + 1, (last + len(whole)) // 2, len(whole) - 2, len(whole) - 1}:
            (tmp_path / name).write_bytes(whole[:cut])
            assert read() == expected  # the report of a running run
            run.truncate_after(3)
            assert (tmp_path / name).read_bytes() == whole[:last]
        (tmp_path / name).write_bytes(whole)


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    run = RunDirectory(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        run.truncate_after(3)


def test_json_is_standard(tmp_path):
    run = RunDirectory(tmp_path)
    record = {"step": np.int32(1), "loss": float("nan"), "kl": np.float32("inf"), "reward": jnp.float32(0.5)}
    record |= {"list": np.arange(2), "deep": {"a": [-np.inf]}}
    run.write_step(record, [], [])
    run.write_summary({"steps": 1, "wall_secs": float("nan")})

    def refuse(literal):
        raise AssertionError(f"{literal} is not JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 1, "loss": None, "kl": None, "reward": 0.5, "list": [0, 1], "deep": {"a": [None]}}
    assert json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse) == {"steps": 1, "wall_secs": None}


def test_a_step_is_refused_twice_and_with_samples_of_another(workdir):
    run = RunDirectory(workdir)
    write(run, 1)
    with pytest.raises(ValueError, match=r"step 1 is already recorded.*truncate_after\(0\)"):
        write(run, 1)
    with pytest.raises(ValueError, match=r"samples of steps \[3\]"):
        run.write_step({"step": 2}, [sample(3, 0)], [])
    assert recorded(run) == [1]


def test_no_step_is_lost_when_the_process_is_killed_at_once(tmp_path):
    program = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[1]); sys.path.insert(0, sys.argv[2])\n"
        "from test_run_directory import RunDirectory, write\n"
        "run = RunDirectory(sys.argv[3], tensorboard=True)\n"
        "for step in (1, 2, 3): write(run, step)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n")
    done = subprocess.run([sys.executable, "-c", program, str(ROOT), str(ROOT / "tests"), str(tmp_path)], timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    assert recorded(RunDirectory(tmp_path)) == [1, 2, 3]
    assert [event.step for event in events(tmp_path) if event.HasField("summary")] == [1, 2, 3]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "summary.json"
    write_atomically(path, b"old")

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    monkeypatch.undo()
    write_atomically(path, b"new")
    assert [file.name for file in path.parent.iterdir()] == ["summary.json"] and path.read_bytes() == b"new"


def test_leftovers_of_a_kill_are_swept(tmp_path):
    run = RunDirectory(tmp_path)
    write(run, 1)
    (tmp_path / "rollouts" / "step_000002.npz").write_bytes(b"written, but its line is not")
    (tmp_path / "rollouts" / "step_000003.npz.partial").write_bytes(b"torn")
    (tmp_path / "config.json.partial").write_bytes(b"torn")
    run.truncate_after(1)
    assert recorded(run) == [1] and not (tmp_path / "config.json.partial").exists()


def events(workdir):
    """Reads TensorBoard files by their format: length (8 bytes), checksum (4), content, checksum (4)."""
    found = []
    for path in sorted((RunDirectory(workdir).path / "tensorboard").iterdir()):
        content, start = path.read_bytes(), 0
        while start < len(content):
            (length,) = struct.unpack_from("<Q", content, start)
            found.append(event_pb2.Event.FromString(content[start + 12:start + 12 + length]))
            start += length + 16
    return found


def test_tensorboard_says_the_same_and_purges_on_resume(workdir):
    run = RunDirectory(workdir, tensorboard=True)
    run.truncate_after(0)
    run.write_step({"step": 1, "preference_group/0/reward": 0.25, "loss": float("nan"), "staleness": np.int32(3)}, [], [])
    write(run, 2)
    run.close()
    first = events(workdir)
    values = [{value.tag: value.simple_value for value in event.summary.value} for event in first if event.HasField("summary")]
    assert values[0] == {"preference_group/0/reward": 0.25, "staleness": 3.0}
    assert values[1] == {"reward": pytest.approx(2 / 7)}
    resumed = RunDirectory(workdir, tensorboard=True)
    resumed.truncate_after(1)
    resumed.close()
    starts = [event.step for event in events(workdir) if event.session_log.status == event_pb2.SessionLog.START]
    assert sorted(starts) == [1, 2]  # TensorBoard drops what earlier files hold from these steps on


def test_without_the_flag_no_tensorboard_files(tmp_path):
    run = RunDirectory(tmp_path)
    run.truncate_after(0)
    write(run, 1)
    run.close()
    assert not (tmp_path / "tensorboard").exists()


def failing(step, *failures, split="train"):
    unit = rollouts(step)
    return dataclasses.replace(unit, work=dataclasses.replace(unit.work, split=split), reward_failures=failures)


HANG, CRASH = RewardFailure(1, "timeout after 30 s", "zero"), RewardFailure(0, "ValueError: \udc80\u2028", "drop")


def test_verdicts_are_read_back_by_unit_and_split_and_survive_a_resume(workdir):
    run = RunDirectory(workdir)
    run.write_config({})
    run.write_verdicts([rollouts(1), rollouts(2)])
    assert run.verdicts("train") == {} and not (run.path / "verdicts.jsonl").exists()
    run.write_verdicts([failing(1, CRASH, HANG), rollouts(2)])
    run.write_verdicts([failing(3, HANG), failing(3, CRASH, split="test")])
    write(run, 1)
    resumed = RunDirectory(workdir)
    resumed.truncate_after(0)
    assert recorded(resumed) == []
    assert resumed.verdicts("train") == {(1, 0): (CRASH, HANG), (3, 2): (HANG,)}
    assert resumed.verdicts("test") == {(3, 2): (CRASH,)}
    lines = [json.loads(line) for line in (run.path / "verdicts.jsonl").read_text().splitlines()]
    assert lines[0] == {"split": "train", "index": 1, "version": 0, "row": 0, "reason": "ValueError: \udc80\u2028", "policy": "drop"}


def test_a_verdict_is_not_written_twice_and_another_version_is_another_answer(workdir):
    run = RunDirectory(workdir)
    run.write_config({})
    unit = failing(1, HANG)
    run.write_verdicts([unit, unit])
    run.write_verdicts([failing(1, HANG, CRASH)])  # the unit made again: one repeated, one new
    later = dataclasses.replace(unit, work=dataclasses.replace(unit.work, version=7))
    run.write_verdicts([later])
    assert RunDirectory(workdir).verdicts("train") == {(1, 0): (HANG, CRASH), (1, 7): (HANG,)}
    assert len((run.path / "verdicts.jsonl").read_text().splitlines()) == 3


def test_a_torn_verdict_costs_only_itself(tmp_path):
    run = RunDirectory(tmp_path)
    run.write_verdicts([failing(1, HANG), failing(2, CRASH)])
    path = tmp_path / "verdicts.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    run.truncate_after(0)
    run.write_verdicts([failing(3, HANG)])
    assert run.verdicts("train") == {(1, 0): (HANG,), (3, 2): (HANG,)}


def test_a_verdict_survives_a_kill_at_once(tmp_path):
    program = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[1]); sys.path.insert(0, sys.argv[2])\n"
        "from test_run_directory import HANG, RunDirectory, failing\n"
        "RunDirectory(sys.argv[3]).write_config({})\n"
        "RunDirectory(sys.argv[3]).write_verdicts([failing(1, HANG)])\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n")
    done = subprocess.run([sys.executable, "-c", program, str(ROOT), str(ROOT / "tests"), str(tmp_path / "new")], timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    assert RunDirectory(tmp_path / "new").verdicts("train") == {(1, 0): (HANG,)}
