"""The loop, the controller, the ray engine and the learner gang as they are, with roles that only wait: what the system itself costs."""

import functools
import time
from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np

from pgrpo_jax.controller import Controller
from pgrpo_jax.engines import gather
from pgrpo_jax.parameter_server import ParameterServer
from pgrpo_jax.preemption import Stop
from pgrpo_jax.schedule import Schedule
from pgrpo_jax.structs import Finished, Prompt, Rollouts, Work

HELD_UP_SECS = 1.0  # of a generation, and of an update
STEPS, WARM_UP_STEPS = 10, 2
UNITS_PER_ACTOR, WARM_UP_UNITS = 10, 2


class WaitingActor:
    """Takes a fixed time to generate."""

    def generate(self, weights: Any, work: Work) -> Work:
        """Waits."""
        del weights
        time.sleep(HELD_UP_SECS)
        return work

    def judge(self, generated: Work) -> Rollouts:
        """Returns a rollout of one token."""
        one = np.ones(1, np.int32)
        return Rollouts(
            work=generated, prompt_records=(Prompt("prompt", "", 0, {}),), prompts=one[None], prompt_lengths=one, completions=one[None],
            completion_lengths=one, prompt_index=one - 1, behaviour_log_probs=np.zeros((1, 1), np.float32), truncated=one > 1, texts=("",),
            rewards=np.ones(1, np.float32), reward_components={},
        )  # fmt: skip


class WaitingLearner:
    """Takes a fixed time to update."""

    def __init__(self, schedule: Schedule):
        self.step = self.next_work = 0
        self._schedule = schedule
        self.versions = {0: {"w": jnp.zeros(4, jnp.float32)}}

    def update(self, rollouts: Any, *, next_work: int) -> tuple[dict[str, float], np.ndarray]:
        """Waits."""
        del rollouts
        time.sleep(HELD_UP_SECS)
        self.step, self.next_work = self.step + 1, next_work
        self.versions[self.step] = {"w": jnp.full(4, self.step, jnp.float32)}
        needed = self._schedule.needed(self.step, 10**6)
        self.versions = {version: weights for version, weights in self.versions.items() if version in needed}
        return {}, np.zeros(1)

    def close(self) -> None:
        """Nothing is open."""


def make_actor() -> tuple[WaitingActor, Any]:
    """Returns the actor and what its weights look like."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return WaitingActor(), {"w": jax.ShapeDtypeStruct((4,), np.float32, sharding=place)}


def with_engine(num_actors: int, schedule: Schedule, run: Callable[[Any, Any], float]) -> float:
    """Calls `run(engine, learner)` on a local cluster of its own."""
    from pgrpo_jax.engines.ray_actor import RayActorSettings
    from pgrpo_jax.engines.ray_cluster import Cluster, RayBlobStore
    from pgrpo_jax.engines.ray_engine import RayEngine
    from pgrpo_jax.engines.ray_learner import GangSettings, LearnerGang

    cluster = Cluster(object_store_bytes=2 * 10**8)
    try:
        learner = LearnerGang(functools.partial(WaitingLearner, schedule), GangSettings(place=lambda: ["SPREAD"]), Stop())
        engine = RayEngine(make_actor, RayActorSettings(num_actors=num_actors), ParameterServer(RayBlobStore(), keep=8), Stop())
        engine.publish(learner)
        result = run(engine, learner)
        engine.close()
        learner.close()
        return result
    finally:
        cluster.close()


def steps_per_sec(engine: Any, learner: Any, *, schedule: Schedule) -> float:
    """Trains with one unit a step; returns the rate after the warm-up."""
    controller = Controller(schedule, num_steps=STEPS + WARM_UP_STEPS, first_step=0, next_work=0, work_per_step=1)
    start = 0.0
    for step in range(STEPS + WARM_UP_STEPS):
        if step == WARM_UP_STEPS:
            start = time.perf_counter()
        learner.update(gather(controller, engine, step, stop=Stop(), phase="benchmark"), next_work=step + 1)
        engine.publish(learner)
    return STEPS / (time.perf_counter() - start)


def units_per_sec(engine: Any, learner: Any, *, num_actors: int) -> float:
    """Generates many units; returns the rate between the end of the warm-up and the last one that all actors are busy for."""
    del learner
    for index in range(num_actors * (UNITS_PER_ACTOR + WARM_UP_UNITS)):
        engine.submit(Work(index=index, step=0, version=0))
    times: list[float] = []
    while len(times) < num_actors * (UNITS_PER_ACTOR + WARM_UP_UNITS):
        happened = [event for event in engine.poll(timeout_secs=60.0) if isinstance(event, Finished)]
        times += [time.perf_counter()] * len(happened)
    first = num_actors * WARM_UP_UNITS - 1
    return (len(times) - 1 - first) / (times[-1] - times[first])


def measure_overlap(rounds: int) -> dict[str, list[float]]:
    """Returns steps per second at (1, 1) and (1, 2), in turns, and their ratio; 2 would be perfect."""
    found: dict[str, list[float]] = {"(1, 1), steps/s": [], "(1, 2), steps/s": [], "(1, 2) / (1, 1)": []}
    for _ in range(rounds):
        rates = []
        for accept in (1, 2):
            schedule = Schedule(reload=1, accept=accept)
            rates.append(with_engine(1, schedule, functools.partial(steps_per_sec, schedule=schedule)))
        for name, value in zip(found, [*rates, rates[1] / rates[0]], strict=True):
            found[name].append(value)
    return found


def measure_actors(rounds: int) -> dict[str, list[float]]:
    """Returns units per second for 1, 2, 4 and 8 actors, and what 8 do more than 1."""
    sizes = (1, 2, 4, 8)
    found: dict[str, list[float]] = {f"{n} actors, units/s": [] for n in sizes} | {"8 actors / 1 actor": []}
    for _ in range(rounds):
        rates = [with_engine(n, Schedule(), functools.partial(units_per_sec, num_actors=n)) for n in sizes]
        for name, value in zip(found, [*rates, rates[-1] / rates[0]], strict=True):
            found[name].append(value)
    return found
