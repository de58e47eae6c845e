"""The inline engine: one unit a poll, first in first out, with the weights of the unit's own version."""

import types

import pytest

from pgrpo_jax.engines.inline import InlineEngine
from pgrpo_jax.structs import Finished, Tick, Work


class Recorder:
    """An actor that answers with what it was asked."""

    def rollout(self, weights, work):
        return types.SimpleNamespace(weights=weights, work=work)


def work(index, version):
    return Work(index=index, step=index, version=version)


def published(versions):
    engine = InlineEngine(Recorder())
    engine.publish(types.SimpleNamespace(versions=versions))
    return engine


def test_units_come_back_in_order_one_a_poll_under_their_version():
    engine = published({0: "old", 4: "new"})
    for unit in (work(3, 4), work(1, 0), work(2, 4)):
        engine.submit(unit)
    events = [engine.poll(timeout_secs=1.0) for _ in range(4)]
    assert [len(e) for e in events] == [1] * 4
    assert all(isinstance(e[0], Finished) for e in events[:3])
    came = [(e[0].rollouts.work, e[0].rollouts.weights) for e in events[:3]]
    assert came == [(work(3, 4), "new"), (work(1, 0), "old"), (work(2, 4), "new")]
    assert events[3] == [Tick(secs=0.0)]


def test_publishing_replaces_the_versions_and_does_not_follow_the_learner():
    learner = types.SimpleNamespace(versions={0: "old"})
    engine = InlineEngine(Recorder())
    engine.publish(learner)
    learner.versions[0] = "changed"
    engine.submit(work(0, 0))
    assert engine.poll(timeout_secs=0.0)[0].rollouts.weights == "old"
    learner.versions = {1: "next"}
    engine.publish(learner)
    engine.submit(work(1, 0))
    with pytest.raises(ValueError, match=r"^work unit 1 needs weight version 0, published are \[1\]: publish it before submitting$"):
        engine.poll(timeout_secs=0.0)


def test_close_forgets():
    engine = published({0: "old"})
    engine.submit(work(0, 0))
    engine.close()
    assert engine.poll(timeout_secs=0.0) == [Tick(secs=0.0)]
