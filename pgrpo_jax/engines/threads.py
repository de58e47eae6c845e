"""The threads engine: actors and learner on disjoint local devices of one host, in one process ("Sebulba", arXiv:2104.06272).

Each device set has two threads, so that one judges a unit while the other generates the next; only one of them generates at a time.
Threads can not be killed: a unit that is submitted again while it is under way is run once more, and whichever copy is first serves.
"""

import contextlib
import functools
import heapq
import itertools
import threading
import time
import types
from typing import Any, Callable, Sequence

import jax

from pgrpo_jax.engines import Generator
from pgrpo_jax.engines.published import Published
from pgrpo_jax.preemption import Stop
from pgrpo_jax.structs import Event, Finished, Started, Tick, Work

LANES = 2  # threads of a device set
_WAKE_SECS = 0.1  # how late a requested stop is noticed


class ThreadsEngine:
    """Hands units of work to threads of this process.

    Args:
        actor: generates and judges the units.
        actor_devices: the device sets; no device is in two of them, and none should be the learner's.
        place: from a version's weights, as the learner holds them, to a copy on one device set.
        stop: a requested stop ends a poll early.
        close_secs: longest time `close` waits for the units under way.

    Raises:
        ValueError: a device set is empty, or a device is in two.
    """

    def __init__(
        self,
        actor: Generator,
        *,
        actor_devices: Sequence[Sequence[jax.Device]],
        place: Callable[[Any, Sequence[jax.Device]], Any],
        stop: Stop,
        close_secs: float = 600.0,
    ):
        _check(actor_devices)
        self._actor, self._stop, self._close_secs = actor, stop, close_secs
        self._published = Published(lambda weights: [place(weights, devices) for devices in actor_devices])
        self._changed = threading.Condition()
        self._queue: list[tuple[int, int, int, Work, list[Any]]] = []  # a heap: the oldest step first, however late it was issued
        self._order = itertools.count()
        self._under_way: dict[str, Work] = {}  # by thread
        self._events: list[Event] = []
        self._failure: BaseException | None = None
        self._closed = False
        self._last_poll = time.monotonic()
        self.slots = LANES * len(actor_devices)
        self._threads: list[threading.Thread] = []
        for number, devices in enumerate(actor_devices):
            generating = threading.Lock()
            for lane in range(LANES):
                name = f"actor {number}, lane {lane}"
                arguments = (name, number, devices[0], generating)
                # Daemons: one that hangs in a reward must not keep a process that has given up on it.
                self._threads.append(threading.Thread(target=self._serve, args=arguments, name=name, daemon=True))
        for thread in self._threads:
            thread.start()

    def publish(self, learner: Any) -> None:
        """Places the weight versions that the learner offers now (`learner.versions`), each new one once on every device set."""
        self._published.replace(learner.versions)

    def submit(self, work: Work) -> None:
        """Queues a unit of work, with the weights of its version; a thread takes it as soon as one is idle.

        Raises:
            ValueError: the unit's weight version is not published.
        """
        placed = self._published.get(work)
        with self._changed:
            heapq.heappush(self._queue, (work.step, work.index, next(self._order), work, placed))
            self._changed.notify_all()

    def poll(self, timeout_secs: float) -> list[Event]:
        """Waits until something happened, and returns it.

        Args:
            timeout_secs: longest wait.

        Raises:
            BaseException: what a thread raised, with its traceback: the run is over.
        """
        deadline = time.monotonic() + timeout_secs
        with self._changed:
            while not self._woken() and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(min(left, _WAKE_SECS))
            if self._failure is not None:
                raise self._failure
            events, self._events = self._events, []
            before, self._last_poll = self._last_poll, time.monotonic()
            return [*events, Tick(secs=self._last_poll - before)]

    def _woken(self) -> bool:
        return bool(self._events) or self._failure is not None or self._closed or self._stop.requested

    def close(self) -> None:
        """Forgets what was queued and waits for what is under way.

        Raises:
            TimeoutError: a unit did not end in time.
        """
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._changed.notify_all()
        self._published.replace({})
        deadline = time.monotonic() + self._close_secs
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            with self._changed:
                busy = "; ".join(f"{name} with work unit {work.index} of step {work.step}" for name, work in self._under_way.items())
            raise TimeoutError(
                f"still busy {self._close_secs:g} s after the threads engine was closed: {busy}; "
                "a reward that hangs needs a deadline of its own"
            )

    def _serve(self, name: str, number: int, device: jax.Device, generating: threading.Lock) -> None:
        """One thread: units, one after the other, until the engine closes or a unit fails."""
        # The weights decide where a unit runs. What it makes before they come in (a key, say) would be made on the process's first
        # device, the learner's, and wait there for the update under way: hence the default.
        with contextlib.ExitStack() as stack, jax.default_device(device):
            stack.push(functools.partial(self._on_end, name))
            while (generated := self._generate(name, number, generating)) is not None:
                rollouts = self._actor.judge(generated)
                with self._changed:
                    del self._under_way[name]
                    self._events.append(Finished(rollouts=rollouts))
                    self._changed.notify_all()

    def _on_end(self, name: str, kind: type | None, error: BaseException | None, trace: types.TracebackType | None) -> bool:
        """What ended a thread before its time ends the run: the driver's next poll raises it."""
        with self._changed:
            work = self._under_way.pop(name, None)
            if error is not None:
                error.add_note(f"raised in {name}, at {work}")
                self._failure = self._failure or error
                self._changed.notify_all()
        return True

    def _generate(self, name: str, number: int, generating: threading.Lock) -> Any:
        """Returns the oldest queued unit, generated; None where the engine ends. Lets go of the weights."""
        with generating:
            with self._changed:
                while not self._queue and not self._closed and self._failure is None:
                    self._changed.wait()
                if self._closed or self._failure is not None:
                    return None
                *_, work, placed = heapq.heappop(self._queue)
                self._under_way[name] = work
                self._events.append(Started(work=work, worker=name))
                self._changed.notify_all()
            return self._actor.generate(placed[number], work)


def _check(actor_devices: Sequence[Sequence[jax.Device]]) -> None:
    if not actor_devices or not all(actor_devices):
        sizes = [len(devices) for devices in actor_devices]
        raise ValueError(f"the actors' device sets have the sizes {sizes}, each must be at least 1: give every actor a local device")
    devices = [device for devices in actor_devices for device in devices]
    if shared := sorted({str(device) for device in devices if devices.count(device) > 1}):
        raise ValueError(f"devices {', '.join(shared)} are in more than one actor's set: give each actor its own")
