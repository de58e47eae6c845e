"""What only the ray engine does: it kills who holds a unit for too long, and says when its actors can not live."""

import contextlib
import pathlib
import time

import contract_actor
import pytest
from contract_actor import expected_rewards, say, ScriptedActor, wait_for
from test_contract import collect, finished, Publishing, work

from pgrpo_jax import parameter_server
from pgrpo_jax.engines import ray_engine
from pgrpo_jax.engines.ray_actor import RayActorSettings
from pgrpo_jax.engines.ray_cluster import RayBlobStore
from pgrpo_jax.preemption import Stop
from pgrpo_jax.structs import Lost, Started

pytestmark = pytest.mark.usefixtures("cluster")


@contextlib.contextmanager
def started(folder, *, versions=(0,), keep=4, script=None, **settings):
    learner = Publishing()
    server = parameter_server.ParameterServer(RayBlobStore(), keep=keep)
    maker = contract_actor.maker(ScriptedActor(str(folder), **(script or {})))
    engine = ray_engine.RayEngine(maker, RayActorSettings(**({"num_actors": 1} | settings)), server, Stop())

    def publish(*offered):
        learner.versions = {version: contract_actor.weights(version) for version in offered}
        engine.publish(learner)

    try:
        publish(*versions)
        yield engine, publish
    finally:
        engine.close()


def holder(folder, index=0):
    return int((pathlib.Path(folder) / f"generate {index}").read_text() or 0)


def test_who_holds_a_unit_beyond_its_lease_is_killed_and_nothing_is_said_of_it(tmp_path):
    with started(tmp_path, script={"held": frozenset({"generate 0"})}) as (engine, _):
        engine.submit(work(0))
        wait_for(str(tmp_path), "generate 0")
        first = holder(tmp_path)
        engine.submit(work(0))
        deadline = time.monotonic() + contract_actor.DEADLINE_SECS
        while holder(tmp_path) in (0, first) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert holder(tmp_path) != first and not pathlib.Path(f"/proc/{first}").exists()
        say(str(tmp_path), "open generate 0")
        events = collect(engine, lambda events: finished(events))
    assert [type(event) for event in events if not isinstance(event, Started)] == [type(events[-1])]  # finished once, lost never
    assert finished(events)[0].rewards.tolist() == expected_rewards(work(0))


def test_a_unit_that_holds_old_weights_back_is_given_up_when_the_server_is_full(tmp_path):
    with started(tmp_path, keep=2, script={"held": frozenset({"generate 0"})}) as (engine, publish):
        engine.submit(work(0))
        wait_for(str(tmp_path), "generate 0")
        publish(1)
        publish(2)
        (lost,) = [event for event in collect(engine, lambda events: len(events) >= 2) if isinstance(event, Lost)]
        assert lost.work == work(0) and lost.reason.endswith("held weight version 0 back for too long")
        engine.submit(work(1, version=2))
        (rollouts,) = finished(collect(engine, lambda events: finished(events)))
    assert rollouts.rewards.tolist() == expected_rewards(work(1, version=2))


def test_actors_that_always_die_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_engine, "_DEATHS", 2)
    with started(tmp_path, script={"deadly": frozenset({"generate 0"})}) as (engine, _):
        engine.submit(work(0))
        message = r"^actors died 3 times without finishing one unit of work, 2 for each of 1 are allowed: look at the memory of their nodes; "
        with pytest.raises(ChildProcessError, match=message):
            while True:
                for event in engine.poll(timeout_secs=30.0):
                    if isinstance(event, Lost):
                        engine.submit(event.work)


def test_actors_without_a_node_are_told(tmp_path):
    with started(tmp_path, resources={"a machine nobody has": 1}, start_secs=2.0) as (engine, _):
        engine.submit(work(0))
        with pytest.raises(TimeoutError, match="^1 units of work wait, and none of 1 actors has had a node for [2-9] s: look at the cluster"):
            while True:
                engine.poll(timeout_secs=1.0)
