"""The driver's register of weight versions: which are held, for whom, and when each is let go."""

import threading
from typing import Hashable, Iterable

from pgrpo_jax.parameter_server.manifest import BlobStore, listed, Manifest, WeightsError


class ParameterServer:
    """Holds the manifests of the versions that actors may fetch. Bookkeeping: it waits for nothing; any thread may call it.

    A version is dropped, and its blobs deleted, once nothing needs it (`retire`) and every reader is past it. Each step the driver offers
    the new version, then retires. Within an epoch versions only grow; a new epoch, after each start of the learner, starts anew: the
    versions of the old one are dropped with their readers, whatever they were doing, as they may be of a lost future.

    Args:
        store: where the blobs are.
        keep: most versions held at once; a step offers one before it retires another, so at least one more than later steps need.

    Attributes:
        keep: as given.
        epoch: of the versions held, None before the first.
    """

    def __init__(self, store: BlobStore, *, keep: int):
        if keep < 1:
            raise ValueError(f"keep = {keep} is below 1: hold at least one weight version")
        self._store, self.keep = store, keep
        self._lock = threading.Lock()
        self.epoch: int | None = None
        self._held: dict[int, Manifest] = {}
        self._needed: set[int] = set()
        self._readers: dict[Hashable, int] = {}
        self._newest = -1

    @property
    def versions(self) -> tuple[int, ...]:
        """The versions held, the oldest first."""
        with self._lock:
            return tuple(sorted(self._held))

    def offer(self, manifest: Manifest) -> None:
        """Takes in a version, needed until `retire` says otherwise. The very same manifest offered again while it is held changes nothing.

        Args:
            manifest: of `merge`. Where it is refused its blobs stay the caller's.

        Raises:
            WeightsError: the version or the epoch goes backwards, or `keep` versions are needed or read already.
        """
        with self._lock:
            if self.epoch is None or manifest.epoch > self.epoch:
                self._drop(list(self._held))
                self._needed, self._readers, self._newest = set(), {}, -1
                self.epoch = manifest.epoch
            if self._held.get(manifest.version) == manifest:
                return
            self._check_forwards(manifest)
            if len(self._held) >= self.keep:
                raise WeightsError(self._full(manifest))
            self._held[manifest.version] = manifest
            self._needed.add(manifest.version)
            self._newest = manifest.version

    def get(self, version: int) -> Manifest:
        """Returns the manifest of a version.

        Raises:
            WeightsError: it is not held.
        """
        with self._lock:
            return self._get(version)

    def acquire(self, reader: Hashable, version: int) -> Manifest:
        """Notes that a reader is at a version from now on, and no more where it was; returns the manifest.

        Raises:
            WeightsError: the version is not held.
        """
        with self._lock:
            manifest = self._get(version)
            self._readers[reader] = version
            self._sweep()
            return manifest

    def release(self, reader: Hashable) -> None:
        """Notes that a reader is at no version, because it is done, or dead."""
        with self._lock:
            self._readers.pop(reader, None)
            self._sweep()

    def retire(self, needed: Iterable[int]) -> None:
        """Drops the versions that are not needed and that every reader is past; others go when their last reader does.

        Args:
            needed: versions that later work may name; those not offered yet do no harm.
        """
        with self._lock:
            self._needed = set(needed)
            self._sweep()

    def close(self) -> None:
        """Drops everything."""
        with self._lock:
            self._drop(list(self._held))
            self._needed, self._readers = set(), {}

    def _get(self, version: int) -> Manifest:
        if version not in self._held:
            raise WeightsError(f"weight version {version} is not held, but {sorted(self._held)} (epoch {self.epoch}): publish it first")
        return self._held[version]

    def _sweep(self) -> None:
        oldest = min(self._readers.values(), default=None)
        self._drop([v for v in self._held if v not in self._needed and (oldest is None or v < oldest)])

    def _drop(self, versions: list[int]) -> None:
        for version in versions:
            self._store.delete(self._held.pop(version).handles)

    def _check_forwards(self, manifest: Manifest) -> None:
        if manifest.epoch < self.epoch:
            raise WeightsError(f"{manifest} goes backwards, the epoch is {self.epoch} already: its learner was replaced, end it")
        if manifest.version <= self._newest:
            raise WeightsError(
                f"{manifest} goes backwards, version {self._newest} was published before: publish versions above {self._newest}, "
                f"or, after a restore, under epoch {self.epoch + 1}"
            )

    def _full(self, manifest: Manifest) -> str:
        back = [f"{reader} (at {version})" for reader, version in sorted(self._readers.items(), key=lambda item: (item[1], str(item[0])))]
        return (
            f"{manifest} would be one more than keep = {self.keep}: needed are {sorted(self._needed & set(self._held))} of "
            f"{sorted(self._held)}, and readers hold versions back: {listed(back) or 'none'}: release those readers, retire versions, "
            "or raise keep"
        )
