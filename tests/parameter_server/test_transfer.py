"""Weights there and back between shardings and processes; the bytes that went in are the oracle of what comes out."""

import dataclasses
import gc
import os
import pathlib
import pickle
import socket
import subprocess
import sys
import threading
import weakref

from folder_store import FolderStore
import gang_member
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import xxhash

from pgrpo_jax.parameter_server import BlobsLost, fetch, merge, publish_shards, WeightsError

P = jax.sharding.PartitionSpec


def mesh(fsdp, tp):
    return jax.sharding.Mesh(np.array(jax.devices()[: fsdp * tp]).reshape(fsdp, tp), ("fsdp", "tp"))


def tree():
    rng = np.random.default_rng(1)
    layers = [{"w": rng.normal(size=(8, 16)).astype(np.float32), "b": rng.normal(size=16).astype(ml_dtypes.bfloat16)} for _ in range(3)]
    scalar, empty = np.float32(-0.5), np.zeros((0, 4), np.float32)
    return {"layers": layers, "table": rng.normal(size=(16, 8)).astype(ml_dtypes.bfloat16), "scalar": scalar, "empty": empty}


MATRIX = {"w", "table"}


def sharded(values, on, spec):
    """What a tree looks like on a mesh: matrices by `spec`, the rest replicated."""

    def leaf(path, x):
        matrix = spec if getattr(path[-1], "key", None) in MATRIX else P()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.NamedSharding(on, matrix))

    return jax.tree_util.tree_map_with_path(leaf, values)


def placed(values, on, spec):
    return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), values, sharded(values, on, spec))


def assert_same(found, values, like):
    assert jax.tree.structure(found) == jax.tree.structure(values)
    for x, value, wanted in zip(*map(jax.tree.leaves, (found, values, like))):
        assert (x.shape, x.dtype, x.sharding) == (value.shape, value.dtype, wanted.sharding)
        for shard in x.addressable_shards:  # the bits, on every device
            assert np.asarray(shard.data).tobytes() == np.ascontiguousarray(value[shard.index]).tobytes()


def published(store, values, on=None, spec=P("fsdp", "tp"), **options):
    return merge([publish_shards(store, placed(values, on or mesh(4, 2), spec), version=7, epoch=2, **options)])


SHARDINGS = {
    "one device": (1, 1, P()),
    "replicated": (4, 2, P()),
    "2-way": (1, 2, P("tp")),
    "2-way, other axis": (1, 2, P(None, "tp")),
    "fsdp 4 x tp 2": (4, 2, P("fsdp", "tp")),
    "tp 2 x fsdp 4": (4, 2, P("tp", "fsdp")),
    "8-way": (4, 2, P(("fsdp", "tp"))),
    "fsdp 4, copied": (4, 2, P("fsdp")),
}


@pytest.mark.parametrize("actor", SHARDINGS)
@pytest.mark.parametrize("learner", SHARDINGS)
def test_any_sharding_to_any_other(tmp_path, learner, actor):
    store, values = FolderStore(tmp_path), tree()
    *there, spec = SHARDINGS[learner]
    manifest = published(store, values, mesh(*there), spec)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == sum(x.nbytes for x in jax.tree.leaves(values))  # each shard once
    assert manifest.handles and set(manifest.handles) == set(store.puts) and len(store.puts) == len(set(store.puts))
    *here, spec = SHARDINGS[actor]
    like = sharded(values, mesh(*here), spec)
    assert_same(fetch(store, manifest, like, timeout_secs=10), values, like)
    assert sorted(store.gets) == sorted(store.puts)  # each shard once, though many slices overlap it


def test_the_manifest_says_what_and_where(tmp_path):
    store, values = FolderStore(tmp_path), tree()
    manifest = published(store, values, mesh(1, 2), P(None, "tp"))
    assert (manifest.version, manifest.epoch) == (7, 2)
    keys = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(values)]
    assert [leaf.key for leaf in manifest.leaves] == keys and "['layers'][0]['w']" in keys
    leaves = {leaf.key: leaf for leaf in manifest.leaves}
    table = leaves["['table']"]
    assert (table.shape, table.dtype) == ((16, 8), "bfloat16")
    assert [shard.box for shard in table.shards] == [((0, 16), (0, 4)), ((0, 16), (4, 8))]
    for shard in table.shards:
        blob = np.ascontiguousarray(values["table"][tuple(slice(*part) for part in shard.box)]).tobytes()
        assert (tmp_path / shard.handle).read_bytes() == blob and shard.checksum == xxhash.xxh3_64_intdigest(blob)
    assert leaves["['empty']"].shards == () and leaves["['scalar']"].shards[0].box == ()
    bare = published(store, values, checksums=False)
    assert {shard.checksum for leaf in bare.leaves for shard in leaf.shards} == {None}


