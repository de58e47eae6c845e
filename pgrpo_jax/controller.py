"""The controller: a pure state machine that decides which work is due and in which order it is trained on.

No IO, no clock, no arrays: events in, work out, and time arrives as a `Tick`, so that any order of faults can be simulated.

A unit of work is issued, started by an actor, and arrives, unless it is lost or outlives its lease: then it is due again. The first
copy that arrives is taken, whoever made it; a rollout is a pure function of (weights, work), so any copy is as good as another.
What arrives and was never asked for (of a future that a restore took back) or is here already changes nothing.
"""

import collections
import dataclasses
import math
from typing import Mapping

from pgrpo_jax.schedule import Schedule
from pgrpo_jax.structs import Event, Finished, Lost, RewardFailure, Rollouts, Started, Tick, Work

COUNTERS = ("reissued", "lease_expired", "duplicates", "dropped")


@dataclasses.dataclass
class _Unit:
    """A unit that was issued and has not arrived."""

    works: tuple[Work, ...] = ()  # as it was issued, the latest last; "freshest" issues lost work with a newer version
    under_way: bool = True  # False: due again
    lease_ends: float = math.inf  # on the clock of the ticks
    losses: int = 0  # in a row


class Controller:
    """Tracks every unit of work from due to taken.

    Under the policy "deterministic" a step takes the units that are its own, in canonical order. Under "freshest" it takes the
    newest that have arrived, drops what has become too old (its prompts are skipped), and issues no more than the actors and the
    steps ahead can use: pacing rather than discarding. Either way a unit is trained on at most once.

    Args:
        schedule: which version generates which step.
        num_steps: updates in the run.
        first_step: updates already done.
        next_work: index of the first unit to issue.
        work_per_step: units consumed by one update.
        split: the task's split, "train" or "test".
        lease_secs: seconds that an actor may take for a unit once it has started.
        max_losses: times in a row that a unit may be lost.
        failed_rewards: verdicts on record, by (unit index, weight version), that go with the unit when it is issued.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        num_steps: int,
        first_step: int,
        next_work: int,
        work_per_step: int,
        split: str = "train",
        lease_secs: float = math.inf,
        max_losses: int = 20,
        failed_rewards: Mapping[tuple[int, int], tuple[RewardFailure, ...]] = {},
    ):
        self._schedule, self._num_steps, self._work_per_step, self._split = schedule, num_steps, work_per_step, split
        self._first_step, self._first_work, self._unissued = first_step, next_work, next_work
        self._lease_secs, self._max_losses, self._failed_rewards = lease_secs, max_losses, failed_rewards
        self._units: dict[int, _Unit] = {}
        self._starting: list[_Unit] = []
        self._finished: dict[int, Rollouts] = {}
        self._now = 0.0
        self._counts: collections.Counter[str] = collections.Counter()
        self._version_gap = 0

    def due(self, step: int, *, slots: int) -> list[Work]:
        """Returns the work that can be generated now and is not under way, and marks it as under way; oldest first.

        Call it at least once a step, also where the step is ready: it issues the work of later steps as well.

        Args:
            step: updates done. Every version that the schedule publishes up to here is available.
            slots: units that the actors can have under way at once. Only "freshest" looks at it: there a queue would age.
        """
        wanted = self._wanted_freshest(step, slots) if self._schedule.freshest else self._wanted_deterministic(step)
        return [self._issue(index, s) for index, s in wanted]

    def _wanted_deterministic(self, step: int) -> list[tuple[int, int]]:
        """(unit, its step): all within the window whose version is published."""
        window = range(step, min(self._num_steps, step + self._schedule.accept))
        ahead = [(index, s) for s in window if self._schedule.version(s) <= step for index in self._indices(s)]
        return [(index, s) for index, s in ahead if index not in self._finished and not self._is_under_way(index)]

    def _wanted_freshest(self, step: int, slots: int) -> list[tuple[int, int]]:
        """(unit, step): lost units, then new ones, as many as have a free slot and find room in the stock.

        The stock, finished or under way, is at most one step's beyond the slots, what the run still needs, and what the steps that
        admit a version use up: a version is up to j - 1 old when it is issued, which leaves it k - (j - 1) steps.
        """
        self._drop_old(step)
        per_step, schedule = self._work_per_step, self._schedule
        window = [(schedule.accept - schedule.reload + 1) * per_step] if schedule.accept else []
        stock = min(slots + per_step, (self._num_steps - step) * per_step, *window)
        lost = sorted(index for index, unit in self._units.items() if not unit.under_way)
        room = max(0, min(slots, stock - len(self._finished)) - (len(self._units) - len(lost)))
        new = range(self._unissued, self._unissued + max(0, room - len(lost)))
        return [(index, step) for index in (*lost[:room], *new)]

    def _issue(self, index: int, step: int) -> Work:
        version = self._schedule.version(step)
        failures = self._failed_rewards.get((index, version), ())
        work = Work(index=index, step=step, version=version, split=self._split, failed_rewards=failures)
        self._counts["reissued"] += index in self._units
        unit = self._units.setdefault(index, _Unit())
        unit.works = (*(w for w in unit.works if w != work), work)
        unit.under_way, unit.lease_ends = True, math.inf
        self._unissued = max(self._unissued, index + 1)
        return work

    def on(self, event: Event) -> None:
        """Takes note of an event.

        A lease counts from the first tick after `Started`, so it never ends early, however long the loop was busy; a unit that
        waits for an actor has none.

        Raises:
            ChildProcessError: a unit was lost, or outlived its lease, more than `max_losses` times in a row.
        """
        if isinstance(event, Started):
            if (unit := self._under_way(event.work)) is not None:
                self._starting.append(unit)
        elif isinstance(event, Lost):
            if (unit := self._under_way(event.work)) is not None:
                self._lose(unit, event.reason)
        elif isinstance(event, Finished):
            self._arrive(event.rollouts)
        elif isinstance(event, Tick):
            self._tick(event.secs)

    def _arrive(self, rollouts: Rollouts) -> None:
        unit = self._units.get(rollouts.work.index)
        if unit is None or rollouts.work not in unit.works:
            self._counts["duplicates"] += 1
            return
        del self._units[rollouts.work.index]
        self._finished[rollouts.work.index] = rollouts

    def _tick(self, secs: float) -> None:
        self._now += secs
        for unit in self._units.values():
            if unit.under_way and unit.lease_ends <= self._now:
                self._counts["lease_expired"] += 1
                self._lose(unit, f"its lease of {self._lease_secs:g} s ran out (lease_secs)")
        for unit in self._starting:
            unit.lease_ends = self._now + self._lease_secs
        self._starting.clear()

    def _lose(self, unit: _Unit, reason: str) -> None:
        unit.under_way = False
        unit.losses += 1
        if unit.losses > self._max_losses:
            raise ChildProcessError(
                f"work unit {unit.works[-1].index} was lost {unit.losses} times in a row, more than max_losses = {self._max_losses}, "
                f"at last because {reason}: see why its actors die or raise lease_secs, and run again to go on from the last checkpoint"
            )

    def _under_way(self, work: Work) -> _Unit | None:
        """The unit, if it is under way in just this form."""
        return self._units[work.index] if self._is_under_way(work.index) and self._units[work.index].works[-1] == work else None

    def _is_under_way(self, index: int) -> bool:
        return index in self._units and self._units[index].under_way

    def _indices(self, step: int) -> range:
        """The units that belong to a step under "deterministic"."""
        start = self._first_work + (step - self._first_step) * self._work_per_step
        return range(start, start + self._work_per_step)

    def _chosen(self, step: int) -> list[int]:
        """The units that have arrived and `step` trains on, in canonical order; too few while it is not ready."""
        if not self._schedule.freshest:
            return [index for index in self._indices(step) if index in self._finished]
        versions = {index: rollouts.work.version for index, rollouts in self._finished.items()}
        fresh = [index for index, version in versions.items() if self._schedule.admits(step, version)]
        return sorted(sorted(fresh, key=lambda index: (-versions[index], index))[: self._work_per_step])

    def ready(self, step: int) -> bool:
        """Returns whether all work that `step` needs has arrived."""
        return len(self._chosen(step)) == self._work_per_step

    def take(self, step: int) -> tuple[Rollouts, ...]:
        """Returns the rollouts that `step` trains on, by rising index, and forgets them.

        Raises:
            ValueError: too few have arrived.
        """
        chosen = self._chosen(step)
        if len(chosen) < self._work_per_step:
            raise ValueError(f"{self.waits_for(step)}: take it only when ready")
        taken = tuple(self._finished.pop(index) for index in chosen)
        self._version_gap = self._schedule.newest(step) - min(rollouts.work.version for rollouts in taken)
        return taken

    def _drop_old(self, step: int) -> None:
        old = [index for index, rollouts in self._finished.items() if not self._schedule.admits(step, rollouts.work.version)]
        for index in old:
            del self._finished[index]
        self._counts["dropped"] += len(old)

    def waits_for(self, step: int) -> str:
        """Returns what a step lacks, for people: "step 3 has 1 of its 2 units of work; under way: 7 (lost 2 times)"."""
        under_way = [f"{i} (lost {unit.losses} times)" if unit.losses else f"{i}" for i, unit in sorted(self._units.items())]
        has = f"step {step} has {len(self._chosen(step))} of its {self._work_per_step} units of work"
        return f"{has}; under way: {', '.join(under_way) or 'none'}"

    def next_work(self, step: int) -> int:
        """Returns the `TrainState.next_work` of a state with `step` updates: the first unit that a run resumed from it issues.

        Under "freshest" that is the first index not issued so far, so that no prompt is trained on twice; those under way when the
        run stops are skipped. Where actors outlive the learner, the next controller starts at the maximum of the restored state's
        `next_work` and this one's `next_work(restored step)`: then no late answer of the lost future is mistaken for a new unit.
        Under "deterministic" the two are equal, and any answer is as good as its repetition.
        """
        return self._unissued if self._schedule.freshest else self._indices(step).start

    def metrics(self) -> dict[str, float]:
        """Returns the "controller/…" metrics of docs/metrics.md; the counts are those since the last call, and start again at 0.

        They tell of timing and faults, not of the trajectory: two runs with equal weights may differ in them.
        """
        counts = {f"controller/{name}": float(self._counts[name]) for name in COUNTERS}
        self._counts.clear()
        return counts | {"controller/version_gap": float(self._version_gap)}
