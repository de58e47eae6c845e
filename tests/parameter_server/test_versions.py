"""The driver's register, step by step and under random histories."""

import collections

from hypothesis import given, strategies
import pytest

from pgrpo_jax.parameter_server import Leaf, Manifest, ParameterServer, Shard, WeightsError


class Deleted:
    """Notes what is let go; the register asks nothing else of a store."""

    def __init__(self):
        self.handles = []

    def delete(self, handles):
        self.handles.extend(handles)


def manifest(version, epoch=0, name=""):
    shards = tuple(Shard(((i, i + 1),), f"{epoch}/{version}/{i}{name}", None) for i in range(2))
    return Manifest(version, epoch, (Leaf("w", (2,), "float32", shards),))


def register(keep=2):
    store = Deleted()
    return ParameterServer(store, keep=keep), store


def gone(store):
    return [handle.removesuffix("/0") for handle in store.handles if handle.endswith("/0")]


def test_a_step_offers_and_then_retires():
    server, store = register()
    assert server.epoch is None and server.versions == ()
    for step in range(4):
        server.offer(manifest(step))
        server.retire(needed=[step, step + 1])
        assert server.versions == (step,) and server.epoch == 0
        assert server.get(step) == manifest(step)
    assert store.handles == ["0/0/0", "0/0/1", "0/1/0", "0/1/1", "0/2/0", "0/2/1"]


def test_a_version_stays_until_every_reader_is_past_it():
    server, store = register(keep=4)
    for step in range(3):
        server.offer(manifest(step))
    assert server.acquire("a", 0) == manifest(0)
    server.acquire("b", 1)
    server.retire(needed=[2])
    assert server.versions == (0, 1, 2)  # also 1 and 2 would stay: "a" is before them
    server.retire(needed=[])
    assert server.versions == (0, 1, 2)
    server.acquire("a", 1)
    assert server.versions == (1, 2) and gone(store) == ["0/0"]
    server.release("b")
    assert server.versions == (1, 2)
    server.acquire("a", 2)
    assert server.versions == (2,)
    server.release("a")
    server.release("a")  # twice is once
    assert server.versions == () and gone(store) == ["0/0", "0/1", "0/2"]


def test_a_reader_may_go_back_to_what_is_held():
    server, _ = register(keep=3)
    server.offer(manifest(0))
    server.offer(manifest(1))
    server.acquire("a", 1)
    server.acquire("a", 0)
    server.retire(needed=[1])
    assert server.versions == (0, 1)


def test_versions_never_go_backwards():
    server, store = register(keep=4)
    server.offer(manifest(5))
    server.offer(manifest(7))
    for version in (7, 6, 5, 0):
        with pytest.raises(WeightsError, match=rf"version {version} \(epoch 0\) goes backwards, version 7 .* above 7, .* under epoch 1"):
            server.offer(manifest(version, name="again"))
    server.retire(needed=[])
    with pytest.raises(WeightsError, match="version 7 .* goes backwards"):
        server.offer(manifest(7))  # dropped is dropped
    assert server.versions == () and len(store.handles) == 4


def test_the_same_manifest_again_changes_nothing():
    server, store = register(keep=2)
    server.offer(manifest(1))
    server.offer(manifest(2))
    server.offer(manifest(1))
    server.offer(manifest(2))
    assert server.versions == (1, 2) and store.handles == []


def test_a_new_epoch_starts_anew():
    server, store = register(keep=2)
    server.offer(manifest(8))
    server.offer(manifest(9))
    server.acquire("a", 8)
    server.offer(manifest(4, epoch=1))
    assert server.epoch == 1 and server.versions == (4,) and gone(store) == ["0/8", "0/9"]
    server.release("a")  # it read a version that is gone: no harm
    server.offer(manifest(5, epoch=1))
    server.retire(needed=[5])
    assert server.versions == (5,)
    with pytest.raises(WeightsError, match=r"version 10 \(epoch 0\) goes backwards, the epoch is 1 already"):
        server.offer(manifest(10, epoch=0))