def test_arrays_will_do_as_what_is_wanted(tmp_path):
    store, values = FolderStore(tmp_path), tree()
    like = placed(jax.tree.map(np.zeros_like, values), mesh(1, 2), P("tp"))
    assert_same(fetch(store, published(store, values), like, timeout_secs=10), values, like)


def test_publishing_leaves_the_weights_alone(tmp_path):
    weights = placed(tree(), mesh(4, 2), P("fsdp", "tp"))
    publish_shards(FolderStore(tmp_path), weights, version=0, epoch=0)
    assert_same(weights, tree(), weights)
    jax.tree.map(lambda x: x.delete(), weights)  # nothing of the store hangs on it
    assert all(x.is_deleted() for x in jax.tree.leaves(weights))


def pointers(x):
    return [shard.data.unsafe_buffer_pointer() for shard in x.addressable_shards]


SAME = [(spec, spec) for spec in (P(), P("tp"), P(None, "tp"))]


@pytest.mark.parametrize("learner, actor", SAME + [(P("tp"), P(("tp", "fsdp"))), (P(), P("fsdp"))])
def test_whole_shards_and_rows_of_one_are_used_where_they_lie(tmp_path, learner, actor):
    values = {"table": np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)}
    store, views = FolderStore(tmp_path), []
    manifest = published(store, values, mesh(4, 2), learner)

    class Watched(FolderStore):
        def get(self, handles, timeout_secs):
            views.extend(found := super().get(handles, timeout_secs))
            return found

    like = sharded(values, mesh(4, 2), actor)
    found = fetch(Watched(tmp_path), manifest, like, timeout_secs=10)
    ranges = [(view.ctypes.data, view.ctypes.data + view.nbytes) for view in views]
    assert all(any(start <= pointer < stop for start, stop in ranges) for pointer in pointers(found["table"]))
    bases = [weakref.ref(view) for view in views]
    views.clear()
    store.delete(manifest.handles)  # the version is dropped: what was fetched lives on
    gc.collect()
    assert all(base() is not None for base in bases)
    assert_same(found, values, like)
    del found
    gc.collect()
    assert all(base() is None for base in bases)


def test_views_of_the_store_survive_a_donation(tmp_path):
    values = {"table": np.arange(4096, dtype=np.float32).reshape(64, 64)}
    store = FolderStore(tmp_path)
    manifest = published(store, values, mesh(1, 1), P())
    like = sharded(values, mesh(1, 1), P())
    found = fetch(store, manifest, like, timeout_secs=10)
    bumped = jax.jit(lambda x: x + jnp.float32(1), donate_argnums=0)(found["table"])
    np.testing.assert_array_equal(np.asarray(bumped), values["table"] + 1)
    assert_same(fetch(store, manifest, like, timeout_secs=10), values, like)  # and the store's bytes are as they were


def test_processes_share_the_work_and_read_only_their_slices(tmp_path):
    (tmp_path / "blobs").mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(pathlib.Path(__file__).parent), *sys.path])}
    commands = [[sys.executable, gang_member.__file__, str(tmp_path), coordinator, str(number)] for number in range(2)]
    members = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for command in commands]
    errors = [member.communicate(timeout=120)[1] for member in members]
    assert [member.returncode for member in members] == [0, 0], "\n".join(errors)
    results = [pickle.loads((tmp_path / f"result-{number}").read_bytes()) for number in range(2)]
    manifest, values = results[0]["manifest"], gang_member.tree()
    assert manifest == results[1]["manifest"]
    homes = {leaf.key: [shard.handle.split("-")[0] for shard in leaf.shards] for leaf in manifest.leaves}
    # The halves of "a" where they lie; of what both hold, every other leaf.
    assert homes == {"['a']": ["process0", "process1"], "['b']": ["process1"], "['c']": ["process0"], "['d']": ["process1"]}
    assert sorted(manifest.handles) == sorted(results[0]["puts"] + results[1]["puts"])
    halves = [shard.handle for shard in manifest.leaves[0].shards]
    for number, result in enumerate(results):
        rows, columns = slice(4 * number, 4 * number + 4), slice(3 * number, 3 * number + 3)
        wanted = {"same axis": values["a"][rows], "other axis": values["a"][:, columns], "replicated": values["a"]}
        for name, (gets, parts) in result["got"].items():
            read = set(gets) & set(halves)
            assert read == ({halves[number]} if name == "same axis" else set(halves)) and len(gets) == len(set(gets))
            for key, value in values.items():
                value = wanted[name] if key == "a" else value
                assert parts[key].tobytes() == np.ascontiguousarray(value).tobytes() and parts[key].dtype == value.dtype
    here = sharded(values, mesh(4, 2), P())
    assert_same(fetch(FolderStore(tmp_path / "blobs"), manifest, here, timeout_secs=10), values, here)


