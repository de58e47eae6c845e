"""The contract of `Engine`, over every engine: units in, events out, each unit with the weights of its own version.

An engine joins with a factory: given the actor's script and a stop it yields a `Case` and closes the engine at the end.
"""

import contextlib
import dataclasses
import pathlib
import pickle
import threading
import time
import types
from typing import Any, Callable

import contract_actor
import jax
import numpy as np
import pytest
from contract_actor import ScriptedActor, expected_rewards, say, wait_for, weights

from pgrpo_jax import parameter_server
from pgrpo_jax.engines import Engine
from pgrpo_jax.engines.inline import InlineEngine
from pgrpo_jax.engines.ray_actor import RayActorSettings
from pgrpo_jax.engines.ray_cluster import RayBlobStore
from pgrpo_jax.engines.ray_engine import RayEngine
from pgrpo_jax.engines.threads import ThreadsEngine
from pgrpo_jax.preemption import Stop
from pgrpo_jax.structs import Finished, Lost, Rollouts, Started, Tick, Work


@dataclasses.dataclass(frozen=True)
class Case:
    """An engine under test.

    Attributes:
        engine: with no version published.
        publish: makes the versions given the ones that the learner offers, and publishes them.
    """

    engine: Engine
    publish: Callable[[dict[int, Any]], None]


@contextlib.contextmanager
def inline(actor: ScriptedActor, stop: Stop):
    del stop  # it never waits
    engine = InlineEngine(actor)
    yield Case(engine, lambda versions: engine.publish(types.SimpleNamespace(versions=versions)))
    engine.close()


@contextlib.contextmanager
def threads(actor: ScriptedActor, stop: Stop):
    sets = [jax.devices()[2:4], jax.devices()[4:5]]
    engine = ThreadsEngine(actor, actor_devices=sets, place=lambda tree, devices: jax.device_put(tree, devices[0]), stop=stop)
    yield Case(engine, lambda versions: engine.publish(types.SimpleNamespace(versions=versions)))
    engine.close()


class Publishing:
    """A learner in the driver that puts its versions into the object store, as a gang's members would."""

    def __init__(self):
        self.versions, self._made, self._epoch = {}, {}, 1

    def publish(self):
        for version, tree in self.versions.items():
            if version not in self._made:
                self._made[version] = parameter_server.merge(
                    [parameter_server.publish_shards(RayBlobStore(), tree, version=version, epoch=self._epoch)]
                )
        return [self._made[version] for version in sorted(self.versions)]


@contextlib.contextmanager
def ray(actor: ScriptedActor, stop: Stop):
    server, learner = parameter_server.ParameterServer(RayBlobStore(), keep=4), Publishing()
    engine = RayEngine(contract_actor.maker(actor), RayActorSettings(num_actors=2), server, stop)

    def publish(versions: dict[int, Any]) -> None:
        learner.versions = dict(versions)
        engine.publish(learner)

    yield Case(engine, publish)
    engine.close()


ENGINES = {"inline": inline, "threads": threads, "ray": ray}
CONCURRENT = ("threads", "ray")  # actors work while the driver does something else
every_engine = pytest.mark.parametrize("name", ENGINES)
concurrent_engines = pytest.mark.parametrize("name", CONCURRENT)


@pytest.fixture(autouse=True)
def joined(request):
    """Connects to the cluster of the session where the engine needs one."""
    if "name" in request.fixturenames and request.getfixturevalue("name") == "ray":
        request.getfixturevalue("cluster")


@pytest.fixture
def folder(tmp_path) -> str:
    return str(tmp_path)


def work(index, version=0, step=0):
    return Work(index=index, step=step, version=version)


def started(name, folder, stop=None, **script):
    return ENGINES[name](ScriptedActor(folder, **script), stop or Stop())


def collect(engine, until):
    """Polls until `until(events)`, checks every list on the way, and returns all events but the ticks."""
    events, deadline = [], time.monotonic() + contract_actor.DEADLINE_SECS
    while not until(events):
        assert time.monotonic() < deadline, f"only these came: {events}"
        *happened, last = engine.poll(timeout_secs=5.0)
        assert isinstance(last, Tick) and last.secs >= 0 and not any(isinstance(event, Tick) for event in happened)
        assert all(isinstance(event, Started | Finished | Lost) for event in happened)
        events += happened
    return events


def finished(events):
    return [event.rollouts for event in events if isinstance(event, Finished)]


def all_of(units):
    return lambda events: {r.work.index for r in finished(events)} >= {unit.index for unit in units}