def test_an_old_epochs_reader_holds_nothing_of_the_new_one():
    server, _ = register(keep=3)
    server.offer(manifest(0))
    server.acquire("a", 0)
    server.offer(manifest(0, epoch=1))
    server.retire(needed=[])
    assert server.versions == ()


def test_more_than_keep_names_who_holds_back():
    server, store = register(keep=2)
    server.offer(manifest(0))
    server.acquire("lane 1", 0)
    server.acquire("lane 0", 0)
    server.offer(manifest(1))
    server.retire(needed=[1])
    server.acquire("lane 1", 1)
    message = r"version 2 \(epoch 0\) would be one more than keep = 2: needed are \[1\] of \[0, 1\], .*: lane 0 \(at 0\), lane 1 \(at 1\): "
    with pytest.raises(WeightsError, match=message):
        server.offer(manifest(2))
    assert server.versions == (0, 1) and store.handles == []
    server.release("lane 0")
    server.offer(manifest(2))
    assert server.versions == (1, 2)


def test_more_than_keep_without_readers():
    server, _ = register(keep=1)
    server.offer(manifest(0))
    with pytest.raises(WeightsError, match=r"keep = 1: needed are \[0\] of \[0\], .* back: none: "):
        server.offer(manifest(1))


@pytest.mark.parametrize("call", [lambda server: server.get(1), lambda server: server.acquire("a", 1)])
def test_what_is_not_held_is_refused_by_name(call):
    server, _ = register()
    with pytest.raises(WeightsError, match=r"version 1 is not held, but \[\] \(epoch None\)"):
        call(server)
    server.offer(manifest(2))
    with pytest.raises(WeightsError, match=r"version 1 is not held, but \[2\] \(epoch 0\): publish it first"):
        call(server)
    server.retire(needed=[])
    assert server.versions == ()  # a refused reader is at nothing


def test_close_drops_everything():
    server, store = register()
    server.offer(manifest(0))
    server.acquire("a", 0)
    server.close()
    server.close()
    assert server.versions == () and gone(store) == ["0/0"]


def test_keep_has_a_bound():
    with pytest.raises(ValueError, match="keep = 0 is below 1"):
        ParameterServer(Deleted(), keep=0)


steps = strategies.one_of(
    strategies.just(("offer",)),
    strategies.just(("restart",)),
    strategies.tuples(strategies.just("acquire"), strategies.sampled_from("abc"), strategies.integers(0, 5)),
    strategies.tuples(strategies.just("release"), strategies.sampled_from("abc")),
    strategies.tuples(strategies.just("retire"), strategies.sets(strategies.integers(0, 12), max_size=3)),
)


@given(strategies.lists(steps, max_size=40))
def test_any_history_keeps_what_is_needed_or_read_and_lets_go_of_the_rest_once(history):
    server, store = register(keep=3)
    epoch = version = 0
    offered, readers, needed = set(), {}, set()  # of this epoch
    for name, *arguments in history:
        if name == "restart":
            epoch, offered, readers, needed = epoch + 1, set(), {}, set()
        if name in ("offer", "restart"):
            version += 1
            held = {v for v in offered if v in needed or any(r <= v for r in readers.values())}
            if len(held) == 3:
                with pytest.raises(WeightsError, match="one more than keep"):
                    server.offer(manifest(version, epoch))
            else:
                server.offer(manifest(version, epoch))
                offered = held | {version}
                needed.add(version)
        elif name == "acquire" and server.versions:
            reader, which = arguments
            readers[reader] = server.versions[which % len(server.versions)]
            server.acquire(reader, readers[reader])
        elif name == "release":
            server.release(*arguments)
            readers.pop(arguments[0], None)
        elif name == "retire":
            server.retire(*arguments)
            needed = set(arguments[0])
        offered = {v for v in offered if v in needed or any(r <= v for r in readers.values())}  # dropped is dropped
        assert server.versions == tuple(sorted(offered))
        assert max(collections.Counter(store.handles).values(), default=1) == 1
        assert not {f"{epoch}/{v}" for v in offered} & set(gone(store))