@pytest.fixture
def case(tmp_path):
    """A published version, and what it is wanted as."""
    store, values = FolderStore(tmp_path), {"w": np.arange(32, dtype=np.float32).reshape(4, 8), "b": np.arange(8, dtype=np.int32)}
    return store, published(store, values, mesh(1, 2), P("tp")), sharded(values, mesh(1, 1), P()), values


def damage(folder, handle, change):
    path = folder / handle
    blob = bytearray(path.read_bytes())
    change(blob)
    path.unlink()
    path.write_bytes(blob)


def handle_of(manifest, key, number):
    return next(leaf for leaf in manifest.leaves if leaf.key == key).shards[number].handle


@pytest.mark.parametrize("position, bit", [(0, 0), (63, 7), (30, 3)])
def test_one_wrong_bit_is_refused_by_name(case, tmp_path, position, bit):
    store, manifest, like, values = case

    def flip(blob):
        blob[position] ^= 1 << bit

    damage(tmp_path, handle_of(manifest, "['w']", 1), flip)
    message = r"weight version 7 \(epoch 2\): shard \['w'\]\[2:4, 0:8\] is corrupt, its checksum is [0-9a-f]{16}, not [0-9a-f]{16}: publish"
    with pytest.raises(WeightsError, match=message):
        fetch(store, manifest, like, timeout_secs=10)
    found = fetch(store, manifest, like, timeout_secs=10, verify=False)
    assert (np.asarray(found["w"]).view(np.uint32) != values["w"].view(np.uint32)).sum() == 1  # so it was in the fetched weights indeed


def test_exchanged_shards_are_refused_by_name(case):
    store, manifest, like, _ = case
    b, w = manifest.leaves
    one, other = w.shards
    swapped = (dataclasses.replace(one, handle=other.handle), dataclasses.replace(other, handle=one.handle))
    with pytest.raises(WeightsError, match=r"shard \['w'\]\[[02]:[24], 0:8\] is corrupt"):
        fetch(store, dataclasses.replace(manifest, leaves=(b, dataclasses.replace(w, shards=swapped))), like, timeout_secs=10)


@pytest.mark.parametrize("verify", [True, False])
def test_a_shard_of_another_size_is_refused_by_name(case, tmp_path, verify):
    store, manifest, like, _ = case
    damage(tmp_path, handle_of(manifest, "['b']", 0), lambda blob: blob.append(0))
    with pytest.raises(WeightsError, match=r"\(epoch 2\): shard \['b'\]\[0:8\] arrived with 33 bytes, not 32: publish it again"):
        fetch(store, manifest, like, timeout_secs=10, verify=verify)


def like_as(like, key, shape=None, dtype=None, sharding=True):
    x = like[key]
    wanted = jax.ShapeDtypeStruct(shape or x.shape, dtype or x.dtype, sharding=x.sharding if sharding else None)
    return like | {key: wanted}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda like: like | {"extra": like["b"], "more": like["b"]}, r"version 7 \(epoch 2\) lacks \['extra'\], \['more'\]: learner and"),
        (lambda like: {"w": like["w"]}, r"version 7 \(epoch 2\) has \['b'\], which are not wanted here: learner and actor"),
        (lambda like: {}, r"has \['b'\], \['w'\], which are not wanted"),
        (lambda like: like_as(like, "w", shape=(8, 4)), r"\['w'\] float32\[4, 8\] is wanted as float32\[8, 4\]: learner and actor"),
        (lambda like: like_as(like, "b", dtype=jnp.float32), r"\['b'\] int32\[8\] is wanted as float32\[8\]: learner and actor"),
        (lambda like: like_as(like, "b", sharding=False), r"\['b'\] int32\[8\] is wanted without a sharding: give"),
    ],
)
def test_another_tree_is_refused_by_name_before_anything_is_read(case, change, message):
    store, manifest, like, _ = case
    with pytest.raises(WeightsError, match=message):
        fetch(store, manifest, change(like), timeout_secs=10)
    assert store.gets == []


def test_absent_checksums_are_not_taken_for_right_ones(case):
    store, _, like, values = case
    manifest = published(store, values, checksums=False)
    with pytest.raises(WeightsError, match=r"has no checksums for \['b'\], \['w'\]: publish with checksums=True, or fetch with verify="):
        fetch(store, manifest, like, timeout_secs=10)
    assert_same(fetch(store, manifest, like, timeout_secs=10, verify=False), values, like)


def test_part_of_a_version_is_refused_by_name(case):
    store, manifest, like, _ = case
    b, w = manifest.leaves
    part = dataclasses.replace(manifest, leaves=(b, dataclasses.replace(w, shards=w.shards[1:])))
    with pytest.raises(WeightsError, match=r"\['w'\] float32\[4, 8\] has a hole, 16 of 32 elements of \[0:4, 0:8\]: fetch what `merge`"):
        fetch(store, part, like, timeout_secs=10)


