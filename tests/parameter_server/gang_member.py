"""One of two learner processes, then of two actor processes: python gang_member.py FOLDER COORDINATOR NUMBER.

Publishes its part of a tree that both hold, waits for the other's part, and fetches the whole in other shardings. What it stored, read and
got is written to FOLDER/result-NUMBER.
"""

import pathlib
import pickle
import sys
import time

from folder_store import FolderStore
import jax
import ml_dtypes
import numpy as np

from pgrpo_jax import parameter_server

P = jax.sharding.PartitionSpec
TIMEOUT_SECS = 60.0


def tree() -> dict[str, np.ndarray]:
    """What is published: the values are a function of nothing."""
    rng = np.random.default_rng(0)
    bias = rng.normal(size=8).astype(ml_dtypes.bfloat16)
    return {"a": rng.normal(size=(8, 6)).astype(np.float32), "b": bias, "c": np.float32(2.5), "d": rng.integers(0, 99, (2, 3), np.int32)}


LEARNER = {"a": P("x"), "b": P(), "c": P(), "d": P()}


def shaped(mesh: jax.sharding.Mesh, specs: dict[str, P]) -> dict[str, jax.ShapeDtypeStruct]:
    """The tree as it is wanted on a mesh."""
    return {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.NamedSharding(mesh, specs[k])) for k, x in tree().items()}


def wait_for(path: pathlib.Path) -> bytes:
    """Returns what another process writes to a file (by a rename)."""
    deadline = time.monotonic() + TIMEOUT_SECS
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} did not appear within {TIMEOUT_SECS} s")
        time.sleep(0.01)
    return path.read_bytes()


def write(path: pathlib.Path, value: object) -> None:
    """Pickles a value into a file that appears whole."""
    path.with_suffix(".part").write_bytes(pickle.dumps(value))
    path.with_suffix(".part").rename(path)


def run(folder: pathlib.Path, number: int) -> None:
    """Publishes, joins, fetches, reports."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    store = FolderStore(folder / "blobs", f"process{number}")
    values = tree()
    place = lambda leaf, value: jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: value[index])
    weights = jax.tree.map(place, shaped(mesh, LEARNER), values)
    write(folder / f"part-{number}", parameter_server.publish_shards(store, weights, version=3, epoch=1))
    manifest = parameter_server.merge([pickle.loads(wait_for(folder / f"part-{n}")) for n in range(2)])
    got = {}
    for name, spec in (("same axis", P("x")), ("other axis", P(None, "x")), ("replicated", P())):
        store.gets.clear()
        found = parameter_server.fetch(store, manifest, shaped(mesh, LEARNER | {"a": spec}), timeout_secs=TIMEOUT_SECS)
        parts = {key: np.asarray(x.addressable_shards[0].data) for key, x in found.items()}
        got[name] = (list(store.gets), parts)
    write(folder / f"result-{number}", {"manifest": manifest, "puts": store.puts, "got": got})


if __name__ == "__main__":
    where, coordinator, process = sys.argv[1:]
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, num_processes=2, process_id=int(process))
    run(pathlib.Path(where), int(process))
