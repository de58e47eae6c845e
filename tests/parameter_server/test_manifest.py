"""Joining what the learner's processes published: a count of each element is the oracle of what is whole."""

import dataclasses
import pickle

from hypothesis import given, strategies
import numpy as np
import pytest

from pgrpo_jax.parameter_server import Leaf, Manifest, merge, Shard, WeightsError


def shard(*box, handle="h"):
    return Shard(tuple(box), handle, 7)


def leaf(*shards, key="['w']", shape=(4, 6), dtype="float32"):
    return Leaf(key, shape, dtype, tuple(shards))


def part(*leaves, version=3, epoch=1):
    return Manifest(version, epoch, tuple(leaves))


LEFT, RIGHT = shard((0, 4), (0, 3), handle="l"), shard((0, 4), (3, 6), handle="r")
BIAS = leaf(shard((0, 2), handle="b"), key="['b']", shape=(2,), dtype="bfloat16")
CORNER, SCALAR = shard((3, 4), (5, 6)), leaf(shard(), key="s", shape=())
NO_BIAS = leaf(key="['b']", shape=(2,), dtype="bfloat16")


def test_joins_the_parts_of_all_processes():
    whole = merge([part(leaf(RIGHT), NO_BIAS), part(leaf(LEFT), BIAS)])
    assert whole == part(leaf(LEFT, RIGHT), BIAS)
    assert whole == merge([part(leaf(LEFT), BIAS), part(leaf(RIGHT), NO_BIAS)]) == merge([whole])
    assert whole.handles == ["l", "r", "b"] and str(whole) == "weight version 3 (epoch 1)"
    assert pickle.loads(pickle.dumps(whole)) == whole


def test_scalars_are_one_shard_and_empty_arrays_none():
    empty = leaf(key="e", shape=(0, 4))
    whole = merge([part(SCALAR, empty), part(leaf(key="s", shape=()), empty)])
    assert whole == part(SCALAR, empty)


rows = strategies.sampled_from([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)])
boxes = strategies.tuples(rows, strategies.sampled_from([(0, 1), (0, 2), (1, 2)]))


TILINGS = [[((0, 1), (0, 2)), ((1, 3), (0, 1)), ((1, 3), (1, 2))], [((0, 1), (1, 2)), ((0, 3), (0, 1)), ((1, 3), (1, 2))]]


@given(strategies.lists(boxes, max_size=4) | strategies.sampled_from(TILINGS).flatmap(strategies.permutations))
def test_accepts_exactly_what_covers_each_element_once(cuts):
    count = np.zeros((3, 2), int)
    for (a, b), (c, d) in cuts:
        count[a:b, c:d] += 1
    parts = [part(leaf(shard(*box), shape=(3, 2))) for box in cuts] or [part(leaf(shape=(3, 2)))]
    if (count == 1).all():
        assert sorted(s.box for s in merge(parts).leaves[0].shards) == sorted(cuts)
    else:
        with pytest.raises(WeightsError, match=r"overlap" if (count > 1).any() else r"has a hole"):
            merge(parts)


@pytest.mark.parametrize(
    "parts, message",
    [
        ([], r"0 parts of a weight version, must be at least 1"),
        ([part(BIAS), part(NO_BIAS, version=4)], r"version 3 \(epoch 1\) can not be joined with weight version 4 \(epoch 1\)"),
        ([part(BIAS), part(NO_BIAS, epoch=2)], r"version 3 \(epoch 1\) can not be joined with weight version 3 \(epoch 2\)"),
        ([part(leaf(LEFT), BIAS), part(leaf(RIGHT))], r"epoch 1\): part 1 of 2 lacks \['b'\]: every learner process"),
        ([part(leaf(LEFT)), part(leaf(RIGHT), BIAS)], r"epoch 1\): part 0 of 2 lacks \['b'\]"),
        ([part(BIAS), part(leaf(key="['b']", shape=(3,)))], r"\['b'\] bfloat16\[2\] is \['b'\] float32\[3\] in another part"),
        ([part(leaf(LEFT), BIAS)], r"\['w'\] float32\[4, 6\] has a hole: \[0:4, 0:3\] covers 12 of 24 elements: publish it anew"),
        ([part(NO_BIAS)], r"\['b'\] bfloat16\[2\] has a hole: no shard covers 0 of 2"),
        ([part(leaf(LEFT, RIGHT)), part(leaf(CORNER))], r"shards \[0:4, 3:6\] and \[3:4, 5:6\] of \['w'\] float32\[4, 6\] overlap"),
        ([part(SCALAR), part(SCALAR)], r"shards \[\] and \[\] of s float32\[\] overlap"),
        ([part(leaf(LEFT, shard((0, 4), (3, 7))))], r"shard \[0:4, 3:7\] is no part of \['w'\]"),
        ([part(leaf(LEFT, shard((-1, 4), (3, 6))))], r"shard \[-1:4, 3:6\] is no part"),
        ([part(leaf(LEFT, shard((4, 4), (3, 6))))], r"shard \[4:4, 3:6\] is no part"),
        ([part(leaf(shard((0, 4))))], r"shard \[0:4\] is no part of \['w'\]"),
    ],
)
def test_refuses_by_name_what_is_not_whole(parts, message):
    with pytest.raises(WeightsError, match=message):
        merge(parts)


def test_long_lists_are_cut_short():
    many = [leaf(shard((0, 1)), key=f"k{i}", shape=(1,)) for i in range(9)]
    with pytest.raises(WeightsError, match=r"lacks k0, k1, k2, k3, k4, k5 and 3 more:"):
        merge([part(*many), part()])


def test_records_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        part(BIAS).version = 4
