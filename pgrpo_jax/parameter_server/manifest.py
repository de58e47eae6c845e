"""What a weight version is made of: its leaves, how each is cut into shards, and the handle under which each shard is stored."""

import dataclasses
import math
from typing import Any, Protocol, Sequence

import numpy as np

Box = tuple[tuple[int, int], ...]  # a part of an array: (start, stop) along each axis


class WeightsError(ValueError):
    """A weight version is refused; the message names it, what is wrong with it, and what to do."""


class BlobsLost(RuntimeError):
    """Stored shards are gone for good, as their process or node is; the version has to be published again."""


class BlobStore(Protocol):
    """Where shards are kept between two processes: flat arrays of bytes, in host memory. Called from several threads at once."""

    def put(self, array: np.ndarray) -> Any:
        """Stores a copy of a contiguous [n] uint8 array, n > 0; returns its handle, which can be pickled and compared."""

    def get(self, handles: Sequence[Any], timeout_secs: float) -> list[np.ndarray]:
        """Returns the blobs of some handles, read-only.

        They are views of the store's own memory where it can give them. A view outlives `delete`.

        Raises:
            TimeoutError: not all arrived in time; with 0 s, not all are here.
            BlobsLost: one of them will never arrive.
        """

    def delete(self, handles: Sequence[Any]) -> None:
        """Lets go of blobs; returns at once."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """A stored part of a leaf.

    Attributes:
        box: which part of the leaf it is.
        handle: of its bytes (row-major) in the store.
        checksum: XXH3 (64 bits) of those bytes, None where none was made.
    """

    box: Box
    handle: Any
    checksum: int | None


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a version.

    Attributes:
        key: its path in the tree, as `jax.tree_util.keystr` writes it.
        shape: of the whole array, over all processes.
        dtype: its name, for example "bfloat16".
        shards: its parts; an empty array has none.
    """

    key: str
    shape: tuple[int, ...]
    dtype: str
    shards: tuple[Shard, ...]

    def __str__(self) -> str:
        return f"{self.key} {self.dtype}{list(self.shape)}"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """One weight version; from one learner process, a part of one.

    Attributes:
        version: the learner step whose weights they are.
        epoch: counts the learner's starts: versions of an earlier epoch may belong to a lost future.
        leaves: in the tree's order.
    """

    version: int
    epoch: int
    leaves: tuple[Leaf, ...]

    def __str__(self) -> str:
        return f"weight version {self.version} (epoch {self.epoch})"

    @property
    def handles(self) -> list[Any]:
        """The handles of all its shards."""
        return [shard.handle for leaf in self.leaves for shard in leaf.shards]


def merge(parts: Sequence[Manifest]) -> Manifest:
    """Joins what the learner's processes published, and checks that it is whole.

    Args:
        parts: the manifest of each process, in any order.

    Returns:
        One manifest, in which the shards of each leaf cover it, each element once.

    Raises:
        WeightsError: parts are of different versions or trees, or shards are missing or overlap.
    """
    if not parts:
        raise WeightsError("0 parts of a weight version, must be at least 1: every learner process publishes one")
    first = parts[0]
    if others := sorted({str(part) for part in parts if (part.version, part.epoch) != (first.version, first.epoch)}):
        raise WeightsError(f"{first} can not be joined with {', '.join(others)}: every learner process must publish the same version")
    remedy = "every learner process must publish the same tree"
    trees = [{leaf.key: leaf for leaf in part.leaves} for part in parts]
    for i, tree in enumerate(trees):
        absent = [key for key in {key: None for other in trees for key in other} if key not in tree]
        if absent:
            raise WeightsError(f"{first}: part {i} of {len(parts)} lacks {listed(absent)}: {remedy}")
    leaves = []
    for leaf in first.leaves:
        twins = [tree[leaf.key] for tree in trees]
        if others := sorted({str(twin) for twin in twins if (twin.shape, twin.dtype) != (leaf.shape, leaf.dtype)}):
            raise WeightsError(f"{first}: {leaf} is {', '.join(others)} in another part: {remedy}")
        shards = sorted((shard for twin in twins for shard in twin.shards), key=lambda shard: shard.box)
        leaves.append(dataclasses.replace(leaf, shards=tuple(shards)))
        _check_cover(first, leaves[-1])
    return dataclasses.replace(first, leaves=tuple(leaves))


def _check_cover(manifest: Manifest, leaf: Leaf) -> None:
    """Shards inside the leaf, none over another, that hold as many elements as it does, cover it."""
    remedy = "publish it anew, every learner process with the same sharding"
    boxes = [shard.box for shard in leaf.shards]
    for box in boxes:
        if len(box) != len(leaf.shape) or not all(0 <= start < stop <= size for (start, stop), size in zip(box, leaf.shape)):
            raise WeightsError(f"{manifest}: shard {text(box)} is no part of {leaf}: {remedy}")
    starts, stops = np.array(boxes, int).reshape(len(boxes), len(leaf.shape), 2).transpose(2, 0, 1)  # [shards, axes] each
    overlaps = np.all((starts[:, None] < stops[None]) & (starts[None] < stops[:, None]), axis=-1)
    if (pairs := np.argwhere(np.triu(overlaps, k=1))).size:
        one, other = (text(boxes[i]) for i in pairs[0])
        raise WeightsError(f"{manifest}: shards {one} and {other} of {leaf} overlap: {remedy}")
    found, wanted = sum(map(volume, boxes)), math.prod(leaf.shape)
    if found != wanted:
        there = listed([text(box) for box in boxes]) if boxes else "no shard"
        raise WeightsError(f"{manifest}: {leaf} has a hole: {there} covers {found} of {wanted} elements: {remedy}")


def volume(box: Box) -> int:
    """Returns the number of elements in a box; 1 for that of a scalar."""
    return math.prod(stop - start for start, stop in box)


def text(box: Box) -> str:
    """Writes a box as an index: "[0:4, 2:8]"."""
    return f"[{', '.join(f'{start}:{stop}' for start, stop in box)}]"


def listed(names: Sequence[str], most: int = 6) -> str:
    """Joins names for a message, not too many of them."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
