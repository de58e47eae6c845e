"""tpu_pod.sh: its dry run, and its loop against a recorded gcloud that preempts; tpu_worker.sh with real processes."""

import contextlib
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
TPU_POD = str(ROOT / "launch" / "tpu_pod.sh")
FAKE_GCLOUD = pathlib.Path(__file__).parent / "fake_gcloud.py"
DEADLINE_SECS = 60  # of one process; never waited for when all is well
WHERE = ("--name=run-1", "--zone=us-west4-a", "--accelerator-type=v5litepod-16")
WHAT = ("--config=configs/movielens.py", "--workdir=gs://bucket/a run", "--config.task.data_dir=/my data/it's $HOME")
CREATE, DESCRIBE, DELETE = ("queued-resources", "create"), ("queued-resources", "describe"), ("queued-resources", "delete")
SCP, SSH = ("tpu-vm", "scp"), ("tpu-vm", "ssh")


class Google:
    """gcloud on PATH, which records its calls."""

    def __init__(self, directory):
        self.directory, self.temporary = directory / "google", directory / "temporary"
        for made in (self.directory, self.temporary, directory / "bin"):
            made.mkdir()
        gcloud = directory / "bin" / "gcloud"
        gcloud.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -IS {shlex.quote(str(FAKE_GCLOUD))} "$GOOGLE" "$@"\n')
        gcloud.chmod(0o755)
        self.environment = os.environ | {"PATH": f"{directory / 'bin'}:{os.environ['PATH']}"}
        self.environment |= {"GOOGLE": str(self.directory), "TMPDIR": str(self.temporary)}
        self.processes = []
        self.says(granted="ACTIVE", outcomes="0", calls="")

    def says(self, **files):
        for name, text in files.items():
            (self.directory / name).write_text(text)

    def start(self, *options):
        command = [TPU_POD, *WHERE, *WHAT, "--poll=0", *options]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, env=self.environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
        self.processes.append(process)
        return process

    def close(self):
        """Leaves no process behind, whatever the test found."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):  # also what outlived the script that started it
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

    def run(self, *options):
        process = self.start(*options)
        output, errors = process.communicate(timeout=DEADLINE_SECS)
        return process.returncode, output, errors

    def calls(self):
        return [json.loads(line) for line in (self.directory / "calls").read_text().splitlines()]

    def steps(self):
        """What was done, without the looks at it: ("queued-resources", "create") and so on; "setup", "run" and "stop" for ssh."""
        steps = []
        for call in self.calls():
            if tuple(call[2:4]) == SSH:
                steps.append(remote(call).partition("tpu_worker.sh ")[2].split()[0])
            elif call[3] != "describe":
                steps.append(tuple(call[2:4]))
        return steps


@pytest.fixture
def google(tmp_path):
    google = Google(tmp_path)
    yield google
    google.close()


def remote(call):
    """The command that an ssh call runs on the workers."""
    return next(a for a in call if a.startswith("--command=")).removeprefix("--command=")


NEW = [CREATE, SCP, "setup", "run"]


def test_the_dry_run_prints_every_command_in_order_and_runs_none(google):
    code, output, errors = google.run("--dry-run")
    assert (code, errors, google.calls()) == (0, "", [])
    commands = [shlex.split(line) for line in output.splitlines() if not line.startswith("#")]
    assert [" ".join(command[:5]) for command in commands if command[0] == "gcloud"] == [
        "gcloud compute tpus queued-resources create",
        "gcloud compute tpus queued-resources describe",
        "gcloud compute tpus tpu-vm scp",
        "gcloud compute tpus tpu-vm ssh",
        "gcloud compute tpus tpu-vm ssh",
        "gcloud compute tpus queued-resources delete",
    ]
    create, _, scp, setup, train, delete = [command for command in commands if command[0] == "gcloud"]
    assert create[5] == "run-1" and {"--node-id=run-1", "--accelerator-type=v5litepod-16", "--spot"} <= set(create)
    assert "--runtime-version=v2-alpha-tpuv5-lite" in create
    assert all("--zone=us-west4-a" in command and not any("project" in a for a in command) for command in (create, scp, setup, delete))
    assert {"--worker=all"} <= set(scp) & set(setup) & set(train) and "--force" in delete
    tar = next(command for command in commands if command[0] == "tar")
    assert tar[2] == scp[5] and commands.index(tar) < commands.index(scp)
    assert {"--exclude=./.git", "--exclude=./.venv", "--exclude=./.assets", "--exclude=./.peers", "--exclude=./runs"} <= set(tar)


def test_what_the_workers_run_reaches_the_program_as_it_was_given(google):
    """Through this shell, gcloud's argument, and the shell of the worker."""
    google.run()
    train = next(call for call in google.calls() if tuple(call[2:4]) == SSH and "tpu_worker.sh run" in remote(call))
    script, *arguments = shlex.split(remote(train))[1:]
    assert script == "pgrpo_jax/launch/tpu_worker.sh"
    assert arguments == ["run", "--config.distributed.enabled=True", *WHAT]


