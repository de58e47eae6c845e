"""Runs that are killed or stopped, on real processes: the same command goes on and ends in the same bits."""

import json
import random
import signal
import time

import program
import pytest


def watch(workdir, cache, happened, number):
    """Starts a run, waits until something happened *in this attempt*, sends the signal; returns its exit status and output."""
    config = workdir / "config.json"  # written at every start, once the records of lost steps are gone
    earlier = config.stat().st_mtime_ns if config.exists() else 0
    process = program.start(program.command(workdir, **program.LONG), cache=cache)
    try:
        deadline = time.monotonic() + program.TIMEOUT_SECS
        while process.poll() is None and not (config.exists() and config.stat().st_mtime_ns > earlier and happened()):
            assert time.monotonic() < deadline, "nothing happened before the deadline"
            time.sleep(0.001)
        assert process.poll() is None, f"the program ended too early: {process.stdout.read()}"
        process.send_signal(number)
        if number == signal.SIGTERM:
            process.send_signal(number)  # who asks twice changes nothing
        output, _ = process.communicate(timeout=program.TIMEOUT_SECS)
    finally:
        process.kill()
        process.wait()
    return process.returncode, output


def recorded_steps(workdir):
    path = workdir / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def committed(workdir):
    path = workdir / "checkpoints"
    return sorted(int(step.name) for step in path.iterdir() if step.name.isdigit()) if path.exists() else []


def is_saving(workdir):
    path = workdir / "checkpoints"
    return path.exists() and any("tmp" in step.name for step in path.iterdir())


def same_run(workdir, other):
    ours, theirs = program.records(workdir), program.records(other)
    assert [line["step"] for line in ours["metrics"]] == list(range(1, ours["summary"]["steps"] + 1))
    for part, value in theirs.items():
        assert ours[part] == value, part


def test_killed_three_times_and_stopped_once(undisturbed, cache, tmp_path):
    workdir, moments = tmp_path / "run", random.Random(20260109)

    def steps_done(more):
        target = committed(workdir)[-1:] or [0]
        return lambda: recorded_steps(workdir)[-1:] >= [target[0] + more]

    kills = [steps_done(moments.randint(3, 9)), lambda: is_saving(workdir), None]
    for happened in kills:
        status, output = watch(workdir, cache, happened or steps_done(moments.randint(1, 6)), signal.SIGKILL)
        assert status == -signal.SIGKILL, output
    status, output = watch(workdir, cache, steps_done(moments.randint(1, 6)), signal.SIGTERM)
    assert status == 75, output
    stopped = committed(workdir)[-1]
    assert stopped == recorded_steps(workdir)[-1] < 40  # nothing that was done is lost
    assert f"step {stopped} is saved" in output

    done = program.run(program.command(workdir, **program.LONG), cache=cache)
    assert done.returncode == 0 and f"resumed from step {stopped}" in done.stdout, done.stderr
    assert f"state_sha256 {program.summary(undisturbed)['state_sha256']}" in done.stdout
    same_run(workdir, undisturbed)


def test_a_finished_run_ends_at_once_and_leaves_its_summary(undisturbed, cache):
    content = program.files(undisturbed)
    done = program.run(program.command(undisturbed, **program.LONG), cache=cache)
    assert done.returncode == 0 and "step 40/40" not in done.stdout
    assert f"state_sha256 {program.summary(undisturbed)['state_sha256']}" in done.stdout
    assert program.files(undisturbed) == content


STALENESS = [(1, 1), (1, 2), (4, 8)]
PHASES = {  # moment, count of signal_at.py; an evaluation is 2 rollouts, a step is 2 more
    "imports": ("import:optax", 0),
    "loading": ("before:pgrpo_jax.assembly:load_base", 1),
    "compiling": ("during:pgrpo_jax.generation.decoding:prefill", 1),
    "evaluation before": ("before:pgrpo_jax.actor:Actor.rollout", 2),
    "generation": ("after:pgrpo_jax.actor:Actor.rollout", 2 + 2 * 3 + 1),
    "update": ("before:pgrpo_jax.learner:update", 5),
    "recording": ("after:pgrpo_jax.run_directory:RunDirectory.write_step", 5),
    "save": ("after:pgrpo_jax.checkpoints:Checkpoints.save", 2),
    "evaluation after": ("before:pgrpo_jax.actor:Actor.rollout", 2 + 2 * 12 + 1),
    "summary": ("before:pgrpo_jax.run_directory:RunDirectory.write_summary", 1),
}
KILLS = [  # moment, highest count
    ("before:pgrpo_jax.actor:Actor.rollout", 10),
    ("during:pgrpo_jax.learner:update", 1),
    ("after:pgrpo_jax.learner:update", 4),
    ("before:pgrpo_jax.run_directory:RunDirectory.write_step", 4),
    ("after:pgrpo_jax.rollout_files:pack_rollouts", 1),
    ("before:pgrpo_jax.run_directory:RunDirectory._append", 6),
    ("after:pgrpo_jax.run_directory:RunDirectory._append", 6),
    ("before:pgrpo_jax.checkpoints:Checkpoints.save", 2),
    ("after:pgrpo_jax.checkpoints:Checkpoints.save", 2),
    ("before:pgrpo_jax.checkpoints:Checkpoints.restore", 1),
    ("after:pgrpo_jax.run_directory:RunDirectory.truncate_after", 1),
]


@pytest.fixture(scope="module", params=STALENESS, ids="reload{0[0]}-accept{0[1]}".format)
def staleness(request):
    reload, accept = request.param
    return {"staleness__reload": reload, "staleness__accept": accept}


@pytest.fixture(scope="module")
def reference(staleness, tmp_path_factory):
    """An undisturbed run that compiles everything itself."""
    workdir = tmp_path_factory.mktemp("reference") / "run"
    done = program.run(program.command(workdir, **staleness))
    assert (done.returncode, done.stderr) == (0, "")
    return workdir


@pytest.mark.faults
@pytest.mark.parametrize("phase", PHASES)
def test_stopped_in_any_phase(phase, staleness, reference, cache, tmp_path):
    workdir = tmp_path / "run"
    line = program.command(workdir, at=["SIGTERM", *PHASES[phase]], **staleness)
    stopped = program.run(line, cache=None if phase == "compiling" else cache)
    assert stopped.returncode == (0 if phase == "summary" else 75), stopped.stdout + stopped.stderr
    if phase in ("imports", "loading", "compiling", "evaluation before"):
        assert committed(workdir) == recorded_steps(workdir) == []
    else:
        assert committed(workdir)[-1] == recorded_steps(workdir)[-1]
    done = program.run(program.command(workdir, **staleness), cache=cache)
    assert done.returncode == 0, done.stderr
    same_run(workdir, reference)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(3))
def test_killed_again_and_again(seed, staleness, reference, cache, tmp_path):
    workdir, moments, kills = tmp_path / "run", random.Random(seed), 0
    for _ in range(10):
        moment, highest = moments.choice(KILLS)
        at = ["SIGKILL", moment, moments.randint(1, highest)]
        done = program.run(program.command(workdir, at=at, **staleness), cache=cache)
        assert done.returncode in (0, -signal.SIGKILL), (at, done.stderr)
        kills += done.returncode != 0
    assert kills >= 3, "hardly anything was killed"
    done = program.run(program.command(workdir, **staleness), cache=cache)
    assert done.returncode == 0, done.stderr
    same_run(workdir, reference)
