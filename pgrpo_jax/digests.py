"""Digests of pytrees: what a state is, to the bit, whatever the mesh and the number of processes that hold it."""

import hashlib
from typing import Any, Callable, Iterable

import jax
import numpy as np

from pgrpo_jax import parallel


def state_sha256(state: Any) -> str:
    """Returns a digest over every leaf of a pytree: its path, dtype, shape and bytes, in path order.

    It is the same for the same values, however they are laid out. With several processes all must call it: leaves that are spread over
    them come together one by one.
    """
    digest = hashlib.sha256()
    for _, path, leaf in in_path_order(state):
        array = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
        add(digest, path, array.dtype, array.shape, parallel.whole(array))
    return digest.hexdigest()


def held_sha256(state: Any) -> Callable[[], str]:
    """Brings a pytree to the host, and returns what computes its `state_sha256` from there, in any thread: its devices may go on, and donate it.

    The host copies are those that Orbax writes, where each device's part is brought over once; of a part on the CPU there is no copy, but a hold on it.

    Args:
        state: its arrays must be of this process alone.
    """
    leaves = [(path, leaf.dtype, leaf.shape, _held(leaf)) for _, path, leaf in in_path_order(state)]

    def compute() -> str:
        digest = hashlib.sha256()
        for path, dtype, shape, parts in leaves:
            add(digest, path, dtype, shape, [_joined(shape, dtype, parts)])
        return digest.hexdigest()

    return compute


def _held(leaf: jax.Array) -> list[tuple[Any, np.ndarray]]:
    """[(place in the array, host array)] of one copy of each part."""
    shards = [shard for shard in leaf.addressable_shards if shard.replica_id == 0]
    for shard in shards:
        shard.data.copy_to_host_async()
    return [(shard.index, np.asarray(shard.data)) for shard in shards]


def _joined(shape: tuple[int, ...], dtype: Any, parts: list[tuple[Any, np.ndarray]]) -> np.ndarray:
    if len(parts) == 1:
        return parts[0][1]
    whole = np.empty(shape, dtype)
    for place, part in parts:
        whole[place] = part
    return whole


def in_path_order(tree: Any) -> list[tuple[int, str, Any]]:
    """Returns (place in the tree, path, leaf) of every leaf, in the order of the paths as text."""
    leaves = [(i, jax.tree_util.keystr(path), leaf) for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(tree))]
    return sorted(leaves, key=lambda item: item[1])


def add(digest: Any, path: str, dtype: Any, shape: tuple[int, ...], pieces: Iterable[np.ndarray]) -> None:
    """Goes on with a digest: one leaf, whose bytes come in pieces, in row-major order."""
    digest.update(f"{path} {dtype} {shape}\n".encode())
    for piece in pieces:
        digest.update(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