def test_the_recorded_run_is_the_dry_run(google):
    _, output, _ = google.run("--dry-run", "--project=mine", "--on-demand")
    printed = [shlex.split(line)[1:] for line in output.splitlines() if line.startswith("gcloud")]
    google.run("--project=mine", "--on-demand")
    once = list(dict.fromkeys(map(tuple, google.calls())))
    assert [call for call in once if call[2:4] != ("tpu-vm", "describe")][1:] == [c for c in map(tuple, printed) if c[3] != "describe"]
    assert all("--project=mine" in call and "--spot" not in call for call in google.calls())


def test_copies_the_repository_without_what_is_made_on_the_worker(google):
    google.run()
    names = (google.directory / "archived").read_text().splitlines()
    assert {"./launch/train.py", "./launch/tpu_worker.sh", "./configs/base.py", "./setup.cfg", "./pgrpo_jax/train.py"} <= set(names)
    assert not [name for name in names if name.startswith(("./.git/", "./.venv", "./.assets", "./.peers", "./runs")) or "__pycache__" in name]
    assert list(google.temporary.iterdir()) == []


def test_finishes_and_lets_the_slice_go(google):
    code, _, errors = google.run()
    assert code == 0 and errors.endswith("finished: gs://bucket/a run\n")
    assert google.steps() == [*NEW, DELETE]


def test_keeps_the_slice_when_asked_to(google):
    assert google.run("--keep")[0] == 0 and google.steps() == NEW


def test_a_saved_run_goes_on_at_once_on_the_same_slice(google):
    google.says(outcomes="75\n75\n0")
    assert google.run()[0] == 0
    assert google.steps() == [*NEW, "run", "run", DELETE]


def test_a_preempted_slice_is_made_again_until_the_run_has_finished(google):
    google.says(outcomes="preempted\npreempted\n0")
    code, _, errors = google.run("--retries=0")
    assert code == 0 and google.steps() == [*NEW, DELETE, *NEW, DELETE, *NEW, DELETE]
    assert errors.count("the slice was preempted") == 2 and errors.count("is SUSPENDED: deletes it and asks again") == 2


def test_a_slice_left_by_an_earlier_call_is_used(google):
    google.says(state="ACTIVE")
    assert google.run()[0] == 0 and google.steps() == [SCP, "setup", "run", DELETE]


@pytest.mark.parametrize("old", ["SUSPENDED", "FAILED"])
def test_a_dead_request_of_an_earlier_call_is_deleted_first(google, old):
    google.says(state=old)
    assert google.run()[0] == 0 and google.steps() == [DELETE, *NEW, DELETE]


def test_failures_are_tried_again_and_then_told(google):
    google.says(outcomes="1\nlost\n0")
    assert google.run("--retries=2")[0] == 0
    assert google.steps() == [*NEW, SCP, "setup", "run", SCP, "setup", "run", DELETE]
    google.says(outcomes="7\n7\n0", calls="")
    code, _, errors = google.run("--retries=1")
    assert code == 7 and google.steps().count("run") == 2 and DELETE not in google.steps()
    assert "the slice stays, look at it: gcloud compute tpus tpu-vm ssh run-1 --zone=us-west4-a" in errors


def test_waits_for_a_slice_no_longer_than_told(google):
    google.says(granted="WAITING_FOR_RESOURCES")
    code, _, errors = google.run("--wait=1")
    assert code == 1 and google.steps() == [CREATE]
    told = r"no slice within 1 s \(state (just asked for|ACCEPTED|WAITING_FOR_RESOURCES)\): raise --wait or change --zone"
    assert re.search(told, errors), errors


def test_a_gcloud_that_cannot_look_ends_it_with_its_words(google):
    google.environment["GOOGLE"] = str(google.directory / "nowhere")
    code, _, errors = google.run()
    assert code == 1 and "tpu_pod: gcloud describes no queued resource run-1: " in errors and "nowhere" in errors


