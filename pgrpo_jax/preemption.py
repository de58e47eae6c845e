"""Preemption: SIGTERM and SIGINT ask the run to save and stop; every phase looks at `requested` between two pieces of work.

Imports nothing heavy, so that a program can install it before anything else.
"""

import signal

EXIT_PREEMPTED = 75  # sysexits.h EX_TEMPFAIL: run the same command again


class Preempted(Exception):
    """Raised where a phase ends early because a stop was requested; nothing is lost that was committed."""


class Stop:
    """A request to stop, set by a signal. Earlier handlers stay chained: replacing one would swallow its save."""

    def __init__(self):
        self.requested = False
        self._previous = {}

    def install(self) -> "Stop":
        """Listens to SIGTERM and SIGINT from now on; returns itself. A second SIGINT interrupts at once."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, number, frame):
        again, self.requested = self.requested, True
        previous = self._previous[number]
        if callable(previous) and (number != signal.SIGINT or again):
            previous(number, frame)

    def check(self, phase: str) -> None:
        """Raises Preempted, naming the phase, if a stop was requested."""
        if self.requested:
            raise Preempted(f"stop requested during {phase}")
