"""Checkpoints: what is saved comes back to the bit, or one line says why not. Files are really damaged, processes really killed."""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import checkpoint_writer
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgrpo_jax import checkpoints as checkpoint_module
from pgrpo_jax import parallel, weight_versions
from pgrpo_jax.checkpoints import CheckpointError, Checkpoints, state_sha256
from pgrpo_jax.digests import held_sha256
from pgrpo_jax.schedule import Schedule
from pgrpo_jax.structs import RewardHistory, TrainState

IDENTITY = {"seed": 0, "preset": "p_grpo", "optimiser.learning_rate": 3e-5, "generation.prompt_buckets": [32, 40], "algorithm.min_count": None}


def state(step: int) -> TrainState:
    """All dtypes and ranks that occur, values of every kind: denormal, -0, inf; an empty part."""
    rng = np.random.default_rng(step)
    weights = {
        "embedding": jnp.asarray(rng.normal(size=(30, 7)), jnp.float32),
        "layers": {
            "query": jnp.asarray(rng.normal(size=(2, 5, 3, 4)), jnp.bfloat16),
            "attention_norm": jnp.asarray([-0.0, 1e-40, np.inf], jnp.float32),
        },
    }
    moments = jax.tree.map(lambda x: x * 0.5, weights)
    mean, m2 = (jnp.asarray(rng.random(3), jnp.float32) for _ in range(2))
    history = RewardHistory(count=jnp.array([2**31 - 1, 0, 5], jnp.int32), weight=jnp.ones(3), mean=mean, m2=m2)
    return TrainState(
        step=jnp.int32(step), next_work=jnp.int32(3 * step), trainable=weights, optimiser=({"mu": moments, "count": jnp.int32(step)}, ()),
        history=history, objective={},
    )  # fmt: skip


@pytest.fixture
def opened():
    """Opens checkpoints, and closes them at the end of the test."""
    made = []

    def build(directory, **options):
        made.append(Checkpoints(directory, **({"identity": IDENTITY} | options)))
        return made[-1]

    yield build
    for checkpoints in made:
        checkpoints.close()


