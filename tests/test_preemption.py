"""Real signals to this process, real processes that hold a lock file."""

import os
import re
import signal
import subprocess
import sys

import pytest

from pgrpo_jax import preemption
from pgrpo_jax.preemption import EXIT_PREEMPTED, Preempted, Stop, remove_stale_lock


@pytest.fixture
def handlers():
    """Puts back what a test installs."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def send(number):
    os.kill(os.getpid(), number)


def test_nothing_is_asked_for_at_first():
    stop = Stop()
    stop.check("training")
    assert not stop.requested and EXIT_PREEMPTED == 75


def test_sigterm_asks_once_and_names_the_phase(handlers):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    stop = Stop().install()
    send(signal.SIGTERM)
    send(signal.SIGTERM)  # who asks twice changes nothing
    assert stop.requested
    with pytest.raises(Preempted, match=r"^stop requested during evaluation \(SIGTERM\)$"):
        stop.check("evaluation")


@pytest.mark.parametrize("ignored", [signal.SIG_IGN, signal.SIG_DFL])
def test_no_handler_before_is_no_problem(handlers, ignored):
    signal.signal(signal.SIGTERM, ignored)
    stop = Stop().install()
    send(signal.SIGTERM)
    assert stop.requested


def test_an_earlier_handler_is_called_each_time(handlers):
    calls = []
    signal.signal(signal.SIGTERM, lambda number, frame: calls.append((number, frame is not None)))
    first = Stop().install()
    second = Stop().install()
    send(signal.SIGTERM)
    assert first.requested and second.requested and calls == [(signal.SIGTERM, True)]
    send(signal.SIGTERM)
    assert len(calls) == 2


def test_the_first_interrupt_asks_and_the_second_interrupts(handlers):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stop = Stop().install()
    send(signal.SIGINT)
    assert stop.requested
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)


def test_importing_it_is_cheap_enough_to_come_first():
    listing = "import sys; import pgrpo_jax.preemption; print(*{'jax', 'numpy', 'flax', 'orbax'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_says_who_asked(handlers):
    stop = Stop().install()
    assert stop.reason == ""
    send(signal.SIGINT)
    send(signal.SIGTERM)
    assert stop.reason == "SIGINT"  # the first one
    stop = Stop()
    stop.requested = True
    assert stop.requested and stop.reason == "the program"
    stop.requested = False
    assert not stop.requested and stop.reason == ""


def test_a_spent_time_budget_asks(monkeypatch):
    stop = Stop().set_budget(3600)
    started = preemption.time.monotonic()
    stop.check("training")
    monkeypatch.setattr(preemption.time, "monotonic", lambda: started + 3600.5)
    assert stop.requested
    with pytest.raises(Preempted, match=re.escape("stop requested during training (time budget of 3600 s)")):
        stop.check("training")


def test_the_budget_counts_from_the_start_not_from_when_it_is_set(monkeypatch):
    stop = Stop()
    started = preemption.time.monotonic()
    monkeypatch.setattr(preemption.time, "monotonic", lambda: started + 60)
    assert stop.set_budget(59.5).requested
    assert not Stop().set_budget(59.5).requested


def test_no_budget_is_never_spent(monkeypatch):
    stop = Stop().set_budget(0.0)
    monkeypatch.setattr(preemption.time, "monotonic", lambda: 1e12)
    assert not stop.requested


def test_a_signal_after_the_budget_is_the_first_one(handlers):
    """A budget is no interrupt: the Ctrl-C that follows it asks, and does not tear the save apart."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stop = Stop().install().set_budget(1e-9)
    assert stop.requested
    send(signal.SIGINT)
    assert stop.reason == "time budget of 1e-09 s"
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)


@pytest.mark.parametrize("secs", [-1.0, float("nan")])
def test_refuses_a_budget_that_is_none(secs):
    with pytest.raises(ValueError, match=re.escape(f"checkpoint.must_save_by = {secs} is below 0: give seconds")):
        Stop().set_budget(secs)


HOLD = "import sys, fcntl; file = open(sys.argv[1], 'r+'); {how}; print('held', flush=True); sys.stdin.read()"


@pytest.fixture
def hold():
    """Starts processes that hold a file, with a kind of lock or just open."""
    processes = []

    def start(path, how):
        command = [sys.executable, "-c", HOLD.format(how=how), str(path)]
        processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert processes[-1].stdout.readline() == "held\n"
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def lock(tmp_path):
    path = tmp_path / "libtpu_lockfile"
    path.touch()
    return path


def test_no_lock_file_is_nothing_to_tell(tmp_path):
    assert remove_stale_lock(tmp_path / "libtpu_lockfile") == ""


def test_a_stale_lock_file_goes(lock):
    assert remove_stale_lock(lock) == f"accelerator lock {lock} removed: the program that made it is gone"
    assert not lock.exists()


@pytest.mark.parametrize("how", ["pass", "fcntl.flock(file, fcntl.LOCK_EX)", "fcntl.lockf(file, fcntl.LOCK_EX)"])
def test_a_lock_file_in_use_stays_until_its_holder_is_killed(lock, hold, how):
    holder = hold(lock, how)
    assert remove_stale_lock(lock) == f"accelerator lock {lock} stays, process {holder.pid} holds it"
    assert lock.exists()
    holder.kill()
    holder.wait()
    assert "removed" in remove_stale_lock(lock) and not lock.exists()


def test_a_lock_that_this_process_holds_stays(lock):
    with open(lock):
        assert f"process {os.getpid()} holds it" in remove_stale_lock(lock)
    assert lock.exists()


@pytest.mark.parametrize("how", ["fcntl.flock(file, fcntl.LOCK_EX)", "fcntl.lockf(file, fcntl.LOCK_EX)"])
def test_locks_tell_where_open_files_cannot_be_seen(lock, hold, monkeypatch, how):
    hold(lock, how)
    monkeypatch.setattr(preemption, "_listed", lambda directory: [])  # as for another user's process
    assert remove_stale_lock(lock) == f"accelerator lock {lock} stays, a process of another user holds it"
    assert lock.exists()


def test_leaves_what_is_no_lock_file(tmp_path, lock):
    directory, link, pipe = tmp_path / "directory", tmp_path / "link", tmp_path / "pipe"
    directory.mkdir()
    link.symlink_to(lock)
    os.mkfifo(pipe)
    assert all("stays" in remove_stale_lock(path) and os.path.lexists(path) for path in (directory, link, pipe))
    assert lock.exists()
