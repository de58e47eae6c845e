"""The inline engine as one program over several processes, without Ray: the same bits as one process with as many devices."""

import signal
import socket
import time

import program
import pytest
import test_ray_runs as runs

PROCESSES = 2
STEPS = {"num_steps": 30, "checkpoint__save_every": 10}


def start(workdir, cache):
    """One process of the program after the other; they find each other at a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    together = {"distributed__enabled": True, "distributed__coordinator": coordinator, "distributed__num_processes": PROCESSES}
    lines = [
        program.command(workdir, **STEPS, **runs.staleness(1, 2), **together, learner__num_devices=0, distributed__process_id=i)
        for i in range(PROCESSES)
    ]
    return [program.start(line, cache=cache) for line in lines]


def end(processes):
    try:
        outputs = [process.communicate(timeout=program.TIMEOUT_SECS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [process.returncode for process in processes], outputs


pytestmark = pytest.mark.faults  # a minute of compiling in two processes; the engine itself: tests/engines/test_inline.py


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, cache):
    workdir = tmp_path_factory.mktemp("one") / "run"
    line = program.command(workdir, **STEPS, **runs.staleness(1, 2), learner__num_devices=0)
    done = program.run(line, cache=cache, variables={"XLA_FLAGS": f"--xla_force_host_platform_device_count={PROCESSES}"})
    assert (done.returncode, done.stderr) == (0, "")
    return workdir


def test_two_processes_are_one_program(one_process, cache, tmp_path):
    statuses, outputs = end(start(tmp_path / "run", cache))
    assert statuses == [0, 0], outputs
    assert "state_sha256" in outputs[0] and "state_sha256" not in outputs[1]  # the first one speaks for all
    runs.same_run(tmp_path / "run", one_process, num_steps=STEPS["num_steps"])


@pytest.mark.parametrize("asked", range(PROCESSES))
def test_one_is_asked_to_stop_and_all_do(asked, one_process, cache, tmp_path):
    processes = start(tmp_path / "run", cache)
    deadline = time.monotonic() + program.TIMEOUT_SECS
    while runs.steps_done(tmp_path / "run") < 7:
        assert time.monotonic() < deadline and processes[0].poll() is None, "no step was made"
        time.sleep(0.01)
    processes[asked].send_signal(signal.SIGTERM)
    statuses, outputs = end(processes)
    assert statuses == [75, 75], outputs
    statuses, outputs = end(start(tmp_path / "run", cache))
    assert statuses == [0, 0] and "resumed from step" in outputs[0], outputs
    runs.same_run(tmp_path / "run", one_process, num_steps=STEPS["num_steps"])
