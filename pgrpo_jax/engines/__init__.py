"""Floor 4: where the roles run. One contract, `Engine`, so that the loop is the same text in every deployment."""

import os
from typing import Any, Protocol

from pgrpo_jax.controller import Controller
from pgrpo_jax.structs import Event, Rollouts, Work

_POLL_SECS = 10.0

# Ray reads these while it is imported, which only modules of this folder do. Who reaches its ports needs the token; nothing but
# `ray_cluster.Cluster` starts or joins a cluster; nothing is reported; processes that reserve no accelerator still see theirs; SIGTERM
# asks a run to save, and must not abort it.
_RAY = {
    "AUTH_MODE": "token",
    "ENABLE_AUTO_CONNECT": "0",
    "USAGE_STATS_ENABLED": "0",
    "ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "DISABLE_FAILURE_SIGNAL_HANDLER": "1",
}
for _name, _value in _RAY.items():
    os.environ.setdefault(f"RAY_{_name}", _value)


class Generator(Protocol):
    """What engines that work beside the driver run: `pgrpo_jax.actor.Actor`. Both methods may be called at once, by several threads."""

    def generate(self, weights: Any, work: Work) -> Any:
        """Samples the completions of a unit, on the devices that hold the weights."""

    def judge(self, generated: Any) -> Rollouts:
        """Rewards them; needs no accelerator."""


class Engine(Protocol):
    """Runs units of work on actors, with the weight versions that the learner published.

    Attributes:
        slots: units that can be under way at once.
    """

    slots: int

    def publish(self, learner: Any) -> None:
        """Makes the weight versions that the learner offers now the ones that units may name; later ones replace earlier ones."""

    def submit(self, work: Work) -> None:
        """Queues a unit, and returns at once; an idle actor takes it by itself.

        A unit that is submitted again while it is under way has outlived its lease: its holder is given up.

        Raises:
            ValueError: the unit's weight version is not published.
        """

    def poll(self, timeout_secs: float) -> list[Event]:
        """Returns what happened since the last poll: `Started`, `Finished` and `Lost` in any order, then one `Tick`.

        Args:
            timeout_secs: longest wait for something to happen; a requested stop ends it early.
        """

    def close(self) -> None:
        """Gives up everything under way and lets go of actors and weights."""


class LearnerLost(Exception):
    """A process of the learner is gone, and the learner with it; nothing is lost that was committed. Restart it and restore."""


def gather(controller: Controller, engine: Engine, step: int, *, stop: Any, phase: str) -> tuple[Rollouts, ...]:
    """Drives an engine until all work of a step is in; work of later steps is issued as soon as it is due.

    Args:
        controller: decides which work is due.
        engine: runs it; the versions that are due must be published.
        step: updates done.
        stop: looked at before each wait (`preemption.Stop`).
        phase: what is going on, for people.

    Returns:
        The rollouts of the step, in canonical order.

    Raises:
        Preempted: a stop was requested.
    """
    while not controller.ready(step):
        stop.check(phase)
        issue(controller, engine, step)
        for event in engine.poll(timeout_secs=_POLL_SECS):
            controller.on(event)
    issue(controller, engine, step)  # actors go on with later steps while this one is trained on
    return controller.take(step)


def issue(controller: Controller, engine: Engine, step: int) -> None:
    """Submits all work that is due."""
    for work in controller.due(step, slots=engine.slots):
        engine.submit(work)
