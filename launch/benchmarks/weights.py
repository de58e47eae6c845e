"""Weights on their way from one process to another, against a plain copy."""

import time
from typing import Any

import jax
import numpy as np

from pgrpo_jax import parameter_server

BYTES, LEAVES = 10**9, 200


class Publisher:
    """A process that holds weights on a device, and the memory for a plain copy."""

    def __init__(self):
        from pgrpo_jax.engines.ray_cluster import RayBlobStore

        self._store = RayBlobStore()
        rng = np.random.default_rng(0)
        rows = BYTES // 4 // LEAVES // 512
        self._tree = {f"w{i}": jax.device_put(rng.random((rows, 512), np.float32), jax.devices()[0]) for i in range(LEAVES)}
        self._source = rng.random(rows * 512 * LEAVES, np.float32)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns what the weights look like."""
        return {key: x.shape for key, x in self._tree.items()}

    def plain_copy_secs(self) -> float:
        """Copies as many bytes into fresh memory."""
        start = time.perf_counter()
        np.copyto(np.empty_like(self._source), self._source)
        return time.perf_counter() - start

    def publish(self, version: int, checksums: bool) -> parameter_server.Manifest:
        """Publishes the weights."""
        return parameter_server.publish_shards(self._store, self._tree, version=version, epoch=0, checksums=checksums)


class Reader:
    """A process that fetches weights onto its device and reads a word of each page."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        from pgrpo_jax.engines.ray_cluster import RayBlobStore

        self._store = RayBlobStore()
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        self._like = {key: jax.ShapeDtypeStruct(shape, np.float32, sharding=place) for key, shape in shapes.items()}

    def fetch(self, manifest: parameter_server.Manifest, verify: bool) -> float:
        """Fetches a version; returns a number that depends on all of it."""
        tree: Any = parameter_server.fetch(self._store, manifest, self._like, timeout_secs=120, verify=verify)
        return float(sum(np.asarray(x).reshape(-1)[::1024].sum() for x in jax.block_until_ready(tree).values()))


def measure(rounds: int) -> dict[str, list[float]]:
    """Returns seconds of the copy and of the way, and the ratios of their rates, round by round."""
    from pgrpo_jax.engines.ray_cluster import Cluster, RayBlobStore  # before Ray: it says how Ray is to start
    import ray

    cluster = Cluster(object_store_bytes=4 * BYTES)
    found: dict[str, list[float]] = {}
    try:
        publisher = ray.remote(num_cpus=0)(Publisher).remote()
        reader = ray.remote(num_cpus=0)(Reader).remote(ray.get(publisher.shapes.remote()))
        server = parameter_server.ParameterServer(RayBlobStore(), keep=2)
        for version in range(-1, 2 * rounds):  # the first one warms up
            checksums = bool(version % 2)
            copy_secs = ray.get(publisher.plain_copy_secs.remote())
            start = time.perf_counter()
            server.offer(parameter_server.merge([ray.get(publisher.publish.remote(version + 1, checksums))]))
            ray.get(reader.fetch.remote(server.get(version + 1), checksums))
            secs = time.perf_counter() - start
            server.retire(needed=[version + 1])
            if version < 0:
                continue
            kind = "with checksums" if checksums else "without checksums"
            for name, value in (("copy, s", copy_secs), (f"{kind}, s", secs), (f"{kind}, rate / copy rate", copy_secs / secs)):
                found.setdefault(name, []).append(value)
    finally:
        cluster.close()
    return found
