"""The two ends of the way: shards into the store from where they lie, and out of it by slice.

Both work shard by shard in a few threads, as copies, checksums and waiting for the network run outside Python's lock. A shard is stored
as plain bytes: not every dtype of JAX (bfloat16) travels through pickle without a copy.
"""

import concurrent.futures
import math
import time
from typing import Any, Mapping, Sequence

import jax
import numpy as np
import xxhash

from pgrpo_jax.parameter_server.manifest import BlobsLost, BlobStore, Box, Leaf, listed, Manifest, Shard, text, volume, WeightsError

_THREADS = 8  # enough to fill the memory's or a network's rate; more would only wait for one another
_ALIGNMENT = 64  # bytes: XLA's CPU backend uses host memory that is so aligned as it is, and copies any other

Blobs = Mapping[tuple[str, Box], np.ndarray]  # shards that arrived, by key and box


def publish_shards(store: BlobStore, tree: Any, *, version: int, epoch: int, checksums: bool = True) -> Manifest:
    """Stores this process's part of a weight version; every learner process calls it, and `merge` joins what they return.

    Of the copies of a shard on several devices one is stored, over all processes; which one goes round from leaf to leaf, so that
    processes that hold the same weights share the work. Nothing moves between devices.

    Args:
        store: where the shards go.
        tree: of `jax.Array`; nobody may donate or delete them meanwhile.
        version: the step whose weights they are.
        epoch: of this start of the learner.
        checksums: make them, so that `fetch` can verify.

    Returns:
        All leaves of the tree, with the shards that this process stored.

    Raises:
        WeightsError: a leaf is no `jax.Array`.
        Exception: what the store raised; what was stored until then is deleted again.
    """
    leaves = [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    for key, leaf in leaves:
        if not isinstance(leaf, jax.Array):
            kind = type(leaf).__name__
            raise WeightsError(f"{key} of weight version {version} is a {kind}, not a jax.Array: put it on its devices first")
    with concurrent.futures.ThreadPoolExecutor(_THREADS, "publish") as pool:
        puts = [
            (number, pool.submit(_put, store, shard, leaf.shape, checksums))
            for number, (_, leaf) in enumerate(leaves)
            for shard in _own_shards(leaf, number)
        ]
        _wait([put for _, put in puts], pool)
    ended = [put for _, put in puts if not put.cancelled()]
    if failures := [put.exception() for put in ended if put.exception() is not None]:
        store.delete([put.result().handle for put in ended if put.exception() is None])
        raise failures[0]
    shards: list[list[Shard]] = [[] for _ in leaves]
    for number, put in puts:
        shards[number].append(put.result())
    found = (Leaf(key, leaf.shape, leaf.dtype.name, tuple(own)) for (key, leaf), own in zip(leaves, shards))
    return Manifest(version, epoch, tuple(found))


def _own_shards(leaf: jax.Array, number: int) -> list[jax.Shard]:
    """The shards of the `number`-th leaf that this process stores: of each one copy, the next one for each leaf."""
    if leaf.size == 0:
        return []
    copies = leaf.sharding.num_devices * math.prod(leaf.sharding.shard_shape(leaf.shape)) // leaf.size
    return [shard for shard in leaf.addressable_shards if shard.replica_id == number % copies]


def _put(store: BlobStore, shard: jax.Shard, shape: tuple[int, ...], checksums: bool) -> Shard:
    # An array keeps the host copy that it made of itself; this one over the same buffer takes the copy with it when it goes.
    data = jax.make_array_from_single_device_arrays(shard.data.shape, shard.data.sharding, [shard.data])
    blob = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    checksum = xxhash.xxh3_64_intdigest(blob) if checksums else None
    return Shard(_box(shard.index, shape), store.put(blob), checksum)


def fetch(store: BlobStore, manifest: Manifest, like: Any, *, timeout_secs: float, verify: bool = True) -> Any:
    """Brings a weight version onto this process's devices, in the sharding that is wanted here.

    Reads only the shards that this process's slices overlap, each once. A slice that is a shard, or whole rows of one, goes to the device
    as it lies in the store; on CPU devices the arrays are then views of the store's memory, and keep it alive as long as they live.

    Args:
        store: where the shards are.
        manifest: of `merge`.
        like: what the weights look like here: a tree of `jax.ShapeDtypeStruct` with shardings, or of arrays.
        timeout_secs: longest wait for the shards to arrive.
        verify: compare checksums.

    Returns:
        The weights, a tree of `jax.Array` as `like` says.

    Raises:
        WeightsError: a key is missing or too many, a shape, dtype, size or checksum differs, or parts of the weights are missing.
        TimeoutError: shards did not arrive in time.
        BlobsLost: shards are gone.
    """
    paths, tree = jax.tree_util.tree_flatten_with_path(like)
    wanted = {jax.tree_util.keystr(path): leaf for path, leaf in paths}
    found = {leaf.key: leaf for leaf in manifest.leaves}
    _check_tree(manifest, found, wanted, verify)
    slices = {}
    for key, leaf in wanted.items():
        slices[key] = sorted({_box(index, leaf.shape) for index in leaf.sharding.addressable_devices_indices_map(leaf.shape).values()})
    shards = [(found[key], shard) for key, boxes in slices.items() for shard in found[key].shards if _overlaps(shard.box, boxes)]
    blobs = _get_all(store, manifest, shards, timeout_secs, verify)
    with concurrent.futures.ThreadPoolExecutor(_THREADS, "fetch") as pool:
        pieces = {
            (key, box): pool.submit(_assemble, manifest, found[key], box, blobs) for key, boxes in slices.items() for box in boxes
        }
    arrays = []
    for key, leaf in wanted.items():
        # The callback runs at once, within this turn of the loop.
        arrays.append(jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: pieces[key, _box(index, leaf.shape)].result()))
    return tree.unflatten(arrays)


