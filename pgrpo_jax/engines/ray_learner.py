"""The learner as a gang of Ray processes: one SPMD program that lives and dies together, and the driver's handle to it.

Every member holds the same `Learner` over its own devices (`jax.distributed` where there are several). A call goes to all members at once;
when one of them dies the call raises `LearnerLost`, and `restart` makes a new gang, which goes on from the last committed checkpoint while
the actors keep running. A restart begins a new epoch of weight versions: the shards of the old one died with their owners.
"""

import contextlib
import dataclasses
import signal
import threading
import time
from typing import Any, Callable, Mapping, Protocol, Sequence

import jax
import numpy as np
import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pgrpo_jax import parameter_server
from pgrpo_jax.engines import LearnerLost
from pgrpo_jax.engines.ray_cluster import RayBlobStore, free_address
from pgrpo_jax.parameter_server import Manifest
from pgrpo_jax.preemption import remove_stale_lock, Stop
from pgrpo_jax.structs import Rollouts

_WAKE_SECS = 0.2  # how late a requested stop is noticed
_DEATH_SECS = 10.0  # how long the death of a member may take to be known
_LOSSES = 5  # losses of the gang in a row without an update: then it is no accident


class SpmdLearner(Protocol):
    """What a member runs: `pgrpo_jax.learner.Learner`."""

    step: int
    next_work: int
    versions: Mapping[int, Any]

    def restore(self) -> bool:
        """Goes on from the newest committed checkpoint; returns whether there was one."""

    def update(self, rollouts: Sequence[Rollouts], *, next_work: int | None) -> tuple[dict[str, float], np.ndarray]:
        """Trains on the rollouts of one step."""

    def save(self, *, wait: bool) -> None:
        """Commits the state."""

    def offer(self, version: int) -> None:
        """Makes a version one that may be generated with."""

    def digest(self) -> str:
        """Returns the digest of the state."""

    def close(self) -> None:
        """Waits for checkpoints in the background."""


@dataclasses.dataclass(frozen=True)
class Status:
    """What the driver knows of the gang after each call: updates done, first work unit of the next one, versions offered."""

    step: int
    next_work: int
    versions: tuple[int, ...]
    stopping: bool


@dataclasses.dataclass(frozen=True)
class GangSettings:
    """Size and place of the gang.

    Attributes:
        place: called for each new gang; returns Ray's scheduling strategy for each member.
        num_processes: members, N.
        resources: what a member reserves on its node.
        start_secs: longest time until every member has joined and loaded the model, once there is room for the gang.
        call_secs: longest time of any call (an update with its compilation, a save).
    """

    place: Callable[[], Sequence[str | PlacementGroupSchedulingStrategy]]
    num_processes: int = 1
    resources: Mapping[str, float] = dataclasses.field(default_factory=dict)
    start_secs: float = 900.0
    call_secs: float = 3600.0


class LearnerProcess:
    """Lives in a member's process. Methods run in its main thread, one at a time."""

    def address(self) -> str:
        """Returns where member 0 can listen for the others."""
        return free_address()

    def start(self, make_learner: Callable[[], SpmdLearner], coordinator: str, rank: int, size: int, secs: float) -> Status:
        """Joins the gang and makes the learner."""
        remove_stale_lock()
        if size > 1:
            jax.distributed.initialize(coordinator, size, rank, initialization_timeout=int(secs))
        # After `initialize`, which would take it over: a node that is about to go tells the driver at the next call.
        self._stopping = threading.Event()
        signal.signal(signal.SIGTERM, lambda number, frame: self._stopping.set())
        self._learner = make_learner()
        return self._status()

    def call(self, method: str, *args: Any, **kwargs: Any) -> tuple[Any, Status]:
        """Calls a method of the learner."""
        return getattr(self._learner, method)(*args, **kwargs), self._status()

    def publish(self, version: int, epoch: int, checksums: bool) -> Manifest:
        """Puts this member's shards of a version into the object store, each once."""
        weights = self._learner.versions[version]
        return parameter_server.publish_shards(RayBlobStore(), weights, version=version, epoch=epoch, checksums=checksums)

    def _status(self) -> Status:
        learner = self._learner
        return Status(learner.step, learner.next_work, tuple(sorted(learner.versions)), self._stopping.is_set())