def assert_right(rollouts: Rollouts, unit: Work):
    assert isinstance(rollouts, Rollouts) and rollouts.work == unit
    assert rollouts.rewards.dtype == np.float32 and rollouts.rewards.tolist() == expected_rewards(unit)
    assert rollouts.completions.tolist() == [[unit.version] * 2] * len(rollouts.texts)
    assert rollouts.texts[1] == f"answer {unit.index}-1" and rollouts.prompt_records[0].prompt_id == f"prompt {unit.index}"


def test_the_actor_of_these_tests_can_be_sent_to_a_process(folder):
    script = ScriptedActor(folder, held=frozenset({"judge 0"}), failures={"generate 1": "no"})
    actor, like = pickle.loads(pickle.dumps(contract_actor.maker(script)))()
    assert actor == script
    assert {name: (x.shape, x.dtype) for name, x in like.items()} == {name: (x.shape, x.dtype) for name, x in weights(0).items()}


@every_engine
def test_every_unit_is_started_and_finished_once_with_its_weights(name, folder):
    with started(name, folder) as case:
        case.publish({0: weights(0), 3: weights(3)})
        units = [work(index, version=3 * (index % 2), step=index // 4) for index in range(9)]
        for unit in units:
            case.engine.submit(unit)
        events = collect(case.engine, all_of(units))
        for _ in range(3):  # nothing comes twice
            assert [type(event) for event in case.engine.poll(timeout_secs=0.05)] == [Tick]
    assert not [event for event in events if isinstance(event, Lost)]
    assert sorted(r.work.index for r in finished(events)) == list(range(9))
    for rollouts in finished(events):
        assert_right(rollouts, units[rollouts.work.index])
    begun, under_way = [], 0
    for event in events:
        if isinstance(event, Started):
            assert event.worker and isinstance(event.worker, str) and event.work == units[event.work.index]
            begun.append(event.work.index)
            under_way += 1
            assert under_way <= case.engine.slots
        else:
            assert event.rollouts.work.index in begun
            under_way -= 1
    assert sorted(begun) == list(range(9)) and under_way == 0


@every_engine
def test_ticks_add_up_to_the_time_that_passed(name, folder):
    before = time.monotonic()
    with started(name, folder) as case:
        made = time.monotonic()
        case.publish({0: weights(0)})
        secs = [case.engine.poll(timeout_secs=0.01)[-1].secs]
        case.engine.submit(work(0))
        time.sleep(0.2)
        for timeout_secs in (5.0, 0.0, 0.1):
            asked = time.monotonic()
            secs.append(case.engine.poll(timeout_secs=timeout_secs)[-1].secs)
        assert asked - made <= sum(secs) <= time.monotonic() - before
        assert secs[1] >= 0.2


@every_engine
def test_a_version_that_is_not_published_is_refused_by_name(name, folder):
    with started(name, folder) as case:
        with pytest.raises(ValueError, match=r"version 0\b.*published"):
            case.engine.submit(work(0))
        case.publish({2: weights(2), 4: weights(4)})
        with pytest.raises(ValueError, match=r"version 3\b.*published.*2.*4"):
            case.engine.submit(work(1, version=3))
        case.engine.submit(work(2, version=4))  # a refused unit leaves nothing behind
        events = collect(case.engine, all_of([work(2)]))
        assert [r.work for r in finished(events)] == [work(2, version=4)]
        assert [type(event) for event in case.engine.poll(timeout_secs=0.05)] == [Tick]


@every_engine
def test_publishing_replaces_the_versions_and_does_not_follow_the_learner(name, folder):
    with started(name, folder) as case:
        offered = {0: weights(0), 1: weights(1)}
        case.publish(offered)
        offered[7] = weights(7)  # the learner's next version, before it is published
        with pytest.raises(ValueError, match=r"version 7\b"):
            case.engine.submit(work(0, version=7))
        case.publish({1: weights(1), 2: weights(2)})
        with pytest.raises(ValueError, match=r"version 0\b"):
            case.engine.submit(work(0, version=0))
        units = [work(1, version=1), work(2, version=2)]
        for unit in units:
            case.engine.submit(unit)
        for rollouts in finished(collect(case.engine, all_of(units))):
            assert_right(rollouts, units[rollouts.work.index - 1])


@every_engine
def test_units_that_a_publish_overtakes_finish_with_their_own_version(name, folder):
    units = [work(index) for index in range(6)]  # more than can be under way
    held = frozenset({"generate 0"})
    with started(name, folder, held=held) as case:
        case.publish({0: weights(0)})
        for unit in units:
            case.engine.submit(unit)
        if name in CONCURRENT:
            wait_for(folder, "generate 0")
        case.publish({1: weights(1)})
        say(folder, "open generate 0")
        last = work(6, version=1, step=1)
        case.engine.submit(last)
        events = collect(case.engine, all_of([*units, last]))
    assert len(finished(events)) == 7
    for rollouts in finished(events):
        assert_right(rollouts, [*units, last][rollouts.work.index])


@every_engine
def test_a_unit_submitted_again_while_it_is_under_way_is_run_again(name, folder):
    with started(name, folder, held=frozenset({"generate 0"})) as case:
        case.publish({0: weights(0)})
        case.engine.submit(work(0))
        if name in CONCURRENT:
            wait_for(folder, "generate 0")
        case.engine.submit(work(0))
        say(folder, "open generate 0")
        case.engine.submit(work(1))
        events = collect(case.engine, all_of([work(0), work(1)]))
        events += case.engine.poll(timeout_secs=1.0)[:-1]
    copies = [r for r in finished(events) if r.work.index == 0]
    assert 1 <= len(copies) <= 2
    for rollouts in copies:
        assert_right(rollouts, work(0))


@every_engine
@pytest.mark.parametrize("phase", ["generate", "judge"])
def test_what_an_actor_raises_ends_the_run(name, phase, folder):
    with started(name, folder, failures={f"{phase} 1": "the sandbox is gone"}) as case:
        case.publish({0: weights(0)})
        for index in range(3):
            case.engine.submit(work(index))
        with pytest.raises(ValueError, match="the sandbox is gone") as raised:
            collect(case.engine, lambda events: len(finished(events)) == 3)
        assert str(raised.value) == "the sandbox is gone"


@every_engine
def test_a_requested_stop_ends_a_poll(name, folder):
    stop = Stop()
    with started(name, folder, stop, held=frozenset({"generate 0"})) as case:
        case.publish({0: weights(0)})
        if name in CONCURRENT:
            case.engine.submit(work(0))
            collect(case.engine, lambda events: any(isinstance(event, Started) for event in events))
        timer = threading.Timer(0.2, lambda: setattr(stop, "requested", True))
        timer.start()
        assert [type(event) for event in case.engine.poll(timeout_secs=3600.0)] == [Tick]
        timer.join()
        assert [type(event) for event in case.engine.poll(timeout_secs=3600.0)] == [Tick]
        say(folder, "open generate 0")


@every_engine
def test_closing_forgets_and_may_be_repeated(name, folder):
    phases = [f"{phase} {index}" for phase in ("generate", "judge") for index in range(20)]
    with started(name, folder, held=frozenset(phases)) as case:
        case.publish({0: weights(0)})
        for index in range(20):
            case.engine.submit(work(index))
        if name in CONCURRENT:  # any: of an actor's two units under way either may generate first
            wait_for(folder, "generate *")
        timer = threading.Timer(0.1, lambda: [say(folder, f"open {phase}") for phase in phases])
        timer.start()
        case.engine.close()
        case.engine.close()
        timer.join()
    begun = [index for index in range(20) if (pathlib.Path(folder) / f"generate {index}").exists()]
    assert len(begun) <= case.engine.slots


@concurrent_engines
def test_actors_work_while_the_driver_does_something_else(name, folder):
    units = [work(index) for index in range(2 * 4 + 1)]
    with started(name, folder) as case:
        case.publish({0: weights(0)})
        for unit in units:
            case.engine.submit(unit)
        for unit in units:  # an update, say: nobody polls
            wait_for(folder, f"judge {unit.index} done")
        assert sorted(r.work.index for r in finished(collect(case.engine, all_of(units)))) == [unit.index for unit in units]


@concurrent_engines
def test_judging_overlaps_the_next_generation(name, folder):
    """With as many units as actors can hold, every judge waits until the last unit was generated."""
    with started(name, folder, held=frozenset(f"judge {index}" for index in range(100))) as case:
        units = [work(index) for index in range(case.engine.slots)]
        case.publish({0: weights(0)})
        for unit in units:
            case.engine.submit(unit)
        for unit in units:
            wait_for(folder, f"generate {unit.index} done")
        for unit in units:
            say(folder, f"open judge {unit.index}")
        assert len(finished(collect(case.engine, all_of(units)))) == len(units)