def assert_same(found, expected):
    """Equal to the bit, structure, dtype and sharding included."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        name = jax.tree_util.keystr(path)
        assert isinstance(a, jax.Array) and a.dtype == b.dtype and a.shape == b.shape and a.sharding == b.sharding, name
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), name


def refusal(call) -> str:
    with pytest.raises(CheckpointError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 800, "one line"
    return message


# --- the digest

LEAVES = {"a": np.arange(6, dtype=np.float32), "b": {"c": np.float32(2.0)}, "d": (np.zeros((2, 3), np.int32),)}
ZERO_OF_THE_OTHER_SIGN = np.array([-0.0, 1, 2, 3, 4, 5], np.float32)


@pytest.mark.parametrize(
    "changed",
    [
        {**LEAVES, "a": np.nextafter(LEAVES["a"], np.float32(9))},
        {**LEAVES, "a": ZERO_OF_THE_OTHER_SIGN},
        {**LEAVES, "b": {"c": np.float32(-2.0)}},
        {**LEAVES, "d": (np.ones((2, 3), np.int32),)},
        {**LEAVES, "a": LEAVES["a"].view(np.int32)},
        {**LEAVES, "a": LEAVES["a"].reshape(2, 3)},
        {**LEAVES, "b": {"c": np.full(1, 2.0, np.float32)}},
        {**LEAVES, "b": {"e": np.float32(2.0)}},
        {**LEAVES, "b": {"c": np.float32(2.0), "e": np.zeros(0, np.float32)}},
        {name: leaf for name, leaf in LEAVES.items() if name != "d"},
    ],
)
def test_the_digest_sees_value_dtype_shape_and_path(changed):
    assert state_sha256(changed) != state_sha256(LEAVES)


def test_the_digest_is_that_of_the_bytes_in_the_order_of_the_paths():
    """Paths as text, of which the tenth part of a tuple comes before the second; over 8 devices as well."""
    whole, lines = {"state": state(3), "parts": tuple(np.float32(i) for i in range(12))}, {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(whole):
        array = np.asarray(leaf)
        lines[jax.tree_util.keystr(path)] = f"{array.dtype} {array.shape}\n".encode() + array.tobytes()
    content = b"".join(f"{path} ".encode() + lines[path] for path in sorted(lines))
    assert list(lines) != sorted(lines) and state_sha256(whole) == hashlib.sha256(content).hexdigest()
    rows = jax.sharding.NamedSharding(parallel.make_mesh(jax.devices()), jax.sharding.PartitionSpec("data"))
    spread = jax.device_put({"a": np.arange(16.0, dtype=np.float32)}, rows)
    assert state_sha256(spread) == state_sha256({"a": np.arange(16.0, dtype=np.float32)})


def test_the_digest_does_not_depend_on_where_the_state_lives():
    expected = state_sha256(state(3))
    assert expected == state_sha256(jax.tree.map(np.asarray, state(3)))
    assert expected == state_sha256(parallel.replicate(state(3), parallel.make_mesh(jax.devices()[:4])))
    assert expected != state_sha256(state(4))
    upside_down = dict(reversed(LEAVES.items()))
    assert state_sha256(upside_down) == state_sha256(LEAVES)


@pytest.mark.parametrize("axis", [None, "data"])
def test_the_digest_of_what_is_held_outlives_the_state(axis):
    """On one device and cut over eight: computed after updates in place, it is that of the state before them."""
    sharding = jax.sharding.NamedSharding(parallel.make_mesh(jax.devices()), jax.sharding.PartitionSpec(axis))
    running = {"a": jax.device_put(np.arange(4096.0, dtype=np.float32).reshape(64, 64), sharding), "b": jnp.float32(3)}
    expected, compute = state_sha256(jax.tree.map(lambda x: np.array(x), running)), held_sha256(running)
    for _ in range(5):
        running = train(running)
    jax.block_until_ready(running)
    assert compute() == expected != state_sha256(running)


# --- round trips


@pytest.mark.parametrize("num_devices", [1, 4])
def test_round_trip(tmp_path, opened, num_devices):
    mesh = parallel.make_mesh(jax.devices()[:num_devices])
    saved, versions = (parallel.replicate(tree, mesh) for tree in (state(5), {2: state(2).trainable, 4: state(4).trainable}))
    opened(tmp_path).save(saved, versions, wait=True)
    like = parallel.replicate(state(0), mesh)
    found, found_versions = opened(tmp_path).restore(like)
    assert_same(found, saved)
    assert found_versions.keys() == versions.keys()
    assert_same(found_versions, versions)
    assert state_sha256(found) == state_sha256(saved)


def test_more_devices_than_at_the_time_of_saving(tmp_path, opened):
    opened(tmp_path).save(state(1), {}, wait=True)
    like = parallel.replicate(state(0), parallel.make_mesh(jax.devices()))
    found, _ = opened(tmp_path).restore(like)
    assert_same(found, parallel.replicate(state(1), parallel.make_mesh(jax.devices())))


def test_the_newest_of_several_steps_is_restored_and_only_so_many_are_kept(tmp_path, opened):
    checkpoints = opened(tmp_path, keep=2)
    assert checkpoints.latest_step() is None
    for step in (1, 3, 4):
        checkpoints.save(state(step), {}, wait=True)
    assert checkpoints.latest_step() == 4
    assert_same(opened(tmp_path).restore(state(0))[0], state(4))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]


def test_saving_a_step_again_changes_nothing(tmp_path, opened):
    checkpoints = opened(tmp_path)
    checkpoints.save(state(2), {}, wait=True)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    checkpoints.save(state(2), {}, wait=True)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_step_before_the_newest_is_refused(tmp_path, opened):
    checkpoints = opened(tmp_path)
    checkpoints.save(state(7), {}, wait=True)
    message = refusal(lambda: checkpoints.save(state(6), {}))
    assert "step 6 was refused" in message and "the newest step there is 7" in message and str(tmp_path) in message


# --- weight versions, each stored once


def stored(directory: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in (directory / "versions").iterdir())


def times(directory: pathlib.Path) -> dict[pathlib.Path, int]:
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*")}


@pytest.mark.parametrize("reload, accept, keep", [(4, 8, 2), (1, 3, 1)])
def test_each_version_is_stored_once_for_as_long_as_a_step_refers_to_it(tmp_path, opened, monkeypatch, reload, accept, keep):
    """By the schedule, a save every step: what is on the disk is written once, and is what the steps that are kept refer to."""
    num_steps, schedule, hashed = 14, Schedule(reload=reload, accept=accept), []
    monkeypatch.setattr(weight_versions, "state_sha256", lambda tree: hashed.append(1) or state_sha256(tree))
    weights = {v: {"w": jnp.full(500, v, jnp.float32)} for v in range(num_steps)}
    checkpoints, seen, referred = opened(tmp_path, keep=keep), {}, []
    for step in range(1, num_steps):
        referred.append(set(schedule.needed(step, num_steps)) - {step})
        checkpoints.save(small(step), {v: weights[v] for v in referred[-1]}, wait=True)
        kept = sorted(set().union(*referred[-keep:]))
        assert (stored(tmp_path) if kept else []) == kept
        for path, written in times(tmp_path / "versions").items() if kept else ():
            assert path.parent == tmp_path / "versions" or seen.setdefault(path, written) == written, f"{path} was written again"
        assert {path.name for path in (tmp_path / str(step)).iterdir() if path.is_dir()} == {"state", "record"}
        assert_same(opened(tmp_path, read_only=True).restore(small(0))[1], {v: weights[v] for v in referred[-1]})
    ever = set().union(*referred)
    assert len(hashed) == len(ever) > 1 and {path.relative_to(tmp_path).parts[1] for path in seen} == {str(v) for v in ever}


def test_a_resumed_run_neither_writes_nor_hashes_what_is_stored(tmp_path, opened, monkeypatch):
    version = {"w": jnp.arange(500, dtype=jnp.float32)}
    opened(tmp_path).save(small(3), {2: version}, wait=True)
    before = times(tmp_path / "versions")
    resumed = opened(tmp_path)
    versions = resumed.restore(small(0))[1]
    monkeypatch.setattr(weight_versions, "state_sha256", None)
    resumed.save(small(4), versions, wait=True)
    assert times(tmp_path / "versions") == before
    monkeypatch.undo()
    assert_same(opened(tmp_path).restore(small(0)), (small(4), {2: version}))


def test_a_version_of_a_lost_future_is_not_taken_for_the_new_one(tmp_path, opened):
    """Step 2 is deleted, and with it what it alone refers to; a reader deletes nothing."""
    first = opened(tmp_path)
    first.save(small(1), {0: small(0).trainable}, wait=True)
    first.save(small(2), {0: small(0).trainable, 1: small(1).trainable}, wait=True)
    shutil.rmtree(tmp_path / "2")
    assert opened(tmp_path, read_only=True).restore(small(0))[1].keys() == {0} and stored(tmp_path) == [0, 1]
    again = opened(tmp_path)
    assert stored(tmp_path) == [0]
    again.save(small(2), {0: small(0).trainable, 1: small(9).trainable}, wait=True)
    assert_same(opened(tmp_path).restore(small(5))[1], {0: small(0).trainable, 1: small(9).trainable})


def test_another_version_of_the_same_number_is_refused(tmp_path, opened):
    checkpoints = opened(tmp_path)
    checkpoints.save(small(1), {0: small(0).trainable}, wait=True)
    before = times(tmp_path)
    message = refusal(lambda: checkpoints.save(small(2), {0: small(7).trainable}))
    assert "step 2 is not saved: weight version 0 is not the one" in message and str(tmp_path / "versions" / "0") in message
    assert times(tmp_path) == before
    checkpoints.save(small(2), {0: small(0).trainable}, wait=True)
    assert_same(opened(tmp_path).restore(small(5)), (small(2), {0: small(0).trainable}))


def test_a_damaged_record_keeps_its_versions_until_it_is_gone(tmp_path, opened):
    """What it refers to can not be told, so nothing is deleted, but a version that nobody vouches for is written anew."""
    checkpoints = opened(tmp_path)
    for step in (1, 2):
        checkpoints.save(small(step), {step - 1: small(step - 1).trainable}, wait=True)
    record = tmp_path / "1" / "record" / "metadata"
    content = record.read_bytes()
    others = (content.replace(b'"versions": [0]', b'"versions": ' + versions) for versions in (b"[]", b"[4]"))
    for damaged in (content[:20], *others):
        assert damaged != content
        record.write_bytes(damaged)
        again = opened(tmp_path, keep=1)
        assert_same(again.restore(small(0))[1], {1: small(1).trainable})
        assert stored(tmp_path) == [0, 1]
    again.save(small(3), {0: small(8).trainable, 1: small(1).trainable}, wait=True)
    assert stored(tmp_path) == [0, 1]
    assert_same(opened(tmp_path).restore(small(5))[1], {0: small(8).trainable, 1: small(1).trainable})


# --- what is being saved while training goes on


@functools.partial(jax.jit, donate_argnums=0)
def train(state: TrainState) -> TrainState:
    """An update in place: every buffer of the state is given back and overwritten."""
    return jax.tree.map(lambda x: x + jnp.ones((), x.dtype), state)


@pytest.mark.parametrize("num_devices", [1, 2])
def test_updates_after_save_do_not_reach_what_is_saved(tmp_path, opened, num_devices):
    size = 2_000_000
    mesh = parallel.make_mesh(jax.devices()[:num_devices])
    running = train(parallel.replicate(checkpoint_writer.state(0, size), mesh))
    expected, step = state_sha256(jax.tree.map(lambda x: np.array(jnp.copy(x)), running)), int(running.step)
    checkpoints = opened(tmp_path)
    checkpoints.save(running, {0: running.trainable})
    for _ in range(200):
        running = train(running)
    jax.block_until_ready(running)
    checkpoints.save(dataclasses.replace(running, step=running.step + 1), {}, wait=True)
    shutil.rmtree(tmp_path / str(int(running.step) + 1))
    found, versions = opened(tmp_path).restore(parallel.replicate(checkpoint_writer.state(0, size), mesh))
    assert int(found.step) == step and state_sha256(found) == expected
    np.testing.assert_array_equal(versions[0]["w"], found.trainable["w"])


def test_the_old_step_is_deleted_only_after_the_new_one_is_committed(tmp_path, opened):
    """Watches the directory from another thread while steps are saved."""
    seen, stop = [], threading.Event()

    def watch():
        while not stop.is_set():
            names = frozenset(os.listdir(tmp_path))
            if not seen or names != seen[-1]:
                seen.append(names)
            time.sleep(0.0002)

    checkpoints = opened(tmp_path, keep=1)
    checkpoints.save(checkpoint_writer.state(1, 200_000), {}, wait=True)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for step in (2, 3, 4):
            checkpoints.save(checkpoint_writer.state(step, 200_000), {}, wait=True)
    finally:
        stop.set()
        watcher.join()
    assert any(len(names) > 1 for names in seen), "the watcher saw steps being written"
    for names in seen:
        assert names & {"1", "2", "3", "4"}, f"no committed step among {sorted(names)}"
    assert set(os.listdir(tmp_path)) == {"4"}


def test_a_record_that_can_not_be_made_commits_nothing(tmp_path, opened, monkeypatch):
    """The digest is computed while the arrays are written: without it there is no step."""
    checkpoints = opened(tmp_path)
    checkpoints.save(small(1), {}, wait=True)

    def fail():
        raise OSError("planted")

    monkeypatch.setattr(checkpoint_module, "held_sha256", lambda state: fail)
    with pytest.raises(OSError, match="planted"):
        checkpoints.save(small(2), {}, wait=True)
    monkeypatch.undo()
    again = opened(tmp_path)
    assert again.latest_step() == 1 and not (tmp_path / "2").exists()
    assert_same(again.restore(small(0))[0], small(1))


KILLS = {"2*": ["1"], "versions/1.*": [], "versions/1": ["1"]}  # when: which versions are committed


@pytest.mark.parametrize("pattern", KILLS)
def test_a_kill_in_the_middle_of_a_save_leaves_the_step_before(tmp_path, opened, pattern):
    """While the step is written, while the weight version is that it refers to, and between the two commits."""
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[1]), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, checkpoint_writer.__file__, str(tmp_path), pattern]
    child = subprocess.run(command, env=environment, capture_output=True, timeout=120)
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()[-2000:]
    left = [path for path in tmp_path.glob(pattern) if any(p.is_file() for p in path.rglob("*"))]
    assert left and not (tmp_path / "2").exists(), "step 2, or what it refers to, is half written"
    assert [path.name for path in tmp_path.glob("versions/?")] == KILLS[pattern], "a version is committed before anything refers to it"
    checkpoints = opened(tmp_path, identity={"of": "tests"})
    assert checkpoints.latest_step() == 1 and not any((tmp_path / "versions").iterdir()), "no committed step refers to a version"
    like = checkpoint_writer.state(0, checkpoint_writer.SIZE)
    assert_same(checkpoints.restore(like)[0], checkpoint_writer.state(1, checkpoint_writer.SIZE))
    other = checkpoint_writer.state(7, checkpoint_writer.SIZE).trainable
    checkpoints.save(checkpoint_writer.state(2, checkpoint_writer.SIZE), {1: other}, wait=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "versions"], "the half-written step is tidied up, and saved anew"
    assert stored(tmp_path) == [1]
    assert_same(opened(tmp_path, identity={"of": "tests"}).restore(like)[1], {1: other})


def test_unfinished_steps_are_ignored(tmp_path, opened):
    opened(tmp_path).save(state(1), {}, wait=True)
    unfinished = tmp_path / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "1", unfinished)
    for read_only in (True, False):
        checkpoints = opened(tmp_path, read_only=read_only)
        assert checkpoints.latest_step() == 1
        assert_same(checkpoints.restore(state(0))[0], state(1))
        assert unfinished.exists() == read_only, "a reader leaves the writer's unfinished step alone"


# --- checkpoints that can not be used


def test_a_relative_directory(tmp_path, opened, monkeypatch):
    monkeypatch.chdir(tmp_path)
    opened("run/checkpoints").save(state(4), {}, wait=True)
    restored, _ = opened(tmp_path / "run" / "checkpoints").restore(state(0))
    assert state_sha256(restored) == state_sha256(state(4))


def test_no_checkpoint(tmp_path, opened):
    message = refusal(lambda: opened(tmp_path).restore(state(0)))
    assert str(tmp_path) in message and "no committed checkpoint" in message and "--workdir" in message


def test_another_identity_lists_every_difference(tmp_path, opened):
    opened(tmp_path).save(state(1), {}, wait=True)
    other = {**IDENTITY, "seed": 1, "generation.prompt_buckets": [32], "algorithm.min_count": 0, "new.key": True}
    del other["preset"]
    message = refusal(lambda: opened(tmp_path, identity=other).restore(state(0)))
    for difference in (
        "seed: 0 there, 1 here",
        "generation.prompt_buckets: [32, 40] there, [32] here",
        "algorithm.min_count: None there, 0 here",
        "new.key: (absent) there, True here",
        "preset: p_grpo there, (absent) here",
    ):
        assert difference in message
    assert str(tmp_path / "1") in message and "--workdir" in message
    assert "learning_rate" not in message
    assert_same(opened(tmp_path).restore(state(0))[0], state(1))


def small(step: int) -> TrainState:
    """As few leaves as a state can have: the time to restore goes by their number."""
    return dataclasses.replace(checkpoint_writer.state(step, 500), next_work=None)


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """A directory with the committed steps 1 and 2, both with another weight version."""
    directory = tmp_path_factory.mktemp("intact")
    checkpoints = Checkpoints(directory, identity=IDENTITY)
    for step in (1, 2):
        checkpoints.save(small(step), {step - 1: small(step - 1).trainable}, wait=True)
    checkpoints.close()
    return directory


def files(directory: pathlib.Path) -> list[str]:
    """Files of step 2 and of its weight version, with names that are the same in every run: data files are called by what they are."""
    both = (directory / "2", directory / "versions" / "1")
    return sorted(str(path.relative_to(directory)) for root in both for path in root.rglob("*") if path.is_file())


def damages(content: bytes):
    """(what, new content or None for a file that is gone): the file lost, cut at several places, a bit flipped at several places."""
    yield "deleted", None
    for size in sorted({0, len(content) // 2, max(len(content) - 1, 0)}):
        yield f"cut to {size} bytes", content[:size]
    rng = np.random.default_rng(len(content))
    for place in rng.integers(0, len(content), 3 if content else 0):
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(rng.integers(8))
        yield f"bit flipped in byte {place}", bytes(flipped)


def test_every_damaged_file_is_one_line_or_does_no_harm(intact, capfd):
    """Some files are only a copy or a note to readers: then what comes back must be what was saved, to the bit."""
    refused = set()
    for name in files(intact):
        content = (intact / name).read_bytes()
        for what, damaged in damages(content):
            (intact / name).unlink() if damaged is None else (intact / name).write_bytes(damaged)
            checkpoints = Checkpoints(intact, identity=IDENTITY, read_only=True)
            try:
                found, versions = checkpoints.restore(small(0))
                assert_same((found, versions), (small(2), {1: small(1).trainable}))
            except CheckpointError as error:
                refused.add(name)
                message = str(error)
                assert "\n" not in message and str(intact / "2") in message, (name, what, message)
                remedies = "delete that directory to go on from the step before it", "belongs to another run"
                assert any(remedy in message for remedy in remedies), (name, what, message)
            finally:
                checkpoints.close()
                (intact / name).write_bytes(content)
    assert "Traceback" not in capfd.readouterr().err, "no thread of Orbax or TensorStore complains beside the one line"
    arrays = {name for name in files(intact) if "/d/" in name and "ocdbt.process" not in name}
    assert arrays and arrays | {"2/record/metadata"} <= refused, "what matters is always noticed"


def test_the_remedy_works(intact, tmp_path, opened):
    directory = tmp_path / "run"
    shutil.copytree(intact, directory)
    record = directory / "2" / "record" / "metadata"
    record.write_bytes(record.read_bytes()[:20])
    message = refusal(lambda: opened(directory).restore(small(0)))
    shutil.rmtree(message.split()[1])
    assert_same(opened(directory).restore(small(0))[0], small(1))


@pytest.mark.parametrize("name, there, other", [("state", "2/state", "1/state"), ("weights_1", "versions/1", "versions/0")])
def test_arrays_that_were_exchanged_are_noticed_by_their_digest(intact, tmp_path, opened, name, there, other):
    """Every file is sound, but the arrays are not those that were saved with the record."""
    directory = tmp_path / "run"
    shutil.copytree(intact, directory)
    shutil.rmtree(directory / there)
    shutil.copytree(directory / other, directory / there)
    message = refusal(lambda: opened(directory).restore(small(0)))
    assert f"corrupt ({name} in {directory / there}: not what was saved, by its digest)" in message


def test_a_version_that_is_gone_is_one_line(intact, tmp_path, opened):
    directory = tmp_path / "run"
    shutil.copytree(intact, directory)
    shutil.rmtree(directory / "versions" / "1")
    message = refusal(lambda: opened(directory).restore(small(0)))
    assert f"checkpoint {directory / '2'} is corrupt (weights_1 in {directory / 'versions' / '1'}: FileNotFoundError" in message
    shutil.rmtree(message.split()[1])
    checkpoints = opened(directory)
    assert_same(checkpoints.restore(small(5)), (small(1), {0: small(0).trainable}))
    checkpoints.save(small(2), {1: small(1).trainable}, wait=True)
    assert_same(opened(directory).restore(small(5)), (small(2), {1: small(1).trainable}))


def test_a_state_of_another_shape_is_one_line(intact, opened):
    like = small(0)
    other = dataclasses.replace(like, trainable={"w": jnp.zeros(501, jnp.float32)})
    message = refusal(lambda: opened(intact, read_only=True).restore(other))
    assert "2 is corrupt" in message and "state.trainable['w'] is float32[500], not float32[501]" in message


def test_the_record_is_readable_json(intact):
    record = json.loads((intact / "2" / "record" / "metadata").read_text())
    assert record["identity"] == IDENTITY and record["versions"] == [1]
    assert record["sha256"] == {"state": state_sha256(small(2)), "weights_1": state_sha256(small(1).trainable)}
