"""The gang's handle: it answers as a learner would, and says which process did not; a lost gang is made again in a new epoch."""

import contextlib
import functools
import os
import signal
import threading
import time

import jax
import numpy as np
import pytest
import ray
from scripted_learner import ScriptedLearner

from pgrpo_jax import parameter_server
from pgrpo_jax.engines import LearnerLost
from pgrpo_jax.engines.ray_cluster import RayBlobStore
from pgrpo_jax.engines.ray_learner import GangSettings, LearnerGang
from pgrpo_jax.preemption import Preempted, Stop

pytestmark = pytest.mark.usefixtures("cluster")


@contextlib.contextmanager
def gang(folder, *, stop=None, start_secs=0.0, **changes):
    settings = GangSettings(place=lambda: ["SPREAD"], **changes)
    made = LearnerGang(functools.partial(ScriptedLearner, str(folder), start_secs), settings, stop or Stop())
    try:
        yield made
    finally:
        made.kill()


def fetched(manifest):
    like = {"w": jax.ShapeDtypeStruct((8,), np.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))}
    return np.asarray(parameter_server.fetch(RayBlobStore(), manifest, like, timeout_secs=30)["w"]).tolist()


def test_it_answers_as_its_learner_does(tmp_path):
    with gang(tmp_path) as learner:
        assert not learner.restore() and (learner.step, learner.versions, learner.lost) == (0, (0,), False)
        (first,) = learner.publish()
        assert (first.version, first.epoch) == (0, 1) and fetched(first) == [0.0] * 8
        metrics, advantages = learner.update(("go",), next_work=5)
        assert metrics == {"next_work": 5.0} and advantages.tolist() == [0.0, 1.0]
        assert (learner.step, learner.next_work, learner.versions) == (1, 1, (1,))
        (second,) = learner.publish()
        assert (second.version, second.epoch) == (1, 1) and fetched(second) == [1.0] * 8
        assert learner.publish() == [second]  # nothing is put twice
        learner.offer(0)
        assert [m.version for m in learner.publish()] == [0, 1] and learner.digest() == "digest of 1"
        learner.save(wait=True)
        learner.close()
    assert (tmp_path / "saved").read_text() == "1" and (tmp_path / "closed").exists() and learner.lost


def test_what_it_raises_keeps_its_type_and_is_no_loss(tmp_path):
    with gang(tmp_path) as learner, pytest.raises(FloatingPointError, match="^loss = nan at step 1 is not finite: lower the learning rate$"):
        learner.update(("raise",))


def test_a_death_is_a_loss_and_the_next_gang_goes_on_in_a_new_epoch(tmp_path):
    with gang(tmp_path) as learner:
        learner.update(("go",))
        learner.save(wait=True)
        (before,) = learner.publish()
        learner.update(("go",))
        with pytest.raises(LearnerLost, match="^a learner process was lost while it was to update: "):
            learner.update(("die",))
        assert learner.lost
        for method in (learner.digest, learner.publish, learner.restore):
            with pytest.raises(LearnerLost, match="^there is no learner to "):
                method()
        learner.restart()
        assert learner.restore() and (learner.step, learner.restarts, learner.lost) == (1, 1, False)
        (after,) = learner.publish()
        assert (after.version, after.epoch) == (1, 2) and fetched(after) == [1.0] * 8
        with pytest.raises(parameter_server.BlobsLost):  # died with the process that put them
            fetched(before)


def test_losses_without_an_update_in_between_end_the_run(tmp_path):
    with gang(tmp_path) as learner:
        for _ in range(4):
            with pytest.raises(LearnerLost):
                learner.update(("die",))
            learner.restart()
        with pytest.raises(ChildProcessError, match="^the learner was lost 5 times in a row without an update; the last time: "):
            learner.update(("die",))


def test_a_call_that_takes_too_long_names_who_did_not_answer(tmp_path):
    with gang(tmp_path, call_secs=2.0) as learner:
        message = r"^the learner did not update within 2 s: its processes \[0\] of 0 to 0 did not answer; .* raise ray.start_secs or ray.call_secs$"
        with pytest.raises(TimeoutError, match=message):
            learner.update(("hang",))
        assert learner.lost


def test_a_node_that_is_taken_away_is_told_at_the_next_call(tmp_path):
    with gang(tmp_path) as learner:
        pid = learner._call("pid")
        learner.update(("go",))
        assert not learner.stopping
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 30
        while not learner.stopping and time.monotonic() < deadline:
            learner.update(("go",))
        assert learner.stopping and not learner.lost  # it still answers: there is time to save


def test_a_stop_ends_the_wait_for_a_gang_that_starts(tmp_path):
    stop = Stop()
    timer = threading.Timer(1.0, lambda: setattr(stop, "requested", True))
    timer.start()
    asked = time.monotonic()
    with pytest.raises(Preempted, match="the start of the learner"):
        with gang(tmp_path, stop=stop, start_secs=60.0):
            pytest.fail("it can not have started")
    timer.join()
    assert time.monotonic() - asked < 30  # not the minute that it would have taken


def test_who_dies_while_others_wait_for_it_is_what_is_told(tmp_path):
    """Of two that fail, the one that is dead explains the other."""
    from pgrpo_jax.engines import ray_learner

    @ray.remote(max_restarts=0)
    class Member:
        def act(self, what, secs):
            time.sleep(secs)
            os._exit(3) if what == "die" else None
            raise RuntimeError("the other end is gone")

    members = [Member.options(num_cpus=0).remote() for _ in range(2)]
    with gang(tmp_path) as learner:
        calls = [members[0].act.remote("raise", 0.0), members[1].act.remote("die", 0.5)]
        with pytest.raises(LearnerLost, match="lost while it was to update"):
            learner._wait("update", calls, 30.0)
        assert ray_learner._death([members[0].act.remote("raise", 0.0)]) is None
