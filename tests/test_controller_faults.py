"""Random fault schedules, seeded: the controller among actors that die, hang, answer twice or late, and a learner that goes back in time.

The world is simulated without processes or arrays. The weights after s updates are a digest of everything trained on so far, and a
rollout's rewards are a pure function of (weights, work): one wrong, missing or repeated unit changes every bit that follows.
"""

import collections
import dataclasses
import hashlib
import random
from typing import Any, NamedTuple

import numpy as np
import pytest

from pgrpo_jax.controller import Controller
from pgrpo_jax.schedule import Schedule
from pgrpo_jax.structs import Finished, Lost, Started, Tick, Work

K, ROWS = 3, 4  # preference groups; completions of a unit
NUM_STEPS, FIRST_WORK = 20, 7
LEASE_SECS = 30.0
DETERMINISTIC = [Schedule(1, 1), Schedule(1, 2), Schedule(4, 8), Schedule(3, 7, 2)]
FRESHEST = [Schedule(1, 4, policy="freshest"), Schedule(1, 0, policy="freshest"), Schedule(2, 4, policy="freshest")]
SEEDS = range(100)


def digest(*parts: Any) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


class Answer(NamedTuple):
    """All of a rollout that the simulation needs."""

    work: Work
    rewards: tuple[float, ...]


def answer(weights: int, work: Work) -> Answer:
    return Answer(work, tuple(digest(weights, work.index, row) / 2**64 for row in range(ROWS)))


def preference_ids(index: int) -> list[int]:
    return [digest("preference", index, row) % K for row in range(ROWS)]


def merged(history: tuple, made: Answer) -> tuple:
    """Welford's update in float64: ((count, mean, m2) of each preference group)."""
    rows = [list(moments) for moments in history]
    for p, reward in zip(preference_ids(made.work.index), made.rewards):
        count, mean, m2 = rows[p]
        delta = reward - mean
        mean += delta / (count + 1)
        rows[p] = [count + 1, mean, m2 + delta * (reward - mean)]
    return tuple(tuple(moments) for moments in rows)


@dataclasses.dataclass(frozen=True)
class State:
    """The learner's: what a checkpoint holds, and for the checks how it came about."""

    step: int = 0
    next_work: int = FIRST_WORK
    weights: tuple[int, ...] = (digest("initial weights"),)  # after 0, 1, … updates
    versions: tuple[int, ...] = (0,)  # those that actors can load
    history: tuple = ((0, 0.0, 0.0),) * K
    trained: tuple[Answer, ...] = ()


def update(state: State, answers: tuple[Answer, ...], schedule: Schedule, next_work: int) -> State:
    history = state.history
    for made in answers:
        history = merged(history, made)
    step, weights = state.step + 1, digest(state.weights[-1], history, [made.rewards for made in answers])
    versions = tuple(v for v in (*state.versions, step) if v in schedule.needed(step, NUM_STEPS))
    return State(step, next_work, (*state.weights, weights), versions, history, (*state.trained, *answers))


def without_faults(schedule: Schedule, work_per_step: int) -> State:
    """The oracle: no controller, no actors, every version at hand."""
    state = State()
    for step in range(NUM_STEPS):
        indices = range(FIRST_WORK + step * work_per_step, FIRST_WORK + (step + 1) * work_per_step)
        version = schedule.version(step)
        answers = tuple(answer(state.weights[version], Work(index=i, step=step, version=version)) for i in indices)
        state = update(state, answers, schedule, indices.stop)
    return state


@dataclasses.dataclass
class Job:
    """A unit in the hands of an actor."""

    work: Work
    made: Answer
    fate: str
    polls: int


class Fleet:
    """An engine whose actors fail in every way; it says `Started`, `Finished` and `Lost` in any order.

    Of a unit that hangs it says nothing: only the lease brings it back. Its actor is free when the unit is submitted again; where that
    never happens (another copy arrived, or a restore took the unit back) it frees itself long after.
    """

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.slots = rng.randint(1, 6)
        self.versions: dict[int, int] = {}
        self.queue: list[Work] = []
        self.jobs: list[Job] = []
        self.late: list[Answer] = []

    def submit(self, work: Work) -> None:
        assert work.version in self.versions, f"{work} names a version that is not published: {self.versions}"
        for job in [job for job in self.jobs if job.work.index == work.index]:  # its lease ran out, or a restore asks again
            self.give_up(job)
        self.queue.append(work)

    def give_up(self, job: Job) -> None:
        self.jobs.remove(job)
        if self.rng.random() < 0.5:  # it was only slow, and its answer is on the way
            self.late.append(job.made)

    def restore(self) -> None:
        """The learner went back: what is queued is forgotten, what runs goes on."""
        self.queue.clear()

    def poll(self) -> list:
        events = []
        while self.queue and len(self.jobs) < self.slots:
            work = self.queue.pop(0)
            if work.version not in self.versions:
                events.append(Lost(work, "its version is gone"))
                continue
            fate = self.rng.choices(["finish", "twice", "die", "hang"], [12, 2, 3, 1])[0]
            polls = 200 if fate == "hang" else self.rng.choice([1, 1, 2, 3, 15])
            self.jobs.append(Job(work, answer(self.versions[work.version], work), fate, polls))
            events.append(Started(work, "actor"))
        for job in list(self.jobs):
            job.polls -= 1
            if job.polls > 0:
                continue
            self.jobs.remove(job)
            if job.fate == "die":
                events += [Lost(job.work, "died")] * self.rng.randint(1, 2)
            elif job.fate != "hang":
                events.append(Finished(job.made))
                self.late += [job.made] * (job.fate == "twice")
        for made in [made for made in self.late if self.rng.random() < 0.1]:
            self.late.remove(made)
            events.append(Finished(made))
        self.rng.shuffle(events)
        return [*events, Tick(self.rng.choice([0.0, 0.1, 2.0, 8.0, 40.0]))]