class LearnerGang:
    """The driver's handle; the same methods as a learner in this process.

    Args:
        make_learner: called in every member; must be importable there.
        settings: size and place.
        stop: looked at while a gang starts, which may have to wait for its nodes.
        checksums: compute them for published shards.

    Attributes:
        step: updates done.
        next_work: index of the first work unit of the next update.
        versions: weight versions on offer.
        stopping: a member's node is about to be taken away.
        restarts: gangs made after the first.
        lost: there is no gang: it must be restarted.
    """

    def __init__(self, make_learner: Callable[[], SpmdLearner], settings: GangSettings, stop: Stop, *, checksums: bool = True):
        self._make_learner, self._settings, self._stop, self._checksums = make_learner, settings, stop, checksums
        self._members: list[Any] = []
        self._manifests: dict[int, Manifest] = {}
        self._epoch = self._losses = 0
        self.restarts = -1
        self.restart()

    @property
    def lost(self) -> bool:
        """Whether there is no gang."""
        return not self._members

    def restart(self) -> None:
        """Makes a new gang, in a new epoch; the caller restores it.

        Raises:
            Preempted: a stop was requested.
            ChildProcessError: the gang was lost again and again without an update in between.
            TimeoutError: not all members started in time.
        """
        settings = self._settings
        while True:
            self.kill()
            self._epoch, self.restarts, self._manifests = self._epoch + 1, self.restarts + 1, {}
            options = {"num_cpus": 0, "resources": dict(settings.resources), "max_restarts": 0, "max_task_retries": 0}
            process = ray.remote(LearnerProcess)
            self._members = [process.options(**options, scheduling_strategy=strategy).remote() for strategy in settings.place()]
            try:
                self._join()
                return
            except LearnerLost:
                continue

    def _join(self) -> None:
        size, secs = self._settings.num_processes, self._settings.start_secs
        coordinator = self._wait("find an address", [self._members[0].address.remote()], secs, starting=True)[0]
        make_learner = ray.put(self._make_learner)
        starts = [member.start.remote(make_learner, coordinator, rank, size, secs) for rank, member in enumerate(self._members)]
        self._note(self._wait("start", starts, secs, starting=True))

    def restore(self) -> bool:
        """Goes on from the newest committed checkpoint; returns whether there was one."""
        return self._call("restore")

    def update(self, rollouts: Sequence[Rollouts], *, next_work: int | None = None) -> tuple[dict[str, float], np.ndarray]:
        """Trains on the rollouts of one step; see `Learner.update`.

        Raises:
            LearnerLost: a member died; the gang must be restarted and restored.
        """
        result = self._call("update", ray.put(tuple(rollouts)), next_work=next_work)
        self._losses = 0
        return result

    def publish(self) -> list[Manifest]:
        """Puts the versions on offer that are not published yet, shard by shard from every member; returns all their manifests.

        Raises:
            LearnerLost: a member died.
        """
        if self.lost:
            raise LearnerLost("there is no learner to publish")
        for version in self.versions:
            if version not in self._manifests:
                puts = [member.publish.remote(version, self._epoch, self._checksums) for member in self._members]
                parts = self._wait(f"publish version {version}", puts, self._settings.call_secs)
                self._manifests[version] = parameter_server.merge(parts)
        self._manifests = {version: self._manifests[version] for version in self.versions}
        return list(self._manifests.values())

    def save(self, *, wait: bool = False) -> None:
        """Commits the state as one checkpoint; see `Learner.save`."""
        self._call("save", wait=wait)

    def offer(self, version: int) -> None:
        """Makes a version one that may be generated with, until the next update; see `Learner.offer`."""
        self._call("offer", version)

    def digest(self) -> str:
        """Returns the digest of the state."""
        return self._call("digest")

    def close(self) -> None:
        """Waits for checkpoints in the background, and ends the gang."""
        if self._members:
            with contextlib.suppress(LearnerLost):  # then nothing is left to wait for
                self._call("close")
        self.kill()

    def kill(self) -> None:
        """Kills every member, whatever it is doing."""
        for member in self._members:
            ray.kill(member)
        self._members = []

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        if self.lost:
            raise LearnerLost(f"there is no learner to {method}")
        calls = [member.call.remote(method, *args, **kwargs) for member in self._members]
        results = self._wait(method, calls, self._settings.call_secs)
        self._note([status for _, status in results])
        return results[0][0]

    def _note(self, statuses: Sequence[Status]) -> None:
        first = statuses[0]
        self.step, self.next_work, self.versions = first.step, first.next_work, first.versions
        self.stopping = any(status.stopping for status in statuses)

    def _wait(self, what: str, calls: Sequence[ray.ObjectRef], secs: float, *, starting: bool = False) -> list[Any]:
        """Results of all members; as soon as one of them fails the others, who wait for it, are killed."""
        pending, deadline = list(calls), time.monotonic() + secs
        while pending:
            left = max(0.0, deadline - time.monotonic())
            done, pending = ray.wait(pending, num_returns=1, timeout=min(left, _WAKE_SECS))
            if starting:
                self._stop.check("the start of the learner")
            try:
                ray.get(done)
            except ray.exceptions.RayTaskError as error:
                if (death := _death(pending)) is not None:  # what this member raised is only that it missed the other
                    raise self._lost(what, death) from error
                self.kill()
                raise error.cause from error
            except ray.exceptions.RayError as error:
                raise self._lost(what, error) from error
            if not done and left == 0.0:
                late = [rank for rank, call in enumerate(calls) if call in pending]
                self.kill()
                raise TimeoutError(
                    f"the learner did not {what} within {secs:.0f} s: its processes {late} of 0 to {len(calls) - 1} did not answer; look at "
                    "their nodes, or raise ray.start_secs or ray.call_secs"
                )
        return ray.get(list(calls))

    def _lost(self, what: str, error: Exception) -> Exception:
        self.kill()
        self._losses += 1
        reason = " ".join(str(error).split())[:300]
        if self._losses >= _LOSSES:
            return ChildProcessError(f"the learner was lost {self._losses} times in a row without an update; the last time: {reason}")
        return LearnerLost(f"a learner process was lost while it was to {what}: {reason}")


def _death(calls: Sequence[ray.ObjectRef]) -> ray.exceptions.RayActorError | None:
    """Returns why one of the members that were called is dead, None if none is; it may take a moment to be known."""
    for call in ray.wait(list(calls), num_returns=len(calls), timeout=_DEATH_SECS)[0] if calls else ():
        try:
            ray.get(call)
        except ray.exceptions.RayActorError as error:
            return error
        except ray.exceptions.RayTaskError:
            continue
    return None
