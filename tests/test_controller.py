"""The schedule against its table and brute force; the state machine under random orders of events."""

import random
import types

import pytest

from pgrpo_jax.controller import Controller, Schedule
from pgrpo_jax.structs import Finished, Lost, Tick, Work

SCHEDULES = [(1, 1, None), (1, 2, None), (1, 5, 3), (2, 4, None), (3, 7, 4), (4, 4, None), (4, 8, None), (4, 9, 5), (16, 32, None)]


@pytest.mark.parametrize(
    "reload, accept, version",
    [
        (1, 1, lambda s: s),
        (1, 2, lambda s: max(0, s - 1)),
        (16, 16, lambda s: 16 * (s // 16)),
        (16, 32, lambda s: max(0, 16 * (s // 16) - 16)),  # one window behind
    ],
)
def test_the_table_of_versions(reload, accept, version):
    schedule = Schedule(reload=reload, accept=accept)
    assert [schedule.version(s) for s in range(100)] == [version(s) for s in range(100)]


@pytest.mark.parametrize("reload, accept, lag", SCHEDULES)
def test_versions_are_published_admissible_and_never_of_the_future(reload, accept, lag):
    schedule = Schedule(reload=reload, accept=accept, lag=lag)
    versions = [schedule.version(s) for s in range(200)]
    assert versions == sorted(versions)
    for step, version in enumerate(versions):
        assert schedule.publishes(version) and 0 <= step - version < accept
    assert [s for s in range(40) if schedule.publishes(s)] == list(range(0, 40, reload))


@pytest.mark.parametrize("reload, accept, lag", SCHEDULES)
@pytest.mark.parametrize("num_steps", [1, 7, 40])
def test_needed_is_what_later_steps_are_generated_with(reload, accept, lag, num_steps):
    schedule = Schedule(reload=reload, accept=accept, lag=lag)
    for step in range(num_steps + 1):
        brute = sorted({schedule.version(s) for s in range(step, num_steps)} & set(range(step + 1)))
        assert schedule.needed(step, num_steps) == tuple(brute)


@pytest.mark.parametrize("reload, accept", [(1, 1), (1, 2), (4, 4), (4, 8), (4, 6)])
def test_the_default_lag(reload, accept):
    assert Schedule(reload=reload, accept=accept).lag == min(accept - reload, reload)


@pytest.mark.parametrize(
    "reload, accept, lag, message",
    [
        (0, 1, None, "staleness.reload = 0 is below 1: "),
        (2, 1, None, "staleness.accept = 1 is below staleness.reload = 2: .* set accept >= reload"),
        (1, 2, 2, r"staleness.lag = 2 is outside \[0, accept - reload = 1\]: "),
        (1, 2, -1, r"staleness.lag = -1 is outside \[0, accept - reload = 1\]: "),
    ],
)
def test_bounds(reload, accept, lag, message):
    with pytest.raises(ValueError, match=message):
        Schedule(reload=reload, accept=accept, lag=lag)


def rollouts(work):
    """All that the controller looks at."""
    return types.SimpleNamespace(work=work)


class Simulation:
    """An engine that loses, repeats, delays and reorders; weights exist once their step is done."""

    def __init__(self, schedule, *, num_steps, first_step, work_per_step, seed):
        self.schedule, self.num_steps, self.step, self.work_per_step = schedule, num_steps, first_step, work_per_step
        self.random = random.Random(seed)
        self.next_work = 100 + first_step * work_per_step
        sizes = {"num_steps": num_steps, "first_step": first_step, "next_work": self.next_work, "work_per_step": work_per_step}
        self.controller = Controller(schedule, **sizes)
        self.running, self.past, self.issued, self.taken = [], [], [], []

    def submit(self):
        for work in self.controller.due(self.step):
            assert work not in self.running and work.index not in self.taken
            assert work.version <= self.step <= work.step < min(self.num_steps, self.step + self.schedule.accept)
            assert work.version == self.schedule.version(work.step) and work.version in self.schedule.needed(self.step, self.num_steps)
            self.running.append(work)
            self.issued.append(work)

    def happen(self):
        """Something happens to a random unit."""
        kind = self.random.choice(["finish", "finish", "finish", "lose", "late", "repeat", "tick"])
        if kind == "tick":
            return self.controller.on(Tick(secs=1.0))
        if kind in ("finish", "lose") and self.running:
            work = self.running.pop(self.random.randrange(len(self.running)))
            self.past.append(work)
            return self.controller.on(Finished(rollouts(work)) if kind == "finish" else Lost(work, "gone"))
        if kind == "repeat" and self.past:
            work = self.random.choice(self.past)
            self.controller.on(Finished(rollouts(work)))
            if work in self.running:  # it was lost, issued again, and the first copy arrives after all
                self.running.remove(work)
        if kind == "late":  # of a future that a restore took back: another step's version
            work = Work(index=self.next_work + self.random.randrange(20), step=self.step + 1, version=self.step + 1)
            if work not in self.issued:
                self.controller.on(self.random.choice([Finished(rollouts(work)), Lost(work, "gone")]))
        return None

    def run(self):
        events = 0
        while self.step < self.num_steps:
            self.submit()
            self.happen()
            if self.controller.ready(self.step):
                units = self.controller.take(self.step)
                assert [u.work.step for u in units] == [self.step] * self.work_per_step
                self.taken += [u.work.index for u in units]
                self.step += 1
            events += 1
            assert events < 20_000, "stuck: work was lost for ever"
        assert self.controller.due(self.step) == []
        return self.taken


@pytest.mark.parametrize("reload, accept, lag", SCHEDULES)
@pytest.mark.parametrize("first_step", [0, 5])
def test_any_order_of_events_takes_every_unit_once_and_in_order(reload, accept, lag, first_step):
    for seed in range(12):
        schedule = Schedule(reload=reload, accept=accept, lag=lag)
        simulation = Simulation(schedule, num_steps=40, first_step=first_step, work_per_step=1 + seed % 3, seed=seed)
        start = simulation.next_work
        assert simulation.run() == list(range(start, start + (40 - first_step) * (1 + seed % 3)))
        assert simulation.controller.reissued > 0 and simulation.controller.duplicates > 0


def controller(reload=1, accept=2):
    return Controller(Schedule(reload=reload, accept=accept), num_steps=10, first_step=0, next_work=0, work_per_step=2)


def test_work_ahead_is_due_as_soon_as_its_version_exists():
    c = controller(reload=4, accept=8)
    assert [(w.index, w.step, w.version) for w in c.due(0)] == [(i, i // 2, 0) for i in range(16)]  # steps 0 to 7 use version 0
    assert c.due(0) == c.due(3) == []
    assert [(w.index, w.step, w.version) for w in c.due(4)] == [(i, i // 2, 4) for i in range(16, 20)]  # steps 8, 9: the run ends there


def test_lost_work_is_due_again_unchanged_and_counts_once():
    c = controller()
    first = c.due(0)
    c.on(Lost(first[1], "gone"))
    c.on(Lost(first[1], "said twice"))
    assert c.due(0) == [first[1]] and c.reissued == 1
    c.on(Lost(Work(index=0, step=7, version=7), "of a lost future"))
    assert c.due(0) == [] and c.reissued == 1
    c.on(Finished(rollouts(first[0])))
    c.on(Lost(first[0], "after it arrived"))
    assert c.due(0) == []


def test_a_duplicate_changes_nothing():
    c = controller()
    first, second, *_ = c.due(0)
    kept = rollouts(first)
    for event in (Finished(kept), Finished(rollouts(first)), Finished(rollouts(second))):
        c.on(event)
    assert c.duplicates == 1 and c.take(0)[0] is kept
    c.on(Finished(rollouts(first)))  # after it was trained on
    assert c.duplicates == 2 and first not in c.due(1)


def test_take_only_when_ready():
    c = controller()
    work = c.due(0)
    c.on(Finished(rollouts(work[0])))
    assert not c.ready(0)
    with pytest.raises(ValueError, match=r"step 0 is short of work units \[1\]: take it only when ready"):
        c.take(0)
    c.on(Finished(rollouts(work[1])))
    assert c.ready(0) and [u.work.index for u in c.take(0)] == [0, 1] and not c.ready(0)
