"""Weight versions on disk: each that later steps need is stored once, by its number, and deleted when no committed step refers to it."""

import weakref
from typing import Any, Iterable, Mapping

import jax
import orbax.checkpoint as ocp
from etils import epath

from pgrpo_jax.digests import state_sha256


class WeightVersions:
    """The directory of a run's weight versions, one entry each. Which of them are referred to, and by which digest, its owner knows.

    With several processes all call `digests` and `write` alike, and each writes what its own devices hold. One of them calls `settle`,
    while none writes.

    Args:
        directory: where the versions live; made when the first is written.
        everyone: the processes that write together.
        timeout_secs: longest wait for the slowest of them.
    """

    def __init__(self, directory: epath.Path, *, everyone: ocp.options.MultiprocessingOptions, timeout_secs: int):
        self._directory = directory
        handler = ocp.StandardCheckpointHandler(multiprocessing_options=everyone)
        options = ocp.AsyncOptions(timeout_secs=timeout_secs)
        self._writer = ocp.AsyncCheckpointer(handler, multiprocessing_options=everyone, async_options=options)
        self._hashed: dict[int, tuple[list[weakref.ref], str]] = {}  # version: its leaves, their digest

    def path(self, version: int) -> epath.Path:
        """Returns where a version is stored, or would be."""
        return self._directory / str(version)

    def exist(self) -> bool:
        """Returns whether any version was ever written here."""
        return self._directory.exists()

    def digests(self, versions: Mapping[int, Any]) -> dict[int, str]:
        """Returns {version: `state_sha256` of its weights}, made once for as long as the same arrays are offered.

        Args:
            versions: {version: weights}; others are forgotten.
        """
        self._hashed = {v: hashed for v, hashed in self._hashed.items() if v in versions}
        for v, weights in versions.items():
            leaves = jax.tree.leaves(weights)
            known = [leaf() for leaf in self._hashed[v][0]] if v in self._hashed else []
            if len(known) != len(leaves) or any(a is not b for a, b in zip(known, leaves, strict=True)):
                self.remember({v: weights}, {v: state_sha256(weights)})
        return {v: self._hashed[v][1] for v in versions}

    def remember(self, versions: Mapping[int, Any], digests: Mapping[int, str]) -> None:
        """Takes digests as those of these arrays, which are not kept alive for it."""
        self._hashed |= {v: ([weakref.ref(leaf) for leaf in jax.tree.leaves(weights)], digests[v]) for v, weights in versions.items()}

    def settle(self, *, vouched: Iterable[int], wanted: Iterable[int], complete: bool) -> list[int]:
        """Deletes what is unfinished or not vouched for; returns the versions that are to be written.

        A version that no committed step vouches for is of a save that never came to its end, maybe of a future that was lost: it is never
        taken for the one that has its number now.

        Args:
            vouched: versions that committed steps refer to.
            wanted: versions that the step to be saved refers to.
            complete: whether `vouched` are all of them; otherwise no other committed version is deleted but to be written anew.

        Returns:
            Versions of `wanted` that are not stored, in order.
        """
        vouched, wanted, stored = set(vouched), set(wanted), set()
        for path in self._directory.iterdir() if self.exist() else ():
            committed = path.name.isdigit() and ocp.utils.is_checkpoint_finalized(path)
            version = int(path.name) if committed else None
            if version in vouched:
                stored.add(version)
            elif complete or not committed or version in wanted:
                path.rmtree(missing_ok=True)
        return sorted(wanted - stored)

    def write(self, versions: Mapping[int, Any]) -> None:
        """Stores versions; each is committed by one rename, and all are durable on return.

        Args:
            versions: {version: weights}, of which none is stored.
        """
        for version, weights in sorted(versions.items()):
            self._directory.mkdir(parents=True, exist_ok=True)
            self._writer.save(self.path(version), args=ocp.args.StandardSave(weights))
            self._writer.wait_until_finished()

    def close(self) -> None:
        """Releases the writer's threads."""
        self._writer.close()
