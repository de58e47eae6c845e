"""Floor 2: weight versions on their way from the learner's processes to the actors', through host memory.

    learner process:  part = publish_shards(store, weights, version=v, epoch=e)      every process, its own shards
    driver:           server.offer(merge(parts)); server.retire(needed=…)            handles only: no weights pass through it
    actor process:    weights = fetch(store, manifest, like, timeout_secs=…)         by slice, in the actor's own sharding

No process ever holds the whole model on a device for it: a shard is stored once, as it lies in the learner, and an actor reads the shards
that its own slices overlap. Where the blobs live is the store's affair (`BlobStore`).
"""

from pgrpo_jax.parameter_server.manifest import BlobsLost, BlobStore, Leaf, Manifest, merge, Shard, WeightsError
from pgrpo_jax.parameter_server.transfer import fetch, publish_shards
from pgrpo_jax.parameter_server.versions import ParameterServer

__all__ = ["BlobStore", "BlobsLost", "Leaf", "Manifest", "ParameterServer", "Shard", "WeightsError", "fetch", "merge", "publish_shards"]
