"""Floor 1: what the processes of one SPMD program tell each other: records as bytes, and whether to stop. For pod slices without Ray.

All processes call the same methods in the same order; each call first meets the others with a deadline that names who is missing (a
collective alone would wait for ever). Orbax's barrier is the public way to JAX's own coordination service, which knows the names.
"""

import re

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from pgrpo_jax.preemption import Stop

_SMALLEST = 1 << 12  # bytes; sizes are rounded up to a power of two, so that the gather compiles a few times only


class Exchange:
    """Connects the processes of `jax.distributed`; one process alone talks to itself.

    Args:
        timeout_secs: longest wait for the slowest process to arrive: several times what a unit of work takes, compiling included.

    Attributes:
        process: index of this process.
        num_processes: how many there are.
    """

    def __init__(self, *, timeout_secs: float):
        self.process, self.num_processes = jax.process_index(), jax.process_count()
        self._timeout_secs = timeout_secs
        self._wait = multihost.get_barrier_sync_fn()
        self._count = 0

    def gather(self, what: str, payload: bytes) -> list[bytes]:
        """Returns what every process gave, by process.

        Args:
            what: what is exchanged, for people; the same in every process.
            payload: of this process, of any size.

        Raises:
            TimeoutError: a process did not come in time.
        """
        self._meet(what)
        sizes = multihost_utils.process_allgather(np.array(len(payload), np.int32))
        padded = np.zeros(_padded_size(int(sizes.max())), np.uint8)
        padded[: len(payload)] = np.frombuffer(payload, np.uint8)
        rows = multihost_utils.process_allgather(padded)
        return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]

    def agree(self, what: str, flag: bool) -> bool:
        """Returns whether any process raised its flag, the same answer in each.

        Args:
            what: as in `gather`.
            flag: of this process.

        Raises:
            TimeoutError: a process did not come in time.
        """
        self._meet(what)
        return bool(multihost_utils.process_allgather(np.array(flag, np.int32)).any())

    def _meet(self, what: str) -> None:
        self._count += 1
        try:
            self._wait(key=f"pgrpo_jax/{what}/{self._count}", timeout_ms=int(1000 * self._timeout_secs))
        except jax.errors.JaxRuntimeError as error:
            raise TimeoutError(
                f"{_missing(str(error))} of {self.num_processes} did not come to exchange {what} (number {self._count}) within "
                f"{self._timeout_secs:g} s: look at their logs, or raise the deadline if a unit of work takes that long"
            ) from error


class CollectiveStop:
    """A `Stop` of one process made the stop of all: a signal to any of them ends the same phase in each.

    Args:
        stop: set by signals to this process.
        exchange: reaches the others.
    """

    def __init__(self, stop: Stop, exchange: Exchange):
        self._stop, self._exchange = stop, exchange

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop: a wish, until `check` has told the others."""
        return self._stop.requested

    def check(self, phase: str) -> None:
        """Raises Preempted, naming the phase, if any process was asked to stop; every process must call it at the same place.

        Raises:
            Preempted: a stop was requested.
            TimeoutError: a process did not come in time.
        """
        if self._exchange.agree(f"the request to stop during {phase}", self._stop.requested):
            self._stop.reason = self._stop.reason or "another process was asked"
            self._stop.check(phase)


def _padded_size(size: int) -> int:
    """The smallest power of two, from `_SMALLEST` on, that holds `size` bytes."""
    return max(_SMALLEST, 1 << (size - 1).bit_length())


def _missing(message: str) -> str:
    """The processes that a failed barrier's message names; its first line where it names none."""
    names = re.search(r"timed out task names:\s*((?:\d+\s*)+)", message)
    return f"processes {', '.join(names[1].split())}" if names else f"processes unknown ({message.splitlines()[0][:200]})"
