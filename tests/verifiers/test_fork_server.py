"""The fork server's life: it starts clean and quietly, says why when it can not, and never outlives the run, whatever the run died of."""

import functools
import pathlib
import signal
import subprocess
import sys

import pytest
import reward_cases as cases
from reward_cases import alive, prompts, read, wait_until

from pgrpo_jax.verifiers.fork_server import ending
from pgrpo_jax.verifiers.rewards import RewardPool

PROGRAM = pathlib.Path(__file__).parent / "pool_holder.py"


def ours(pid):
    """Reward processes that run for the process with this id."""
    processes = [p for p in pathlib.Path("/proc").glob("[0-9]*") if alive(p.name)]
    return [p for p in processes if f"\0{pid}\0" in cmdline(p) and "reward_process" in cmdline(p)]


def cmdline(process):
    try:
        return (process / "cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def run(what, directory):
    """Runs the program to its end; returns what it printed."""
    done = subprocess.run(
        [sys.executable, str(PROGRAM), what, str(directory)], timeout=120, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert (directory / "imports").read_text() == "main\n"  # the program was not imported again in another process
    return done.stdout.strip()


@pytest.mark.parametrize("what", ["loading", "judging"])
def test_nobody_outlives_a_run_that_is_killed(tmp_path, what):
    program = subprocess.Popen([sys.executable, str(PROGRAM), what, str(tmp_path)])
    pids = list(map(int, read(tmp_path / "pids").split()))  # of the loading process; of a reward that hangs, and a process it started
    assert all(map(alive, pids)) and ours(program.pid)
    program.send_signal(signal.SIGKILL)
    program.wait(60)
    wait_until(lambda: not any(map(alive, pids)) and not ours(program.pid), f"the end of {pids}")


def test_a_program_that_forgets_to_close_leaves_nobody(tmp_path):
    server = int(run("leaves", tmp_path))
    wait_until(lambda: not alive(server), "the end of the fork server")


def test_the_program_itself_is_not_run_again_and_what_rewards_print_is_dropped(tmp_path):
    assert run("normal", tmp_path) == "0.5"


def test_a_task_of_the_program_itself_can_not_be_loaded(tmp_path):
    assert run("local", tmp_path).startswith("ValueError: the reward process could not load the task: AttributeError: ")


def test_a_process_that_ends_while_it_loads_says_its_last_words(tmp_path):
    said = run("exits_loading", tmp_path)
    assert said == "ConnectionError: the reward process did not load the task, it exited with status 7: no more memory"


def fails_to_load(message, error, **changes):
    options = {"num_processes": 1, "timeout_secs": 9.0, "on_failure": "zero", "start_secs": 60.0} | changes
    pool = RewardPool(options.pop("make_task"), **options)
    for _ in range(2):
        with pytest.raises(error, match=message):
            pool.judge(prompts(1), ["number 1"])
    pool.close()


def test_a_task_that_can_not_be_loaded(tmp_path):
    load = functools.partial(cases.load, "raise", "ratings.csv")
    missing = r"could not load the task: FileNotFoundError: ratings.csv is missing \(reward_cases.py:\d+\): "
    fails_to_load(missing, ValueError, make_task=load)
    slow = functools.partial(cases.load, "sleep", str(tmp_path / "pid"))
    fails_to_load("did not load the task within 1.5 s: look at the disk", TimeoutError, make_task=slow, start_secs=1.5)
    pid = tmp_path / "pid"
    assert not (pid.exists() and alive(int(pid.read_text())))  # where it came that far


@pytest.fixture(scope="module")
def pool():
    made = RewardPool(cases.load, num_processes=1, timeout_secs=60.0, on_failure="fail")
    yield made
    made.close()


def ask(pool, answer):
    return pool.judge(prompts(1), [answer])[0][0]


def test_a_reward_process_has_one_thread_and_no_jax_backend(pool):
    verdict = ask(pool, "backend")
    assert verdict.total == 1 and verdict.components == {"answered": 0.0, "length": 1.0}


def test_a_reward_may_print_fork_and_set_alarms(pool):
    for answer in ("print 3000000", "fork", "alarm"):
        for i in range(3):
            verdict = ask(pool, answer)
            assert verdict.total == 0.5 and verdict.components == {"answered": 1.0, "length": 1.0}
            assert ask(pool, f"number {i}").total == i  # not the answer of the fork, late


def test_the_signals_that_stop_a_run_do_not_stop_its_rewards(pool):
    assert ask(pool, "signals").components["length"] == signal.SIGTERM  # but they do stop a program that a reward runs
    assert ask(pool, "number 0.5").total == 0.5


def test_an_ending_in_words():
    assert [ending(code) for code in (0, 3, -11)] == ["exited with status 0", "exited with status 3", "was killed by SIGSEGV"]
