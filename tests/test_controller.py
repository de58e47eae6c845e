"""The state machine of both policies, event by event, and under random orders of events (`test_controller_faults.py` adds processes)."""

import random
import types

import pytest

from pgrpo_jax.controller import Controller
from pgrpo_jax.schedule import Schedule
from pgrpo_jax.structs import Finished, Lost, RewardFailure, Started, Tick, Work

SCHEDULES = [(1, 1, None), (1, 2, None), (1, 5, 3), (2, 4, None), (3, 7, 4), (4, 4, None), (4, 8, None), (4, 9, 5), (16, 32, None)]


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
        for work in self.controller.due(self.step, slots=1):
            assert work not in self.running and work.index not in self.taken
            assert work.version <= self.step <= work.step < min(self.num_steps, self.step + self.schedule.accept)
            assert work.version == self.schedule.version(work.step) and work.version in self.schedule.needed(self.step, self.num_steps)
            self.running.append(work)
            self.issued.append(work)

    def happen(self):
        """Something happens to a random unit."""
        kind = self.random.choice(["start", "finish", "finish", "finish", "lose", "late", "repeat", "tick"])
        if kind == "tick":
            return self.controller.on(Tick(secs=1.0))
        if kind == "start" and self.running:
            return self.controller.on(Started(self.random.choice(self.running), "actor"))
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
        assert self.controller.due(self.step, slots=1) == []
        return self.taken


@pytest.mark.parametrize("reload, accept, lag", SCHEDULES)
@pytest.mark.parametrize("first_step", [0, 5])
def test_any_order_of_events_takes_every_unit_once_and_in_order(reload, accept, lag, first_step):
    for seed in range(12):
        schedule = Schedule(reload=reload, accept=accept, lag=lag)
        simulation = Simulation(schedule, num_steps=40, first_step=first_step, work_per_step=1 + seed % 3, seed=seed)
        start = simulation.next_work
        assert simulation.run() == list(range(start, start + (40 - first_step) * (1 + seed % 3)))
        metrics = simulation.controller.metrics()
        assert metrics["controller/reissued"] > 0 and metrics["controller/duplicates"] > 0
        assert metrics["controller/dropped"] == metrics["controller/lease_expired"] == 0


def controller(reload=1, accept=2, policy="deterministic", *, num_steps=10, **options):
    schedule = Schedule(reload=reload, accept=accept, policy=policy)
    return Controller(schedule, num_steps=num_steps, first_step=0, next_work=0, work_per_step=2, **options)


def counts(c):
    """The counters that are not 0, without their prefix."""
    return {name.removeprefix("controller/"): value for name, value in c.metrics().items() if value and not name.endswith("version_gap")}


def finish(c, *work):
    for w in work:
        c.on(Finished(rollouts(w)))


def triples(work):
    return [(w.index, w.step, w.version) for w in work]


