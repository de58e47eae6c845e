"""The inline engine: actor and learner alternate in one process and one thread. The default, and the one to debug with."""

import collections
from typing import Any

from pgrpo_jax.actor import Actor
from pgrpo_jax.structs import Event, Finished, Tick, Work


class InlineEngine:
    """Runs work when it is polled, one unit a poll.

    Args:
        actor: generates the units.
    """

    def __init__(self, actor: Actor):
        self._actor = actor
        self._weights: dict[int, Any] = {}
        self._queue: collections.deque[Work] = collections.deque()

    def publish(self, learner: Any) -> None:
        """Takes over the weight versions that the learner offers now (`learner.versions`: copies that no update touches)."""
        self._weights = dict(learner.versions)

    def submit(self, work: Work) -> None:
        """Queues a unit of work."""
        self._queue.append(work)

    def poll(self, timeout_secs: float) -> list[Event]:
        """Generates the oldest queued unit and returns what happened.

        Args:
            timeout_secs: longest wait for an event; nothing is waited for here.

        Raises:
            ValueError: the unit's weight version is not published. Issuing the unit again would not help.
        """
        if not self._queue:
            return [Tick(secs=0.0)]
        work = self._queue.popleft()
        if work.version not in self._weights:
            raise ValueError(
                f"work unit {work.index} needs weight version {work.version}, published are {sorted(self._weights)}: "
                "publish it before submitting"
            )
        return [Finished(rollouts=self._actor.rollout(self._weights[work.version], work))]

    def close(self) -> None:
        """Forgets queued work and weights."""
        self._queue.clear()
        self._weights.clear()