def _check_tree(manifest: Manifest, found: Mapping[str, Leaf], wanted: Mapping[str, Any], verify: bool) -> None:
    remedy = "learner and actor must be of the same model and settings"
    if absent := [key for key in wanted if key not in found]:
        raise WeightsError(f"{manifest} lacks {listed(absent)}: {remedy}")
    if extra := [key for key in found if key not in wanted]:
        raise WeightsError(f"{manifest} has {listed(extra)}, which are not wanted here: {remedy}")
    for key, leaf in wanted.items():
        here = f"{leaf.dtype.name}{list(leaf.shape)}"
        if (found[key].shape, found[key].dtype) != (leaf.shape, leaf.dtype.name):
            raise WeightsError(f"{manifest}: {found[key]} is wanted as {here}: {remedy}")
        if leaf.sharding is None:
            raise WeightsError(f"{manifest}: {key} {here} is wanted without a sharding: give jax.ShapeDtypeStruct one")
    if verify and (bare := [leaf.key for leaf in found.values() if any(shard.checksum is None for shard in leaf.shards)]):
        raise WeightsError(f"{manifest} has no checksums for {listed(bare)}: publish with checksums=True, or fetch with verify=False")


def _get_all(store: BlobStore, manifest: Manifest, shards: Sequence[tuple[Leaf, Shard]], timeout_secs: float, verify: bool) -> Blobs:
    """Fetches and verifies shards; returns each in its shape and dtype."""
    deadline = time.monotonic() + timeout_secs
    with concurrent.futures.ThreadPoolExecutor(_THREADS, "fetch") as pool:
        gets = [pool.submit(_get, store, manifest, leaf, shard, deadline, verify) for leaf, shard in shards]
        _wait(gets, pool)
    if failures := [get.exception() for get in gets if not get.cancelled() and get.exception() is not None]:
        raise failures[0]
    blobs = {(leaf.key, shard.box): get.result() for (leaf, shard), get in zip(shards, gets)}
    if late := [_name(leaf, shard) for leaf, shard in shards if blobs[leaf.key, shard.box] is None]:
        raise TimeoutError(
            f"{manifest}: {len(late)} of {len(shards)} shards did not arrive within {timeout_secs:g} s: {listed(late)}: "
            "look at the learner's processes and the network, or wait longer"
        )
    return blobs


