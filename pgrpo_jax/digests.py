"""Digests of pytrees: what a state is, to the bit, whatever the mesh and the number of processes that hold it."""

import hashlib
from typing import Any, Iterable

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


def in_path_order(tree: Any) -> list[tuple[int, str, Any]]:
    """Returns (place in the tree, path, leaf) of every leaf, in the order of the paths as text."""
    leaves = [(i, jax.tree_util.keystr(path), leaf) for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(tree))]
    return sorted(leaves, key=lambda item: item[1])


def add(digest: Any, path: str, dtype: Any, shape: tuple[int, ...], pieces: Iterable[np.ndarray]) -> None:
    """Goes on with a digest: one leaf, whose bytes come in pieces, in row-major order."""
    digest.update(f"{path} {dtype} {shape}\n".encode())
    for piece in pieces:
        digest.update(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