@pytest.mark.parametrize("slots", [0, 1, 100])
def test_work_ahead_is_due_as_soon_as_its_version_exists(slots):
    c = controller(reload=4, accept=8)
    assert triples(c.due(0, slots=slots)) == [(i, i // 2, 0) for i in range(16)]  # steps 0 to 7 use version 0
    assert c.due(0, slots=slots) == c.due(3, slots=slots) == []
    assert triples(c.due(4, slots=slots)) == [(i, i // 2, 4) for i in range(16, 20)]  # steps 8, 9: the run ends there


def test_lost_work_is_due_again_unchanged_and_counts_once():
    c = controller()
    first = c.due(0, slots=1)
    c.on(Lost(first[1], "gone"))
    c.on(Lost(first[1], "said twice"))
    assert c.due(0, slots=1) == [first[1]]
    c.on(Lost(Work(index=0, step=7, version=7), "of a lost future"))
    assert c.due(0, slots=1) == []
    finish(c, first[0])
    c.on(Lost(first[0], "after it arrived"))
    assert c.due(0, slots=1) == [] and counts(c) == {"reissued": 1}


def test_a_duplicate_changes_nothing():
    c = controller()
    first, second, *_ = c.due(0, slots=1)
    kept = rollouts(first)
    for event in (Finished(kept), Finished(rollouts(first)), Finished(rollouts(second))):
        c.on(event)
    assert c.take(0)[0] is kept and counts(c) == {"duplicates": 1}
    finish(c, first)  # after it was trained on
    assert first not in c.due(1, slots=1) and counts(c) == {"duplicates": 1} and counts(c) == {}


@pytest.mark.parametrize("policy", ["deterministic", "freshest"])
def test_what_nothing_asked_for_changes_nothing(policy):
    """Late answers: of another controller's verdicts, split or version, of an index that is not issued."""
    c = controller(policy=policy)
    first, *_ = c.due(0, slots=2)
    failure = RewardFailure(row=0, reason="timeout", policy="zero")
    others = [{"version": 1}, {"step": 1}, {"index": 50}, {"split": "test"}, {"failed_rewards": (failure,)}]
    for changes in others:
        other = Work(**(vars(first) | changes))
        c.on(Started(other, "actor"))
        c.on(Lost(other, "gone"))
        finish(c, other)
    c.on(Tick(secs=1e9))
    assert c.due(0, slots=2) == [] and not c.ready(0) and counts(c) == {"duplicates": len(others)}


@pytest.mark.parametrize("policy", ["deterministic", "freshest"])
@pytest.mark.parametrize("why", ["lost", "lease"])
def test_the_first_copy_is_taken_whoever_made_it(policy, why):
    c = controller(policy=policy, lease_secs=5)
    first, second, *_ = c.due(0, slots=2)
    for event in (Started(first, "a"), Tick(secs=0), Tick(secs=5)) if why == "lease" else (Lost(first, "gone"),):
        c.on(event)
    early = rollouts(first)
    c.on(Finished(early))  # before it is issued again
    assert c.due(0, slots=1) == []
    finish(c, first, second)
    assert c.take(0)[0] is early and counts(c) == {"duplicates": 1} | ({"lease_expired": 1} if why == "lease" else {})


def test_a_lease_counts_from_the_first_tick_after_the_start():
    c = controller(accept=1, lease_secs=10)
    first, second = c.due(0, slots=1)
    c.on(Tick(secs=1e6))  # nobody has started: waiting for an actor is no fault
    c.on(Started(first, "a"))
    c.on(Tick(secs=1e6))  # the start was at some time in here: the loop was busy with an update
    c.on(Tick(secs=9.5))
    assert c.due(0, slots=1) == []
    c.on(Started(second, "b"))
    c.on(Tick(secs=0.5))
    assert c.due(0, slots=1) == [first] and counts(c) == {"lease_expired": 1, "reissued": 1}
    c.on(Tick(secs=9.5))
    assert c.due(0, slots=1) == []  # the new copy of the first waits; the second has half a second left
    c.on(Tick(secs=0.5))
    c.on(Lost(second, "was given up"))
    assert c.due(0, slots=1) == [second] and counts(c) == {"lease_expired": 1, "reissued": 1}


def test_arriving_in_time_ends_a_lease():
    c = controller(accept=1, lease_secs=10)
    first, second = c.due(0, slots=1)
    c.on(Started(first, "a"))
    c.on(Tick(secs=1))
    finish(c, first)
    c.on(Started(first, "a"))  # told late
    c.on(Tick(secs=1e6))
    assert c.due(0, slots=1) == [] and counts(c) == {}


def test_a_start_told_after_the_loss_starts_no_lease():
    c = controller(accept=1, lease_secs=10)
    first, _ = c.due(0, slots=1)
    for event in (Started(first, "a"), Lost(first, "gone"), Started(first, "a"), Tick(secs=1)):
        c.on(event)
    assert c.due(0, slots=1) == [first]
    c.on(Tick(secs=1e6))
    assert c.due(0, slots=1) == []


@pytest.mark.parametrize("why, reason", [("lost", "the node was preempted"), ("lease", r"its lease of 2.5 s ran out \(lease_secs\)")])
def test_a_unit_is_not_lost_for_ever(why, reason):
    c = controller(accept=1, lease_secs=2.5, max_losses=3)
    first, second = c.due(0, slots=1)

    def lose(work):
        for event in (Started(work, "a"), Tick(secs=0), Tick(secs=2.5)) if why == "lease" else (Lost(work, "the node was preempted"),):
            c.on(event)
        assert c.due(0, slots=1) == [work]

    for work in (first, second, first, second, first):
        lose(work)
    finish(c, second)
    message = f"^work unit 0 was lost 4 times in a row, more than max_losses = 3, at last because {reason}: .* raise lease_secs"
    with pytest.raises(ChildProcessError, match=message):
        lose(first)


@pytest.mark.parametrize("policy", ["deterministic", "freshest"])
def test_verdicts_on_record_go_with_their_unit(policy):
    failures = {(1, 0): (RewardFailure(row=3, reason="timeout after 30 s", policy="drop"),), (0, 7): (RewardFailure(0, "other weights", "drop"),)}
    c = controller(policy=policy, failed_rewards=failures, split="test")
    work = c.due(0, slots=2)
    c.on(Lost(work[1], "gone"))
    again = c.due(0, slots=2)
    assert [w.failed_rewards for w in work[:2]] == [(), failures[1, 0]] and again == [work[1]] and {w.split for w in work} == {"test"}


def test_take_only_when_ready():
    c = controller()
    work = c.due(0, slots=1)
    c.on(Lost(work[1], "gone"))
    finish(c, work[0])
    assert not c.ready(0)
    message = r"^step 0 has 1 of its 2 units of work; under way: 1 \(lost 1 times\), 2, 3: take it only when ready$"
    with pytest.raises(ValueError, match=message):
        c.take(0)
    finish(c, work[1])
    assert c.ready(0) and [u.work.index for u in c.take(0)] == [0, 1] and not c.ready(0)


def test_next_work_is_where_a_resume_goes_on():
    c = controller(accept=8)
    assert [c.next_work(step) for step in range(4)] == [0, 2, 4, 6]
    finish(c, *c.due(0, slots=1))
    c.take(0)
    assert c.next_work(1) == 2  # the work ahead is made again, to the bit
    resumed = Controller(Schedule(accept=2), num_steps=10, first_step=4, next_work=108, work_per_step=2)
    assert [resumed.next_work(step) for step in (4, 5)] == [108, 110]


def test_the_version_gap_is_that_of_the_step():
    c = controller(reload=2, accept=4, num_steps=6)
    gaps = []
    for step in range(6):
        finish(c, *c.due(step, slots=1))
        c.take(step)
        gaps.append(c.metrics()["controller/version_gap"])
    assert gaps == [0, 0, 2, 2, 2, 2]  # newest 0 0 2 2 4 4, generated with 0 0 0 0 2 2


def freshest(accept, *, reload=1, **options):
    return controller(reload, accept, "freshest", **options)


def test_freshest_issues_the_newest_version_to_free_slots():
    c = freshest(accept=4)
    first = c.due(0, slots=3)
    assert triples(first) == [(0, 0, 0), (1, 0, 0), (2, 0, 0)] and c.due(0, slots=3) == []
    finish(c, first[0], first[2])
    assert c.ready(0) and [u.work.index for u in c.take(0)] == [0, 2]
    assert triples(c.due(1, slots=3)) == [(3, 1, 1), (4, 1, 1)]  # unit 1 holds the third slot
    assert c.due(1, slots=2) == [] and c.due(1, slots=0) == []


def test_freshest_takes_the_newest_and_returns_them_in_canonical_order():
    c = freshest(accept=4)
    old = c.due(0, slots=4)
    finish(c, *old[:3])
    assert [u.work.index for u in c.take(0)] == [0, 1]  # of equal versions the first
    new = c.due(1, slots=2)
    assert triples(new) == [(4, 1, 1)]
    finish(c, *new)
    assert [u.work.index for u in c.take(1)] == [2, 4] and c.metrics()["controller/version_gap"] == 1  # the newest, then unit 2
    newer = c.due(2, slots=3)
    finish(c, old[3], *newer)
    assert [u.work.index for u in c.take(2)] == [5, 6] and c.metrics()["controller/version_gap"] == 0  # unit 3 waits


def test_freshest_drops_what_became_too_old_and_skips_its_prompts():
    c = freshest(accept=2)
    first = c.due(0, slots=4)
    finish(c, *first[:3])
    c.take(0)  # 0 and 1; 2 is left, 3 is slow
    second = c.due(1, slots=3)
    finish(c, *second)
    assert [u.work.index for u in c.take(1)] == [4, 5]
    finish(c, first[3])  # finished too late
    assert not c.ready(2)
    third = c.due(2, slots=3)
    assert triples(third) == [(6, 2, 2), (7, 2, 2), (8, 2, 2)] and counts(c) == {"dropped": 2}


def test_freshest_stock_is_bounded():
    """At most (k - (j - 1)) steps' worth exists at once, one step's beyond the slots, and what the run still needs."""
    for accept, reload, slots, num_steps, expected in [
        (1, 1, 100, 10, 2), (4, 1, 100, 10, 8), (4, 4, 100, 10, 2), (7, 3, 100, 10, 10),
        (100, 1, 3, 10, 5), (0, 1, 5, 10, 7), (0, 1, 100, 3, 6),
    ]:  # fmt: skip
        c = freshest(accept, reload=reload, num_steps=num_steps)
        issued = []
        for _ in range(8):
            work = c.due(0, slots=slots)
            finish(c, *work)
            issued += work
        assert len(issued) == expected and work == [], (accept, reload, slots)
    assert freshest(0).due(10, slots=5) == []  # the run is over


def test_freshest_issues_lost_work_again_with_the_newest_version():
    c = freshest(accept=0)
    first = c.due(0, slots=4)
    finish(c, *first[:2])
    c.take(0)
    c.on(Lost(first[2], "gone"))
    again = c.due(1, slots=2)
    assert triples(again) == [(2, 1, 1)] and counts(c) == {"reissued": 1}
    c.on(Lost(first[2], "its first holder, told again"))
    assert triples(c.due(1, slots=3)) == [(4, 1, 1)]
    finish(c, first[2], first[3])  # the first holder answers after all
    assert [u.work for u in c.take(1)] == first[2:]
    finish(c, *again)
    assert counts(c) == {"duplicates": 1}


def test_freshest_resumes_at_the_first_unit_that_was_not_issued():
    c = Controller(Schedule(accept=0, policy="freshest"), num_steps=10, first_step=3, next_work=40, work_per_step=2)
    assert c.next_work(3) == 40
    finish(c, *c.due(3, slots=5))
    assert [u.work.index for u in c.take(3)] == [40, 41] and c.next_work(4) == 45
    assert c.due(4, slots=1) == []  # three in stock: enough for one slot
    assert triples(c.due(4, slots=2)) == [(45, 4, 4)] and c.next_work(4) == 46
