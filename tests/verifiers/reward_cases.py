"""Rewards that misbehave on request: the answer says how. Imported by reward processes too, so nothing heavy here."""

import ctypes
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np

from pgrpo_jax.structs import Prompt, Reward

SLEEPER = [sys.executable, "-c", "import time; time.sleep(3600)"]


class Misbehaving:
    """Judges "number 0.25" as 0.25; any other answer names a fault."""

    reward_components = ("answered", "length")

    def __init__(self):
        self.loaded_in = os.getpid()

    def reward(self, prompt, answer):
        fault, _, argument = answer.partition(" ")
        return getattr(self, f"_{fault}")(argument, prompt)

    def _number(self, argument, prompt):
        return Reward(float(argument), {"length": np.float32(len(argument)), "answered": True})

    def _worth(self, argument, prompt):
        return Reward(prompt.facts["worth"], {"answered": 1.0, "length": 0.0})

    def _sleep(self, argument, prompt):
        time.sleep(3600)

    def _deaf(self, argument, prompt):
        """Hangs, and no signal that a process may block reaches it."""
        signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
        while True:
            time.sleep(3600)

    def _spin(self, argument, prompt):
        while True:
            pass

    def _segfault(self, argument, prompt):
        ctypes.string_at(0)

    def _kill(self, argument, prompt):
        os.kill(os.getpid(), signal.SIGKILL)

    def _exit(self, argument, prompt):
        os._exit(int(argument))

    def _sysexit(self, argument, prompt):
        sys.exit(3)

    def _raise(self, argument, prompt):
        return 1 / 0

    def _total(self, argument, prompt):
        return Reward(float(argument), {"answered": 1.0, "length": 1.0})

    def _component(self, argument, prompt):
        return Reward(0.5, {"answered": 1.0, "length": math.nan})

    def _missing(self, argument, prompt):
        return Reward(0.5, {"answered": 1.0})

    def _unknown(self, argument, prompt):
        return Reward(0.5, {"answered": 1.0, "length": 1.0, "charm": 1.0})

    def _none(self, argument, prompt):
        return None

    def _once(self, argument, prompt):
        """Hangs, crashes or raises the first time, and remembers on disk in which process that was."""
        how, path = argument.split(" ", 1)
        if os.path.exists(path):
            return Reward(float(os.getpid()), {"answered": 1.0, "length": 1.0})
        pathlib.Path(path).write_text(str(os.getpid()))
        return getattr(self, f"_{how}")("", prompt)

    def _latter(self, argument, prompt):
        """Raises the first time, and hangs the second."""
        if os.path.exists(argument):
            pathlib.Path(argument + ".second").write_text(str(os.getpid()))
            time.sleep(3600)
        pathlib.Path(argument).write_text("seen")
        raise RuntimeError("first")

    def _await(self, argument, prompt):
        """Raises once a file is there."""
        while not os.path.exists(argument):
            time.sleep(0.01)
        raise RuntimeError("at last")

    def _abandon(self, argument, prompt):
        """Dies, and leaves a fork that holds on to all it had open."""
        if os.fork() == 0:
            time.sleep(3600)
        os._exit(4)

    def _killserver(self, argument, prompt):
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(3600)

    def _late(self, argument, prompt):
        time.sleep(float(argument))
        return Reward(float(argument), {"answered": 1.0, "length": 1.0})

    def _log(self, argument, prompt):
        """Leaves a trace of being asked at all."""
        with open(argument, "a") as file:
            file.write(f"{os.getpid()}\n")
        return Reward(0.5, {"answered": 1.0, "length": 1.0})

    def _print(self, argument, prompt):
        for stream in (sys.stdout, sys.stderr):
            print("x" * int(argument), file=stream, flush=True)
        os.write(1, b"y" * int(argument))
        return Reward(0.5, {"answered": 1.0, "length": float(sys.stdin.read() == "")})

    def _fork(self, argument, prompt):
        """Forks, and lets the child return as well."""
        os.fork()
        return Reward(0.5, {"answered": 1.0, "length": 1.0})

    def _spawn(self, argument, prompt):
        """Starts a process in its own session that outlives the call, and hangs."""
        child = subprocess.Popen(SLEEPER, start_new_session=True)
        pathlib.Path(argument).write_text(f"{os.getpid()} {child.pid}")
        time.sleep(3600)

    def _orphan(self, argument, prompt):
        """As above, but answers; the process is not its child any more, either."""
        if (pid := os.fork()) == 0:
            child = subprocess.Popen(SLEEPER, start_new_session=True)
            pathlib.Path(argument).write_text(f"{os.getpid()} {child.pid}")
            os._exit(0)
        os.waitpid(pid, 0)
        return Reward(0.5, {"answered": 1.0, "length": 1.0})

    def _alarm(self, argument, prompt):
        """Limits itself by SIGALRM, which only a main thread can."""

        def late(*_):
            raise TimeoutError("late")

        signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        try:
            time.sleep(3600)
        except TimeoutError:
            return Reward(0.5, {"answered": 1.0, "length": 1.0})

    def _signals(self, argument, prompt):
        """Is hit by the signals that stop a run."""
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
            os.kill(os.getppid(), number)
        done = subprocess.run(["sh", "-c", "kill -TERM $$"], check=False)
        return Reward(0.5, {"answered": 1.0, "length": float(-done.returncode)})

    def _backend(self, argument, prompt):
        """Whether JAX has a backend here, and how many threads this process has."""
        from jax._src import xla_bridge

        status = pathlib.Path("/proc/self/status").read_text()
        threads = float(status.split("Threads:")[1].split()[0])
        return Reward(threads, {"answered": float(xla_bridge.backends_are_initialized()), "length": float(self.loaded_in != os.getpid())})

    def _lineage(self, argument, prompt):
        return Reward(float(os.getpid()), {"answered": float(os.getppid()), "length": float(self.loaded_in)})


def load(fault="", path=""):
    """Makes the task, or misbehaves already there."""
    if fault == "raise":
        raise FileNotFoundError(f"{path} is missing")
    if fault == "sleep":
        pathlib.Path(path).write_text(str(os.getpid()))
        time.sleep(3600)
    if fault == "slow":
        time.sleep(1.5)
    if fault == "exit":
        print("no more memory", file=sys.stderr, flush=True)
        os._exit(7)
    return Misbehaving()


def prompts(count):
    """As many prompts; prompt i is worth i / 8."""
    return [Prompt(f"p{i}", "?", 0, {"worth": i / 8}) for i in range(count)]


def alive(pid):
    """Whether a process runs; one that is dead and not waited for does not."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def wait_until(holds, what):
    """Waits for a condition, a minute at most."""
    deadline = time.monotonic() + 60
    while not (value := holds()):
        assert time.monotonic() < deadline, f"waited 60 s for {what}"
        time.sleep(0.02)
    return value


def read(path):
    """Returns what a reward wrote, once it has."""
    return wait_until(lambda: path.exists() and path.read_text(), path)
