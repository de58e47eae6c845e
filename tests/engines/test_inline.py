"""The inline engine beyond the contract: one unit a poll, in order; and several processes that share the units and see the same events."""

import json
import pathlib
import types

import inline_worker
import pytest
from contract_actor import ScriptedActor, expected_rewards, weights
from processes import run_together

from pgrpo_jax.engines.inline import InlineEngine
from pgrpo_jax.rollout_files import unpack_rollouts
from pgrpo_jax.structs import Finished, Started, Tick, Work


class Recorder:
    """An actor that answers with what it was asked."""

    def rollout(self, tree, work):
        return types.SimpleNamespace(weights=tree, work=work)


def work(index, version):
    return Work(index=index, step=index, version=version)


def offer(versions):
    return types.SimpleNamespace(versions=versions)


def test_units_come_back_in_order_one_a_poll_under_their_version():
    engine = InlineEngine(Recorder())
    assert engine.slots == 1
    engine.publish(offer({0: "old", 4: "new"}))
    for unit in (work(3, 4), work(1, 0), work(2, 4)):
        engine.submit(unit)
    polls = [engine.poll(timeout_secs=1.0) for _ in range(4)]
    assert [[type(event) for event in events] for events in polls] == [[Started, Finished, Tick]] * 3 + [[Tick]]
    assert [(events[0].work.index, events[0].worker) for events in polls[:3]] == [(3, "inline"), (1, "inline"), (2, "inline")]
    came = [(events[1].rollouts.work, events[1].rollouts.weights) for events in polls[:3]]
    assert came == [(work(3, 4), "new"), (work(1, 0), "old"), (work(2, 4), "new")]


def test_a_version_is_localised_once():
    localised = []

    def localise(tree):
        localised.append(tree)
        return f"local {tree}"

    engine, first = InlineEngine(Recorder(), localise=localise), "one"
    engine.publish(offer({2: "two", 1: first}))
    engine.publish(offer({1: first}))
    assert localised == ["one", "two"]
    engine.submit(work(0, 1))
    assert engine.poll(timeout_secs=0.0)[1].rollouts.weights == "local one"
    engine.publish(offer({1: "another"}))  # after a restore: the same number, other weights
    engine.submit(work(1, 1))
    assert engine.poll(timeout_secs=0.0)[1].rollouts.weights == "local another"


def test_close_forgets():
    engine = InlineEngine(Recorder())
    engine.publish(offer({0: "old"}))
    engine.submit(work(0, 0))
    engine.close()
    assert [type(event) for event in engine.poll(timeout_secs=0.0)] == [Tick]
    with pytest.raises(ValueError, match=r"^work unit 1 needs weight version 0, published are \[\]: publish it before submitting$"):
        engine.submit(work(1, 0))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What the engines of two processes said."""
    folder = tmp_path_factory.mktemp("inline")
    run_together(pathlib.Path(inline_worker.__file__), folder, 2)
    return [json.loads((folder / f"out{process}.json").read_text()) for process in range(2)]


def rollouts_of(poll):
    return unpack_rollouts(bytes.fromhex(poll["rollouts"]), source="the test")


def test_processes_share_the_units_and_see_the_same_events(two):
    assert two[0]["polls"] == two[1]["polls"]  # kinds, workers, ticks, and every byte of every rollout
    assert [engine["slots"] for engine in two] == [2, 2]
    assert [poll["kinds"] for poll in two[0]["polls"]] == [["Started", "Finished"] * n + ["Tick"] for n in (2, 2, 1, 0, 2, 0)]
    begun = [pair for poll in two[0]["polls"] for pair in poll["begun"]]
    order = [unit.index for units in inline_worker.UNITS for unit in units]
    assert begun == [[index, f"process {place % 2}"] for place, index in enumerate(order)]
    for process in range(2):  # each generated its own share and no other
        assert two[process]["generated"] == sorted(order[process::2])


def test_processes_generate_what_one_process_would(two, tmp_path):
    engine = InlineEngine(ScriptedActor(str(tmp_path)))
    alone = []
    for versions, units in zip(inline_worker.VERSIONS, inline_worker.UNITS):
        engine.publish(offer({version: weights(w) for version, w in versions.items()}))
        for unit in units:
            engine.submit(unit)
            alone.append(engine.poll(timeout_secs=0.0)[1].rollouts)
    together = [unit for poll in two[0]["polls"] for unit in rollouts_of(poll)]
    assert [unit.work for unit in together] == [unit.work for unit in alone]
    for ours, single in zip(together, alone, strict=True):
        assert ours.rewards.tolist() == single.rewards.tolist() == expected_rewards(single.work)
        assert ours.texts == single.texts and ours.completions.tolist() == single.completions.tolist()


def test_a_failure_in_one_process_ends_all_and_names_it(two):
    failures = [engine["failure"] for engine in two]
    assert failures == ["RuntimeError: process 1 failed to generate its unit of work: ValueError: no sandbox", "ValueError: no sandbox"]
