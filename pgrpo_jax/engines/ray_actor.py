"""An actor's process, and the driver's hold on it: Ray starts it, anything may kill it, and another takes its place."""

import dataclasses
import threading
from typing import Any, Callable, Mapping, Sequence

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pgrpo_jax import parameter_server
from pgrpo_jax.engines import Generator
from pgrpo_jax.engines.ray_cluster import RayBlobStore
from pgrpo_jax.parameter_server import Manifest
from pgrpo_jax.preemption import remove_stale_lock
from pgrpo_jax.structs import Rollouts, Work

LANES = 2  # units one process works on: it judges one while it generates the next


@dataclasses.dataclass(frozen=True)
class RayActorSettings:
    """Where actor processes run and how long they are waited for.

    Attributes:
        num_actors: processes.
        place: called for each new process; returns Ray's scheduling strategy for it, in a list of one.
        resources: what an actor reserves on its node, for example {"TPU": 4}.
        start_secs: longest time a process may take to load the model, once it has a node.
        unit_secs: longest time a process may take for a unit, in case nobody asks for it again.
        fetch_secs: longest time weights may take to arrive.
        verify: check the weights' checksums on arrival.
    """

    num_actors: int
    place: Callable[[], Sequence[str | PlacementGroupSchedulingStrategy]] = lambda: ["SPREAD"]
    resources: Mapping[str, float] = dataclasses.field(default_factory=dict)
    start_secs: float = 900.0
    unit_secs: float = 1800.0
    fetch_secs: float = 300.0
    verify: bool = True


class ActorProcess:
    """Lives in an actor's process: one version of the weights, one generation at a time; judging overlaps."""

    def __init__(self, make_actor: Callable[[], tuple[Generator, Any]], fetch_secs: float, verify: bool):
        self._make_actor, self._fetch_secs, self._verify = make_actor, fetch_secs, verify
        self._lock = threading.Lock()
        self._loaded: tuple[tuple[int, int], Any] | None = None

    def start(self) -> None:
        """Makes the actor: loads tokenizer and task. Apart from the constructor, so that its errors keep their type."""
        remove_stale_lock()
        self._actor, self._like = self._make_actor()

    def rollout(self, manifest: Manifest, work: Work) -> Rollouts:
        """Generates and judges one unit with the weights of a manifest."""
        with self._lock:
            generated = self._actor.generate(self._weights(manifest), work)
        return self._actor.judge(generated)

    def _weights(self, manifest: Manifest) -> Any:
        name = (manifest.epoch, manifest.version)
        if self._loaded is None or self._loaded[0] != name:
            self._loaded = None  # the old version first: two of them may not fit
            like, secs = self._like, self._fetch_secs
            weights = parameter_server.fetch(RayBlobStore(), manifest, like, timeout_secs=secs, verify=self._verify)
            self._loaded = (name, weights)
        return self._loaded[1]


class RemoteActor:
    """The driver's side of one actor process: started when it is first needed, and again after it died."""

    def __init__(self, name: str, create: Callable[[], Any], start_secs: float):
        self.name, self._create, self._start_secs = name, create, start_secs
        self._lock = threading.Lock()  # held while it starts: the other lane waits for the same process
        self._handle: Any = None
        self._ready = False

    def started(self) -> Any:
        """Returns the handle of the process, started: waits for a node as long as it takes, and then `start_secs` for the model."""
        with self._lock:
            if not self._ready:
                self._handle = self._create()
                ray.get(self._handle.__ray_ready__.remote())  # a preempted node comes back when it does; the engine watches for progress
                try:
                    ray.get(self._handle.start.remote(), timeout=self._start_secs)
                except ray.exceptions.GetTimeoutError:
                    raise TimeoutError(
                        f"{self.name} did not load its model within {self._start_secs:.0f} s: look at the disk it reads from, "
                        "or raise ray.start_secs"
                    ) from None
                self._ready = True
            return self._handle

    def gone(self, handle: Any) -> None:
        """Gives a process up, so that the next call of `started` makes another."""
        with self._lock:
            if not self._ready or self._handle is handle:  # else the other lane noticed before
                self.kill()

    def is_current(self, handle: Any) -> bool:
        """Returns whether the process of a handle is still the one in use."""
        return self._ready and self._handle is handle

    def kill(self) -> None:
        """Kills the process, if there is one, whatever it is doing; who waits for it gets an error."""
        self._ready = False
        if self._handle is not None:
            ray.kill(self._handle)


def create_actor(make_actor: ray.ObjectRef, settings: RayActorSettings) -> Any:
    """Asks Ray for one actor process; it starts once a node has room for it.

    Args:
        make_actor: a reference to the function that makes the actor in that process.
        settings: where it runs, how long it waits.

    Returns:
        Its handle.
    """
    options = {"num_cpus": 0, "resources": dict(settings.resources), "max_concurrency": LANES, "max_restarts": 0, "max_task_retries": 0}
    remote = ray.remote(ActorProcess).options(**options, scheduling_strategy=settings.place()[0])
    return remote.remote(make_actor, settings.fetch_secs, settings.verify)