def test_a_signal_makes_the_workers_save(google):
    google.says(outcomes="waits")
    process = google.start()
    assert process.stdout.readline() == "training\n"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=DEADLINE_SECS)
    assert process.returncode == 75 and google.steps() == [*NEW, "stop"]
    assert "gcloud compute tpus queued-resources delete run-1 --zone=us-west4-a --force" in errors


def test_a_signal_while_it_asks_is_no_failure(google):
    google.says(hangs="create")
    process = google.start()
    assert process.stdout.readline() == "create hangs\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=DEADLINE_SECS)
    assert process.returncode == 75 and google.steps() == [CREATE]


def test_a_signal_while_it_waits_leaves_the_request(google):
    google.says(granted="WAITING_FOR_RESOURCES")
    process = google.start("--poll=3600")
    assert "asked for run-1 (v5litepod-16, us-west4-a)" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=DEADLINE_SECS)
    assert process.returncode == 75 and google.steps() == [CREATE]


@pytest.mark.parametrize(
    "options, message",
    [
        (("--workdir=runs/here",), "--workdir=runs/here is not in a bucket"),
        (("--name=Run_1",), "--name=Run_1 is no resource name"),
        (("--accelerator-type=v9-16",), "has no runtime version that is known here: give --runtime-version"),
        (("--zone=",), "--name, --zone and --accelerator-type are needed"),
        (("--retries=few",), "--retries=few: whole numbers are needed"),
        (("dry-run",), "argument dry-run is unexpected"),
    ],
)
def test_refuses_wrong_options(google, options, message):
    code, output, errors = google.run(*options)
    assert (code, output, google.calls()) == (64, "", []) and message in errors


TRAIN = """
import pathlib, signal, sys, time
from pgrpo_jax.preemption import Stop
events = pathlib.Path("events")
def tell(event):
    with events.open("a") as file:
        print(event, sys.argv[1], file=file)
stop = Stop().install()
tell("begins")
print(*sys.argv[1:], sep="|", flush=True)
while not stop.requested:
    time.sleep(0.02)
time.sleep(0.5)  # the save
tell("saved")
print(f"saved after {stop.reason}", flush=True)
sys.exit(75)
"""


@pytest.fixture
def worker(tmp_path):
    """A worker's copy of the repository, with a program that waits for a signal in the place of train.py; starts tpu_worker.sh there."""
    for name in ("launch", ".venv/bin"):
        (tmp_path / name).mkdir(parents=True)
    shutil.copy(ROOT / "launch" / "tpu_worker.sh", tmp_path / "launch")
    (tmp_path / "launch" / "train.py").write_text(TRAIN)
    (tmp_path / ".venv/bin/python").symlink_to(sys.executable)
    processes = []

    def start(*arguments):
        command, pipe = ["bash", str(tmp_path / "launch" / "tpu_worker.sh"), *arguments], subprocess.PIPE
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        processes.append(subprocess.Popen(command, cwd="/", env=environment, stdout=pipe, stderr=pipe, text=True))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_a_worker_runs_the_program_with_its_flags(worker):
    running = worker("run", "--workdir=gs://bucket/a run", "--config.seed=1")
    assert running.stdout.readline() == "--workdir=gs://bucket/a run|--config.seed=1\n"


def test_a_worker_stops_a_running_program_and_waits_for_its_save(worker):
    running = worker("run", "first")
    running.stdout.readline()
    stopping = worker("stop")
    assert running.communicate(timeout=DEADLINE_SECS)[0] == "saved after SIGTERM\n" and running.returncode == 75
    stopping.communicate(timeout=DEADLINE_SECS)
    assert stopping.returncode == 0


def test_a_worker_takes_over_from_a_run_whose_connection_was_lost(worker, tmp_path):
    first = worker("run", "first")
    first.stdout.readline()
    second = worker("run", "second")
    assert first.communicate(timeout=DEADLINE_SECS)[0] == "saved after SIGTERM\n"
    assert second.stdout.readline() == "second\n"
    assert (tmp_path / "events").read_text().splitlines() == ["begins first", "saved first", "begins second"]


def test_a_worker_with_nothing_to_stop_has_stopped(worker, tmp_path):
    assert worker("stop").wait(timeout=DEADLINE_SECS) == 0
    with subprocess.Popen(["sleep", "600"]) as other:
        (tmp_path / "train.pid").write_text(str(other.pid))  # the number has passed on to another program
        assert worker("stop").wait(timeout=DEADLINE_SECS) == 0 and other.poll() is None
        other.kill()
    assert worker("start").wait(timeout=DEADLINE_SECS) == 64
