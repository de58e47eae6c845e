"""The ray engine: actors as processes of a Ray cluster, disposable at any moment, fed with weights by the parameter server.

Each actor process has two lanes, so that it judges one unit while it generates the next. A thread of the driver serves each lane: it takes
the oldest queued unit, hands it over with the manifest of its weights, and waits. So actors stay busy while the learner updates.
"""

import concurrent.futures
import functools
import heapq
import itertools
import threading
import time
from typing import Any, Callable

import ray

from pgrpo_jax.engines import Generator
from pgrpo_jax.engines.ray_actor import LANES, RayActorSettings, RemoteActor, create_actor
from pgrpo_jax.parameter_server import BlobsLost, Manifest, ParameterServer
from pgrpo_jax.preemption import Stop
from pgrpo_jax.structs import Event, Finished, Lost, Started, Tick, Work

_WAKE_SECS = 0.1  # how late a requested stop is noticed
_CLOSE_SECS = 10.0
_DEATHS = 10  # for each actor, with not one unit finished by any in between: then it is no accident


class RayEngine:
    """Hands units of work to actor processes. Use between `Cluster(...)` and its `close`.

    Args:
        make_actor: called in each actor process; returns the actor and what its weights look like there (a tree of
            `jax.ShapeDtypeStruct` with shardings). Pickled once; must be importable there.
        settings: how many, where, how long to wait.
        server: the versions that are published.
        stop: a requested stop ends a poll early.
    """

    def __init__(self, make_actor: Callable[[], tuple[Generator, Any]], settings: RayActorSettings, server: ParameterServer, stop: Stop):
        self._settings, self._server, self._stop = settings, server, stop
        self._changed = threading.Condition()
        self._queue: list[tuple[int, int, int, Work, Manifest]] = []  # a heap: the oldest step first, however late it was issued
        self._order = itertools.count()
        self._offered: set[int] = set()
        self._under_way: dict[str, tuple[Work, RemoteActor, int]] = {}  # lane -> unit, its actor, the epoch of its weights
        self._events: list[Event] = []
        self._failure: BaseException | None = None
        self._closed = False
        self._deaths = 0
        self._last_poll = self._last_progress = time.monotonic()
        self.slots = settings.num_actors * LANES
        create = functools.partial(create_actor, ray.put(make_actor), settings)
        self._actors = [RemoteActor(f"actor {i}", create, settings.start_secs) for i in range(settings.num_actors)]
        self._threads = concurrent.futures.ThreadPoolExecutor(self.slots, "lane")
        lanes = [(actor, f"{actor.name}, lane {lane}") for actor in self._actors for lane in range(LANES)]
        self._lanes = [self._threads.submit(self._serve, *lane) for lane in lanes]
        for lane in self._lanes:
            lane.add_done_callback(self._on_end)

    def publish(self, learner: Any) -> None:
        """Offers the manifests that the learner made (`learner.publish()`), and lets go of what no unit needs any more."""
        manifests = learner.publish()
        with self._changed:
            for manifest in manifests:
                if manifest.version not in self._server.versions:
                    self._make_room()
                self._server.offer(manifest)
            epoch = self._server.epoch
            self._queue = [entry for entry in self._queue if entry[-1].epoch == epoch]  # the rest belongs to a lost future
            heapq.heapify(self._queue)
            self._offered = {*learner.versions}
            self._server.retire(needed={*self._offered, *(entry[-1].version for entry in self._queue)})

    def _make_room(self) -> None:
        """Gives up the unit with the oldest weights while it alone keeps the server full; only "freshest" runs that far ahead of a unit."""
        while self._under_way and len(self._server.versions) >= self._server.keep:
            lane = min(self._under_way, key=lambda lane: self._under_way[lane][0].version)
            work, actor, _ = self._under_way.pop(lane)
            actor.kill()
            self._server.release(lane)
            self._events.append(Lost(work=work, reason=f"{lane} held weight version {work.version} back for too long"))

    def submit(self, work: Work) -> None:
        """Queues a unit; one that is under way has outlived its lease: its actor is killed, and started anew.

        Raises:
            ValueError: the unit's weight version is not published.
        """
        if work.version not in self._offered:
            raise ValueError(
                f"work unit {work.index} needs weight version {work.version}, published are {sorted(self._offered)}: "
                "publish it before submitting"
            )
        with self._changed:
            manifest = self._server.get(work.version)
            for lane, (held, actor, epoch) in list(self._under_way.items()):
                # Of an earlier epoch, it was issued by a driver that has restored the learner since: its lease did not run out.
                if (held.split, held.index, epoch) == (work.split, work.index, manifest.epoch):
                    del self._under_way[lane]  # nothing is said of it any more
                    actor.kill()
            heapq.heappush(self._queue, (work.step, work.index, next(self._order), work, manifest))
            self._changed.notify_all()

    def poll(self, timeout_secs: float) -> list[Event]:
        """Waits until something happened, and returns it.

        Args:
            timeout_secs: longest wait.

        Raises:
            Exception: what an actor raised (a reward that failed, weights that are not finite): doing it again would not help.
            TimeoutError: no actor has a node.
        """
        deadline = time.monotonic() + timeout_secs
        with self._changed:
            while not self._events and self._failure is None and not self._stop.requested and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(min(left, _WAKE_SECS))
            if self._failure is not None:
                raise self._failure
            events, self._events = self._events, []
            now = time.monotonic()
            self._check_progress(now, happened=bool(events))
            secs, self._last_poll = now - self._last_poll, now
        return [*events, Tick(secs=secs)]

    def _check_progress(self, now: float, *, happened: bool) -> None:
        if happened or self._under_way or not self._queue:
            self._last_progress = now
        elif now - self._last_progress > self._settings.start_secs:
            raise TimeoutError(
                f"{len(self._queue)} units of work wait, and none of {len(self._actors)} actors has had a node for {now - self._last_progress:.0f} s: "
                "look at the cluster (ray status), lower num_actors or ray.actor_resources, or raise ray.start_secs"
            )

    def close(self) -> None:
        """Kills the actors and forgets what was queued."""
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._changed.notify_all()
        deadline, running = time.monotonic() + _CLOSE_SECS, set(self._lanes)
        while running and time.monotonic() < deadline:
            for actor in self._actors:
                actor.kill()  # again and again: one may just be starting
            running = concurrent.futures.wait(running, timeout=_WAKE_SECS).not_done
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _serve(self, actor: RemoteActor, lane: str) -> None:
        """The thread of one lane: units, one after the other, until the engine closes or a unit fails for good."""
        while not self._closed and self._failure is None:
            handle = self._start(actor)
            if handle is None or (entry := self._take(lane, actor, handle)) is None:
                continue
            *_, work, manifest = entry
            try:
                # The controller's lease is shorter; this ends units that it no longer waits for.
                rollouts = ray.get(handle.rollout.remote(manifest, work), timeout=self._settings.unit_secs)
            except ray.exceptions.RayTaskError as error:
                if not isinstance(error.cause, (BlobsLost, TimeoutError)):
                    raise error.cause from error
                self._done(lane, Lost(work=work, reason=f"{lane}: {error.cause}"))
            except ray.exceptions.RayError as error:
                self._done(lane, Lost(work=work, reason=f"{lane}: {_line(error)}"))
                self._given_up(actor, handle, error)
            else:
                self._done(lane, Finished(rollouts=rollouts))

    def _on_end(self, lane: concurrent.futures.Future) -> None:
        """What ended a lane before its time is raised by the driver's next poll."""
        if (error := lane.exception()) is not None:
            with self._changed:
                self._failure = self._failure or error
                self._changed.notify_all()

    def _start(self, actor: RemoteActor) -> Any:
        """Returns a started process, None where it died before it was ready."""
        try:
            return actor.started()
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayError as error:
            self._given_up(actor, None, error)
            return None

    def _given_up(self, actor: RemoteActor, handle: Any, error: Exception) -> None:
        """Notes the death of a process.

        Raises:
            ChildProcessError: they die again and again, and nothing gets done.
        """
        if self._closed:
            return
        actor.gone(handle)
        self._deaths += 1
        if self._deaths > _DEATHS * len(self._actors):
            raise ChildProcessError(
                f"actors died {self._deaths} times without finishing one unit of work, {_DEATHS} for each of {len(self._actors)} are allowed: "
                f"look at the memory of their nodes; the last one: {_line(error)}"
            )

    def _take(self, lane: str, actor: RemoteActor, handle: Any) -> tuple[int, int, int, Work, Manifest] | None:
        """Returns the oldest queued unit, now under way; None where the engine ends or the process was given up meanwhile."""
        with self._changed:
            while not self._queue and not self._closed and self._failure is None:
                self._changed.wait()
            if self._closed or self._failure is not None or not actor.is_current(handle):
                return None
            entry = heapq.heappop(self._queue)
            *_, work, manifest = entry
            self._under_way[lane] = (work, actor, manifest.epoch)
            self._server.acquire(lane, manifest.version)
            self._events.append(Started(work=work, worker=lane))
            self._changed.notify_all()
            return entry

    def _done(self, lane: str, event: Finished | Lost) -> None:
        """Tells of a unit's end; nothing is said of the loss of one that was given up before."""
        with self._changed:
            held = self._under_way.pop(lane, None)
            self._deaths = 0 if isinstance(event, Finished) else self._deaths
            self._server.release(lane)
            if held is not None or isinstance(event, Finished):
                self._events.append(event)
            self._changed.notify_all()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
