"""Preemption: SIGTERM, SIGINT or a spent time budget ask the run to save and stop; every phase looks at `requested` between pieces of work.

Imports nothing heavy, so that a program can install it before anything else.
"""

import fcntl
import os
import pathlib
import signal
import stat
import time

EXIT_PREEMPTED = 75  # sysexits.h EX_TEMPFAIL: run the same command again


class Preempted(Exception):
    """Raised where a phase ends early because a stop was requested; nothing is lost that was committed."""


class Stop:
    """A request to stop, made by a signal, by a spent time budget or by the program. Make one as the first thing of a program: the budget
    counts from there. Earlier signal handlers stay chained: replacing one would swallow its save.

    Attributes:
        reason: who asked: "SIGTERM", "time budget of 3600 s", "the program"; "" while nobody has. Only `requested` looks at the clock.
    """

    def __init__(self):
        self.reason = ""
        self._started = time.monotonic()
        self._budget_secs = 0.0
        self._signalled = False
        self._previous = {}

    @property
    def requested(self) -> bool:
        """Whether the run is asked to save and stop."""
        if not self.reason and 0 < self._budget_secs <= time.monotonic() - self._started:
            self.reason = f"time budget of {self._budget_secs:g} s"
        return bool(self.reason)

    @requested.setter
    def requested(self, value: bool) -> None:
        """Asks from within the program (True), or takes back whatever was asked (False)."""
        self.reason = "the program" if value else ""

    def install(self) -> "Stop":
        """Listens to SIGTERM and SIGINT from now on; returns itself. A second SIGINT interrupts at once."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def set_budget(self, secs: float) -> "Stop":
        """Asks to stop once `secs` have passed since this object was made (a queue's limit less the time of a save); returns itself.

        Args:
            secs: 0 = never.

        Raises:
            ValueError: it is below 0, or not a number.
        """
        if not secs >= 0:
            raise ValueError(f"checkpoint.must_save_by = {secs} is below 0: give seconds after the start of the program, 0 for never")
        self._budget_secs = secs
        return self

    def _on_signal(self, number, frame):
        again, self._signalled = self._signalled, True
        self.reason = self.reason or signal.Signals(number).name
        previous = self._previous[number]
        if callable(previous) and (number != signal.SIGINT or again):
            previous(number, frame)

    def check(self, phase: str) -> None:
        """Raises Preempted, naming the phase and the reason, if a stop was requested."""
        if self.requested:
            raise Preempted(f"stop requested during {phase} ({self.reason})")


def listen_again() -> None:
    """Takes SIGTERM back from a library that put a handler of its own below Python's (`jax.distributed.initialize` does)."""
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def remove_stale_lock(path: str | os.PathLike = "/tmp/libtpu_lockfile") -> str:
    """Removes the lock file that a killed program left behind: the accelerator would be refused to the next one. One in use stays.

    Args:
        path: the lock file; libtpu's unless given.

    Returns:
        What was done, or why nothing was, for a person to read; "" if there is no such file.
    """
    lock = pathlib.Path(path)
    try:
        file = os.open(lock, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return ""
    except OSError as error:  # another user's, a link, a directory
        return f"accelerator lock {lock} stays, it cannot be looked into ({error.strerror}): if no program uses the accelerator, remove it"
    try:
        holder = _holder(file)
        if holder:
            return f"accelerator lock {lock} stays, {holder}"
        lock.unlink()  # still locked by us: nobody took it between the look and the removal
    except OSError as error:
        return f"accelerator lock {lock} stays, it cannot be removed ({error.strerror}): if no program uses the accelerator, remove it"
    finally:
        os.close(file)
    return f"accelerator lock {lock} removed: the program that made it is gone"


def _holder(file: int) -> str:
    """Says who holds an open file as well; "" if nobody does, and then it is locked for us."""
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode):
        return "it is not a regular file"
    for process in pathlib.Path("/proc").glob("[0-9]*"):  # an open file counts, whatever kind of lock its owner takes
        ours = str(file) if process.name == str(os.getpid()) else ""
        if any(number != ours and _opens(process / "fd" / number, status) for number in _listed(process / "fd")):
            return f"process {process.name} holds it"
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "a process of another user holds it"
    return ""


def _listed(directory: pathlib.Path) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:  # the process ended just now, or is another user's: the locks tell
        return []


def _opens(descriptor: pathlib.Path, status: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(descriptor), status)
    except OSError:  # closed just now
        return False