def _get(store: BlobStore, manifest: Manifest, leaf: Leaf, shard: Shard, deadline: float, verify: bool) -> np.ndarray | None:
    """Returns one shard, None where the deadline passed: the others are still looked for then, so that all that are missing are known."""
    try:
        [blob] = store.get([shard.handle], max(deadline - time.monotonic(), 0.0))
    except TimeoutError:
        return None
    except BlobsLost as error:
        raise BlobsLost(f"{manifest}: shard {_name(leaf, shard)} is lost: {error}") from error
    dtype = jax.numpy.dtype(leaf.dtype)
    size = volume(shard.box) * dtype.itemsize
    if blob.nbytes != size:
        raise WeightsError(f"{manifest}: shard {_name(leaf, shard)} arrived with {blob.nbytes} bytes, not {size}: publish it again")
    if verify and (checksum := xxhash.xxh3_64_intdigest(blob)) != shard.checksum:
        sums = f"its checksum is {checksum:016x}, not {shard.checksum:016x}"
        raise WeightsError(f"{manifest}: shard {_name(leaf, shard)} is corrupt, {sums}: publish it again; look at the memory of the hosts")
    return blob.view(dtype).reshape([stop - start for start, stop in shard.box])


def _assemble(manifest: Manifest, leaf: Leaf, box: Box, blobs: Blobs) -> np.ndarray:
    """Returns one slice of a leaf: a view of the shard it lies in, a copy where it lies in several."""
    sources = [(part, shard.box) for shard in leaf.shards if (part := _overlap(shard.box, box)) is not None]
    for part, whole in sources:
        if part == box:
            return blobs[leaf.key, whole][_within(part, whole)]
    if (there := sum(volume(part) for part, _ in sources)) != volume(box):
        raise WeightsError(f"{manifest}: {leaf} has a hole, {there} of {volume(box)} elements of {text(box)}: fetch what `merge` returned")
    shape, dtype = [stop - start for start, stop in box], jax.numpy.dtype(leaf.dtype)
    raw = np.empty(volume(box) * dtype.itemsize + _ALIGNMENT, np.uint8)
    raw = raw[-raw.ctypes.data % _ALIGNMENT :]
    piece = raw[: volume(box) * dtype.itemsize].view(dtype).reshape(shape)
    for part, whole in sources:
        piece[_within(part, box)] = blobs[leaf.key, whole][_within(part, whole)]
    return piece


def _box(index: Sequence[slice], shape: Sequence[int]) -> Box:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _overlap(one: Box, other: Box) -> Box | None:
    """Returns what two boxes have in common, None where that is nothing."""
    both = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other))
    return both if all(start < stop for start, stop in both) else None


def _overlaps(one: Box, others: Sequence[Box]) -> bool:
    return any(_overlap(one, other) is not None for other in others)


def _within(part: Box, whole: Box) -> tuple[slice, ...]:
    """Returns the index of a part, counted from where the whole begins."""
    return tuple(slice(start - origin, stop - origin) for (start, stop), (origin, _) in zip(part, whole))


def _name(leaf: Leaf, shard: Shard) -> str:
    return f"{leaf.key}{text(shard.box)}"


def _wait(futures: Sequence[concurrent.futures.Future], pool: concurrent.futures.Executor) -> None:
    """Waits until all are done; once one fails, those that have not begun are cancelled."""
    concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_EXCEPTION)
    pool.shutdown(cancel_futures=True)
