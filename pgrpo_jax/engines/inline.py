"""The inline engine: actor and learner alternate in one process and one thread. The default, and the one to debug with.

With an exchange it is one SPMD program over several processes, a pod slice without Ray: every process runs the same loop, generates its
share of the units, and hands its rollouts to all, so that all see the same events in the same order.
"""

import collections
import struct
import time
from typing import Any, Callable, Protocol

from pgrpo_jax.engines.published import Published
from pgrpo_jax.exchange import Exchange
from pgrpo_jax.rollout_files import pack_rollouts, unpack_rollouts
from pgrpo_jax.structs import Event, Finished, Rollouts, Started, Tick, Work

_HEADER = struct.Struct("<?d")  # failed, seconds since the last poll


class Generator(Protocol):
    """What the engine runs: `pgrpo_jax.actor.Actor`."""

    def rollout(self, weights: Any, work: Work) -> Rollouts:
        """Generates and judges a unit."""


class InlineEngine:
    """Runs work when it is polled: one unit a poll, or one in each process.

    Args:
        actor: generates the units.
        localise: from a version's weights to what this process can generate with; where the learner's weights are spread over the devices
            of several processes, these come together in it.
        exchange: reaches the other processes; None where there are none.
    """

    def __init__(self, actor: Generator, *, localise: Callable[[Any], Any] = lambda weights: weights, exchange: Exchange | None = None):
        self._actor, self._localise, self._exchange = actor, localise, exchange
        self._published = Published(localise)
        self._queue: collections.deque[tuple[int, Work, Any]] = collections.deque()  # place in the order of submission, unit, weights
        self._submitted = 0
        self._last_poll = time.monotonic()
        self.slots = 1 if exchange is None else exchange.num_processes

    def publish(self, learner: Any) -> None:
        """Takes over the weight versions that the learner offers now (`learner.versions`: copies that no update touches)."""
        self._published.replace(learner.versions)

    def submit(self, work: Work) -> None:
        """Queues a unit of work, with the weights of its version.

        Raises:
            ValueError: the unit's weight version is not published.
        """
        self._queue.append((self._submitted, work, self._published.get(work)))
        self._submitted += 1

    def poll(self, timeout_secs: float) -> list[Event]:
        """Generates the oldest queued unit (with an exchange: of each process) and returns what happened.

        Args:
            timeout_secs: longest wait for an event; nothing is waited for here, but the other processes, whose deadline is the exchange's.

        Raises:
            Exception: what the actor raised; RuntimeError where it was raised in another process.
            TimeoutError: another process did not come in time.
        """
        units = [self._queue.popleft() for _ in range(min(self.slots, len(self._queue)))]
        if self._exchange is not None:
            return self._poll_together(self._exchange, units)
        events: list[Event] = []
        for _, work, weights in units:
            events += [Started(work=work, worker="inline"), Finished(rollouts=self._actor.rollout(weights, work))]
        return [*events, Tick(secs=self._elapsed())]

    def _elapsed(self) -> float:
        before, self._last_poll = self._last_poll, time.monotonic()
        return self._last_poll - before

    def _poll_together(self, exchange: Exchange, units: list[tuple[int, Work, Any]]) -> list[Event]:
        mine = [(work, weights) for place, work, weights in units if place % exchange.num_processes == exchange.process]
        failure = None
        try:
            content = pack_rollouts([self._actor.rollout(weights, work) for work, weights in mine])
        except Exception as error:  # raised below, once the others, who would wait for this process, know of it
            failure, content = error, f"{type(error).__name__}: {error}".encode()
        parts = exchange.gather("rollouts", _HEADER.pack(failure is not None, self._elapsed()) + content)
        if failure is not None:
            raise failure
        arrived = {}
        for process, part in enumerate(parts):
            failed, _ = _HEADER.unpack_from(part)
            if failed:
                raise RuntimeError(f"process {process} failed to generate its unit of work: {part[_HEADER.size :].decode()}")
            arrived |= {(process, r.work.index): r for r in unpack_rollouts(part[_HEADER.size :], source=f"what process {process} sent")}
        events: list[Event] = []
        for place, work, _ in units:
            process = place % exchange.num_processes
            events += [Started(work=work, worker=f"process {process}"), Finished(rollouts=arrived[process, work.index])]
        return [*events, Tick(secs=_HEADER.unpack_from(parts[0])[1])]  # the first process's clock is everybody's

    def close(self) -> None:
        """Forgets queued work and weights."""
        self._queue.clear()
        self._published.replace({})