def test_waits_for_a_shard_that_comes_late(case, tmp_path):
    store, manifest, like, values = case
    path = tmp_path / handle_of(manifest, "['w']", 0)
    path.rename(tmp_path / "later")
    arrival = threading.Timer(0.2, (tmp_path / "later").rename, [path])
    arrival.start()
    assert_same(fetch(store, manifest, like, timeout_secs=30), values, like)
    arrival.join()


@pytest.mark.parametrize("timeout_secs", [0, 0.05])
def test_a_deadline_names_the_version_and_the_shards(case, timeout_secs):
    store, manifest, like, _ = case
    store.delete([handle_of(manifest, "['w']", 0), handle_of(manifest, "['b']", 0)])
    message = rf"version 7 \(epoch 2\): 2 of 3 shards did not arrive within {timeout_secs:g} s: \['b'\]\[0:8\], \['w'\]\[0:2, 0:8\]: look"
    with pytest.raises(TimeoutError, match=message):
        fetch(store, manifest, like, timeout_secs=timeout_secs)


def test_what_is_here_needs_no_time(case):
    store, manifest, like, values = case
    assert_same(fetch(store, manifest, like, timeout_secs=0), values, like)


def test_many_missing_shards_share_one_deadline(tmp_path):
    waits = []

    class Timed(FolderStore):
        def get(self, handles, timeout_secs):
            waits.append(timeout_secs)
            return super().get(handles, timeout_secs)

    store, values = Timed(tmp_path), {f"k{i:02}": np.ones(4, np.float32) for i in range(60)}
    manifest = published(store, values)
    store.delete(manifest.handles)
    with pytest.raises(TimeoutError, match=r"60 of 60 shards did not arrive within 0.5 s: \['k00'\]\[0:4\], .* and 54 more: look"):
        fetch(store, manifest, sharded(values, mesh(1, 1), P()), timeout_secs=0.5)
    assert len(waits) == 60 and max(waits) <= 0.5 and waits.count(0.0) > 30  # those that began late did not wait again


class Failing(FolderStore):
    """Fails at one put, or says of one blob that it is lost."""

    def __init__(self, folder, bad):
        super().__init__(folder)
        self._bad = bad

    def put(self, array):
        if len(self.puts) >= self._bad:
            raise MemoryError("the store is full")
        return super().put(array)

    def get(self, handles, timeout_secs):
        if self._bad in handles:
            raise BlobsLost("its process is gone")
        return super().get(handles, timeout_secs)


def test_lost_shards_are_named(case, tmp_path):
    _, manifest, like, _ = case
    lost = Failing(tmp_path, handle_of(manifest, "['w']", 1))
    with pytest.raises(BlobsLost, match=r"weight version 7 \(epoch 2\): shard \['w'\]\[2:4, 0:8\] is lost: its process is gone"):
        fetch(lost, manifest, like, timeout_secs=10)


def test_a_publish_that_fails_leaves_nothing_behind(tmp_path):
    with pytest.raises(MemoryError, match="the store is full"):
        publish_shards(Failing(tmp_path, 5), placed(tree(), mesh(4, 2), P("fsdp", "tp")), version=0, epoch=0)
    assert FolderStore(tmp_path).files() == set()


@pytest.mark.parametrize("value, name", [(np.ones(3), "ndarray"), (1.5, "float"), (jax.ShapeDtypeStruct((3,), int), "ShapeDtypeStruct")])
def test_only_device_arrays_are_published(tmp_path, value, name):
    with pytest.raises(WeightsError, match=rf"\['x'\] of weight version 4 is a {name}, not a jax.Array: put it on its devices first"):
        publish_shards(FolderStore(tmp_path), {"w": jnp.ones(3), "x": value}, version=4, epoch=0)
    assert FolderStore(tmp_path).files() == set()


def test_an_empty_tree_is_a_version_too(tmp_path):
    store = FolderStore(tmp_path)
    manifest = merge([publish_shards(store, {}, version=0, epoch=0)])
    assert manifest.handles == [] and fetch(store, manifest, {}, timeout_secs=0) == {}


def test_a_large_tree_in_many_threads(tmp_path):
    rng = np.random.default_rng(5)
    values = {f"layer{i}": {"w": rng.normal(size=(32, 8 * (i + 1))).astype(ml_dtypes.bfloat16)} for i in range(24)}
    store = FolderStore(tmp_path)
    like = sharded(values, mesh(4, 2), P(None, "tp"))
    assert_same(fetch(store, published(store, values), like, timeout_secs=30), values, like)
    assert len(store.puts) == len(store.gets) == 24 * 8
