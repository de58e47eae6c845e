"""The controller: a pure state machine that decides which work is due and in which order it is trained on.

No IO, no clock, no arrays: events in, work out, so that any order of faults can be simulated. The schedule is deterministic:
the weight version that generates step s is a fixed function of s (RLAX's j and k, arXiv:2512.06392, made bit-reproducible).
"""

import dataclasses

from pgrpo_jax.structs import Event, Finished, Lost, Rollouts, Work


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which weight version generates which step; `staleness = step - version` counts from 0.

    Attributes:
        reload: j >= 1, a new version is published every j steps.
        accept: k >= j, rollouts are trained on while 0 <= staleness < k.
        lag: versions that generation runs behind, in [0, k - j]; None = min(k - j, j).

    Raises:
        ValueError: one of the bounds does not hold.
    """

    reload: int = 1
    accept: int = 1
    lag: int | None = None

    def __post_init__(self):
        j, k = self.reload, self.accept
        if j < 1:
            raise ValueError(f"staleness.reload = {j} is below 1: actors load weights every j >= 1 versions")
        if k < j:
            raise ValueError(
                f"staleness.accept = {k} is below staleness.reload = {j}: it would need versions of the future; set accept >= reload"
            )
        if self.lag is None:
            object.__setattr__(self, "lag", min(k - j, j))
        if not 0 <= self.lag <= k - j:
            raise ValueError(f"staleness.lag = {self.lag} is outside [0, accept - reload = {k - j}]: rollouts would be too old to accept")

    def version(self, step: int) -> int:
        """Returns v(s) = max(0, j * floor((s - lag) / j)), the version that generates step s."""
        return max(0, self.reload * ((step - self.lag) // self.reload))

    def publishes(self, step: int) -> bool:
        """Returns whether the weights after `step` updates are published as a version."""
        return step % self.reload == 0

    def needed(self, step: int, num_steps: int) -> tuple[int, ...]:
        """Returns the versions, published by `step`, that generate some step from `step` on; ascending."""
        versions = {self.version(s) for s in range(step, min(num_steps, step + self.accept))}
        return tuple(sorted(v for v in versions if v <= step))


class Controller:
    """Tracks every unit of work from due to taken.

    Each unit is handed out once at a time, again after it is lost, and its rollouts are taken exactly once, in canonical
    order, whatever the order of arrival and however often a unit arrives.

    Args:
        schedule: which version generates which step.
        num_steps: updates in the run.
        first_step: updates already done.
        next_work: index of the first unit of `first_step`.
        work_per_step: units consumed by one update.
    """

    def __init__(self, schedule: Schedule, *, num_steps: int, first_step: int, next_work: int, work_per_step: int):
        self._schedule, self._num_steps, self._work_per_step = schedule, num_steps, work_per_step
        self._first_step, self._first_work = first_step, next_work
        self._issued: dict[int, Work] = {}
        self._finished: dict[int, Rollouts] = {}
        self.duplicates = 0
        self.reissued = 0

    def _indices(self, step: int) -> range:
        start = self._first_work + (step - self._first_step) * self._work_per_step
        return range(start, start + self._work_per_step)

    def due(self, step: int) -> list[Work]:
        """Returns the work that can be generated now and is not under way, oldest first, and marks it as issued.

        Args:
            step: updates done. Every version that the schedule publishes up to here is available.
        """
        work = []
        for s in range(step, min(self._num_steps, step + self._schedule.accept)):
            version = self._schedule.version(s)
            if version > step:
                break
            for index in self._indices(s):
                if index not in self._issued and index not in self._finished:
                    self._issued[index] = Work(index=index, step=s, version=version)
                    work.append(self._issued[index])
        return work

    def on(self, event: Event) -> None:
        """Takes note of an event; one about work that is not under way (a duplicate, a lost future) changes nothing."""
        if isinstance(event, Lost):
            if self._issued.get(event.work.index) == event.work:
                del self._issued[event.work.index]
                self.reissued += 1
        elif isinstance(event, Finished):
            work = event.rollouts.work
            if self._issued.get(work.index) != work:
                self.duplicates += 1
                return
            del self._issued[work.index]
            self._finished[work.index] = event.rollouts

    def ready(self, step: int) -> bool:
        """Returns whether all work of `step` has arrived."""
        return all(index in self._finished for index in self._indices(step))

    def take(self, step: int) -> tuple[Rollouts, ...]:
        """Returns the rollouts of `step` in canonical order and forgets them.

        Raises:
            ValueError: not all of them have arrived, or one is inadmissible (0 <= step - version < accept fails).
        """
        missing = [index for index in self._indices(step) if index not in self._finished]
        if missing:
            raise ValueError(f"step {step} is short of work units {missing}: take it only when ready")
        taken = tuple(self._finished.pop(index) for index in self._indices(step))
        for rollouts in taken:
            staleness = step - rollouts.work.version
            if not 0 <= staleness < self._schedule.accept:
                raise ValueError(
                    f"work unit {rollouts.work.index} has staleness {staleness}, outside [0, {self._schedule.accept}): "
                    "it was generated by the wrong weight version"
                )
        return taken
