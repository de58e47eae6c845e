"""Runs on a Ray cluster: the same bits as in one process, whatever the number of actors, and whoever is killed."""

import json
import os
import pathlib
import random
import signal
import tempfile
import time

import program
import pytest

STEPS = {"num_steps": 60, "checkpoint__save_every": 6}
RAY = {"engine": "ray", "ray__object_store_bytes": 300 << 20}
SIZES = [(1, 1), (1, 2), (4, 8)]


def staleness(reload, accept):
    return {"staleness__reload": reload, "staleness__accept": accept}


def below(pid):
    """All processes below one: {pid: command line}."""
    parents, lines = {}, {}
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            parents[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            lines[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ")
        except (OSError, ValueError):
            continue
    found, grown = {pid}, True
    while grown:
        grown = [child for child, parent in parents.items() if parent in found and child not in found]
        found |= set(grown)
    return {child: lines[child] for child in found if child != pid and child in lines}


def role(pid, name):
    """Processes of a role of the run that `pid` drives: "ActorProcess" or "LearnerProcess"."""
    return sorted(child for child, line in below(pid).items() if line.startswith(f"ray::{name}"))


def steps_done(workdir):
    path = workdir / "metrics.jsonl"
    return len([line for line in path.read_text().split("\n")[:-1] if line]) if path.exists() else 0


def kill(pids, number=signal.SIGKILL):
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


class Disturbance:
    """Looks at a run again and again until it ends, and disturbs it; `done` says whether it did what it was to do."""

    def __init__(self, workdir):
        self.workdir, self.count, self.random = workdir, 0, random.Random(20260109)
        self.last, self.steps = time.monotonic(), 0

    def start(self, driver):
        """Called when the run is launched."""

    def look(self, driver):
        """Called every few milliseconds with the driver's process."""


class KillActors(Disturbance):
    """One actor every few seconds, once the run has gone on since the last time: a slow machine must not be killed to a standstill."""

    most = 1000

    def look(self, driver):
        if self.count == self.most:
            return
        if time.monotonic() - self.last > 3.0 and steps_done(self.workdir) > self.steps and (actors := role(driver.pid, "ActorProcess")):
            kill([self.random.choice(actors)])
            self.last, self.steps, self.count = time.monotonic(), steps_done(self.workdir) + 2, self.count + 1


class KillTwoActors(KillActors):
    """Two, in all."""

    most = 2


class AtSteps(Disturbance):
    """Something at two moments, told by the steps on record."""

    moments = (8, 31)

    def look(self, driver):
        if self.count < len(self.moments) and steps_done(self.workdir) >= self.moments[self.count]:
            self.disturb(driver)
            self.count += 1


class KillLearner(AtSteps):
    """One process of the gang; the gang dies with it."""

    def disturb(self, driver):
        kill(role(driver.pid, "LearnerProcess")[:1])


class StopLearner(AtSteps):
    """The node of a learner process is taken away: it is told."""

    def disturb(self, driver):
        kill(role(driver.pid, "LearnerProcess")[-1:], signal.SIGTERM)


class KillDriver(AtSteps):
    """The whole job; it is launched again."""

    def disturb(self, driver):
        driver.kill()


class StopDriver(AtSteps):
    """The job is preempted; it is launched again."""

    def disturb(self, driver):
        driver.send_signal(signal.SIGTERM)


class StopStart(Disturbance):
    """The job is preempted while it starts: sooner, then later; it is launched again."""

    delays = (0.5, 3.0, 5.0, 8.0)

    def start(self, driver):
        self.at = time.monotonic() + self.delays[self.count] if self.count < len(self.delays) else float("inf")

    def look(self, driver):
        if time.monotonic() >= self.at:
            driver.send_signal(signal.SIGTERM)
            self.at, self.count = float("inf"), self.count + 1


def run(workdir, cache, disturbance=None, **changes):
    """Runs to the end, launching again what was killed or preempted, and checks that nothing is left; returns (output, the disturbance)."""
    disturbance = (disturbance or Disturbance)(workdir)
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="r") as scratch:  # a short name: sockets are made below it
        output = run_in(scratch, workdir, cache, disturbance, **changes)
        deadline = time.monotonic() + 30
        while (left := os.listdir(scratch)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert left == [], "a killed driver's cluster is still there"
    left = [*(workdir / "checkpoints").iterdir(), *(workdir / "checkpoints" / "versions").glob("*")]
    assert not [path for path in left if not path.name.isdigit() and path.name != "versions"], "an unfinished checkpoint is left"
    return output, disturbance


def run_in(scratch, workdir, cache, disturbance, **changes):
    output = ""
    for _ in range(10):
        line = program.command(workdir, **{**STEPS, **RAY, **changes})
        driver = program.start(line, cache=cache, variables={"TMPDIR": scratch})
        disturbance.start(driver)
        deadline = time.monotonic() + program.TIMEOUT_SECS
        try:
            while driver.poll() is None:
                assert time.monotonic() < deadline, f"still running after {program.TIMEOUT_SECS} s"
                disturbance.look(driver)
                time.sleep(0.02)
        finally:
            driver.kill()
            output += driver.communicate()[0]
        if driver.returncode not in (75, -signal.SIGKILL):
            break
    assert driver.returncode == 0, output
    return output


def same_run(workdir, other, *, num_steps=STEPS["num_steps"]):
    """Everything on record but for wall-clock times and where it ran."""
    ours, theirs = program.records(workdir), program.records(other)
    for record in (ours, theirs):
        record["summary"] = {key: value for key, value in record["summary"].items() if key != "config"}
    assert [line["step"] for line in ours["metrics"]] == list(range(1, num_steps + 1))
    for part, value in theirs.items():
        assert ours[part] == value, part


@pytest.fixture(scope="module")
def inline(tmp_path_factory, cache):
    """(reload, accept) -> the directory of an undisturbed run in one process."""
    made = {}

    def run_inline(reload, accept):
        if (reload, accept) not in made:
            workdir = tmp_path_factory.mktemp("inline") / "run"
            done = program.run(program.command(workdir, **STEPS, **staleness(reload, accept)), cache=cache)
            assert (done.returncode, done.stderr) == (0, "")
            made[reload, accept] = workdir
        return made[reload, accept]

    return run_inline


def test_two_actors_killed_twice(inline, cache, tmp_path):
    output, kills = run(tmp_path / "run", cache, KillTwoActors, num_actors=2, **staleness(1, 2))
    assert kills.count == 2
    same_run(tmp_path / "run", inline(1, 2))
    assert f"state_sha256 {program.summary(inline(1, 2))['state_sha256']}" in output
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(event["controller/dropped"] == 0 for event in events)


def test_adapters_travel_without_the_model(cache, tmp_path):
    """One adapter for each preference group, on a base that every actor loads by itself: the same bits as in one process."""
    changes = {"num_steps": 8, "lora__rank": 2, "lora__per_preference_group": True, "optimiser__learning_rate": 0.02, **staleness(1, 2)}
    done = program.run(program.command(tmp_path / "inline", **{**STEPS, **changes}), cache=cache)
    assert (done.returncode, done.stderr) == (0, "")
    run(tmp_path / "run", cache, num_actors=1, **changes)
    same_run(tmp_path / "run", tmp_path / "inline", num_steps=8)


def test_what_is_wrong_in_a_process_far_away_is_said_in_one_line(tmp_path):
    changes = {"model__path": str(tmp_path / "nothing.gguf"), "num_actors": 1}
    lines = program.errors(program.run(program.command(tmp_path / "run", **RAY, **changes)))
    assert len(lines) == 1 and str(tmp_path / "nothing.gguf") in lines[0]


@pytest.mark.faults
@pytest.mark.parametrize("reload, accept", SIZES)
@pytest.mark.parametrize("num_actors", [1, 2, 3])
def test_the_number_of_actors_does_not_matter(num_actors, reload, accept, inline, cache, tmp_path):
    run(tmp_path / "run", cache, num_actors=num_actors, **staleness(reload, accept))
    same_run(tmp_path / "run", inline(reload, accept))


@pytest.mark.faults
@pytest.mark.parametrize("reload, accept", SIZES)
@pytest.mark.parametrize("disturbance", [KillActors, KillLearner, StopLearner, KillDriver, StopDriver, StopStart])
def test_who_is_killed_does_not_matter(disturbance, reload, accept, inline, cache, tmp_path):
    output, done = run(tmp_path / "run", cache, disturbance, num_actors=2, **staleness(reload, accept))
    assert done.count >= 2, output
    same_run(tmp_path / "run", inline(reload, accept))


@pytest.mark.faults
def test_a_gang_of_two_killed_twice_is_a_gang_of_two(cache, tmp_path):
    gang = {"learner__num_processes": 2, "learner__num_devices": 0, **staleness(1, 2)}
    run(tmp_path / "undisturbed", cache, num_actors=1, **gang)
    output, kills = run(tmp_path / "run", cache, KillLearner, num_actors=1, **gang)
    assert kills.count == 2, output
    same_run(tmp_path / "run", tmp_path / "undisturbed")