def check_taken(answers: tuple[Answer, ...], state: State, schedule: Schedule, work_per_step: int) -> None:
    indices = [made.work.index for made in answers]
    assert len(indices) == work_per_step and indices == sorted(set(indices))
    assert not set(indices) & {made.work.index for made in state.trained}, "trained twice"
    for made in answers:
        staleness = state.step - made.work.version
        assert 0 <= staleness < (schedule.accept or NUM_STEPS), f"{made.work} was admitted at step {state.step}"
        assert made == answer(state.weights[made.work.version], made.work), "generated by weights that a restore took back"


def run(schedule: Schedule, seed: int) -> tuple[State, int, collections.Counter]:
    """One run under faults: the state it ends with, units in a step, and what happened."""
    rng = random.Random(digest(repr(schedule), seed))
    work_per_step, save_every, crash_rate = rng.randint(1, 3), rng.randint(1, 6), rng.choice([0.0, 0.02, 0.06])
    fleet, state, seen = Fleet(rng), State(), collections.Counter()
    sizes = {"num_steps": NUM_STEPS, "work_per_step": work_per_step, "lease_secs": LEASE_SECS}
    committed, controller = state, Controller(schedule, first_step=0, next_work=state.next_work, **sizes)
    for _ in range(20_000):
        fleet.versions = {version: state.weights[version] for version in state.versions}
        for work in controller.due(state.step, slots=fleet.slots):
            fleet.submit(work)
        for event in fleet.poll():
            of_lost_future = isinstance(event, Finished) and event.rollouts.work.version > state.step
            seen["late answers of a lost future"] += of_lost_future
            controller.on(event)
        if controller.ready(state.step):
            answers = controller.take(state.step)
            check_taken(answers, state, schedule, work_per_step)
            state = update(state, answers, schedule, controller.next_work(state.step + 1))
            seen.update(controller.metrics())
            committed = state if state.step % save_every == 0 else committed
        if state.step == NUM_STEPS:
            return state, work_per_step, seen
        if rng.random() < crash_rate:
            seen["restores"] += 1
            state = committed
            next_work = max(state.next_work, controller.next_work(state.step))
            controller = Controller(schedule, first_step=state.step, next_work=next_work, **sizes)
            fleet.restore()
    raise AssertionError(f"stuck at step {state.step}, seed {seed}: {controller.waits_for(state.step)}")


def name(schedule: Schedule) -> str:
    return f"{schedule.policy} ({schedule.reload},{schedule.accept}) lag {schedule.lag}"


@pytest.mark.parametrize("schedule", DETERMINISTIC, ids=name)
def test_deterministic_runs_repeat_to_the_bit_whatever_fails(schedule):
    seen = collections.Counter()
    for seed in SEEDS:
        state, work_per_step, happened = run(schedule, seed)
        assert state == without_faults(schedule, work_per_step), f"seed {seed}"
        seen += happened
    faults = ["controller/reissued", "controller/lease_expired", "controller/duplicates", "restores", "late answers of a lost future"]
    assert min(seen[fault] for fault in faults) >= 5, seen
    assert seen["controller/dropped"] == 0


@pytest.mark.parametrize("schedule", FRESHEST, ids=name)
def test_freshest_trains_each_unit_at_most_once_whatever_fails(schedule):
    seen = collections.Counter()
    for seed in SEEDS:
        state, work_per_step, happened = run(schedule, seed)
        indices = [made.work.index for made in state.trained]
        assert len(indices) == len(set(indices)) == NUM_STEPS * work_per_step and max(indices) < state.next_work
        ids = np.array([preference_ids(index) for index in indices])
        rewards = np.array([made.rewards for made in state.trained])
        for p, (count, mean, m2) in enumerate(state.history):
            mine = rewards[ids == p]
            assert count == len(mine)
            if count:
                np.testing.assert_allclose([mean, m2], [mine.mean(), ((mine - mine.mean()) ** 2).sum()], rtol=1e-9, atol=1e-12)
        seen += happened
    faults = ["controller/reissued", "controller/lease_expired", "controller/duplicates", "restores", "late answers of a lost future"]
    assert min(seen[fault] for fault in faults) >= 5, seen
    assert (seen["controller/dropped"] > 0) == (schedule.accept > 0), seen
