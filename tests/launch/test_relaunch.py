"""The relaunch loop with real processes: exit codes, retries, real signals."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
RELAUNCH = str(ROOT / "launch" / "relaunch.sh")
DEADLINE_SECS = 60  # of one process; never waited for when all is well

# Notes its arguments, then ends as the next line of `script` says: an exit code, or the number of a signal that kills it.
SCRIPTED = """
import os, pathlib, sys
script, calls = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
with calls.open("a") as file:
    print(repr(sys.argv[3:]), file=file)
line, _, rest = script.read_text().partition("\\n")
script.write_text(rest)
if line.startswith("signal"):
    os.kill(os.getpid(), int(line.split()[1]))
sys.exit(int(line))
"""

# Waits for signals as train.py does, and exits 75 after the save.
WAITING = """
import sys, time
from pgrpo_jax.preemption import Stop
stop = Stop().install()
print("ready", flush=True)
while not stop.requested:
    time.sleep(0.02)  # not signal.pause: a signal just before it would be waited for again
print(f"saved after {stop.reason}", flush=True)
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def scripted(tmp_path):
    """Runs relaunch.sh over a command that ends as told, one line for each run; returns the result and the arguments of each run."""
    program, script, calls = tmp_path / "program.py", tmp_path / "script", tmp_path / "calls"
    program.write_text(SCRIPTED)
    calls.touch()

    def run(*lines, options=(), arguments=()):
        script.write_text("\n".join(lines))
        command = [RELAUNCH, *options, sys.executable, str(program), str(script), str(calls), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_SECS, check=False)
        return done, calls.read_text().splitlines()

    return run


@pytest.fixture
def start():
    """Starts relaunch.sh over a command that prints "ready" once it listens; none is left when the test ends."""
    processes = []

    def start(*arguments):
        command = [RELAUNCH, *arguments]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
        processes.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in processes:
        with contextlib.suppress(ProcessLookupError):  # also what outlived the script that started it
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_finished_is_finished(scripted):
    done, calls = scripted("0", "0")
    assert (done.returncode, len(calls), done.stderr) == (0, 1, "")


def test_preempted_runs_again_until_finished(scripted):
    done, calls = scripted("75", "75", "75", "0", "0")
    assert (done.returncode, len(calls)) == (0, 4)
    assert done.stderr.count("preempted and saved") == 3


def test_the_command_stays_as_it_is(scripted):
    arguments = ("--config.task.data_dir=/my data/it's", "--workdir=gs://bucket/a run", "$HOME", "*", "")
    _, calls = scripted("75", "0", arguments=arguments)
    assert calls == [repr(list(arguments))] * 2


@pytest.mark.parametrize("line, code", [("1", 1), ("64", 64), (f"signal {signal.SIGKILL}", 137), (f"signal {signal.SIGTERM}", 143)])
def test_a_failure_ends_it_with_its_code(scripted, line, code):
    done, calls = scripted(line, "0")
    assert (done.returncode, len(calls)) == (code, 1)
    assert f"exit status {code}" in done.stderr and "--retries=0" in done.stderr


def test_retries_count_failures_in_a_row(scripted):
    """Two failures, a preemption, two failures: never three in a row."""
    done, calls = scripted("1", "signal 9", "75", "1", "1", "0", options=("--retries=2", "--wait=0"))
    assert (done.returncode, len(calls)) == (0, 6)
    done, calls = scripted("1", "1", "7", "0", options=("--retries=2", "--wait=0"))
    assert (done.returncode, len(calls)) == (7, 6 + 3)
    assert "gives up (failure 3 in a row, --retries=2)" in done.stderr


def test_passes_a_signal_on_and_starts_nothing_after_it(start):
    process = start("--retries=5", sys.executable, "-c", WAITING, "75")
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=DEADLINE_SECS)
    assert (process.returncode, output) == (75, "saved after SIGTERM\n")
    assert "run the same command to go on" in errors


@pytest.mark.parametrize("code", [0, 1])
def test_a_signal_does_not_hide_how_the_command_ended(start, code):
    process = start("--retries=5", sys.executable, "-c", WAITING, str(code))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=DEADLINE_SECS)
    assert process.returncode == code


def test_a_command_that_the_signal_kills_is_one_to_run_again(start):
    """It has not got to its handler: nothing to save, nothing lost."""
    process = start("--retries=5", sys.executable, "-c", "import time; print('ready', flush=True); time.sleep(600)")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=DEADLINE_SECS)
    assert process.returncode == 75


def test_waits_for_the_command_through_many_signals(start):
    slow = "import signal, time\nseen = []\nsignal.signal(15, lambda *a: (seen.append(1), print('again', flush=True)))\nprint('ready', flush=True)\n"
    slow += "while len(seen) < 3: time.sleep(0.02)\nraise SystemExit(75)"
    process = start(sys.executable, "-c", slow)
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "again\n"
    process.communicate(timeout=DEADLINE_SECS)
    assert process.returncode == 75


def test_a_signal_ends_the_pause_before_a_retry(start):
    process = start("--retries=1", "--wait=3600", sys.executable, "-c", "print('ready', flush=True); raise SystemExit(1)")
    assert "runs again in 3600 s" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=DEADLINE_SECS)
    assert process.returncode == 75


@pytest.mark.parametrize("arguments", [(), ("--retries=2",), ("--retries=many", "true"), ("--wait=-1", "true"), ("--unknown", "true")])
def test_refuses_wrong_options(arguments):
    done = subprocess.run([RELAUNCH, *arguments], capture_output=True, text=True, timeout=DEADLINE_SECS, check=False)
    assert done.returncode == 64 and done.stdout == "" and done.stderr.startswith("relaunch: ")


def test_can_be_run_as_a_program():
    assert all(os.access(ROOT / "launch" / name, os.X_OK) for name in ("relaunch.sh", "tpu_pod.sh", "tpu_worker.sh"))
