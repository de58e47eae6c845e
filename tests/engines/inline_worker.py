"""One process of an SPMD program whose inline engines share the units: `inline_worker.py FOLDER PORT PROCESS NUM_PROCESSES`.

The weights are split over the devices of all processes. Writes what its polls returned; started by test_inline.py.
"""

import json
import pathlib
import sys
import types

import contract_actor
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from pgrpo_jax.engines.inline import InlineEngine
from pgrpo_jax.exchange import Exchange
from pgrpo_jax.rollout_files import pack_rollouts
from pgrpo_jax.structs import Finished, Started, Tick, Work

VERSIONS = ({0: 0, 4: 4}, {4: 4, 5: 5})
UNITS = (
    [Work(index=i, step=i // 2, version=4 * (i % 2), split="train") for i in (3, 1, 2, 0, 4)],
    [Work(index=9, step=5, version=5), Work(index=8, step=4, version=4)],
)


def spread(version: int, mesh: Mesh) -> dict[str, jax.Array]:
    """A version's weights, one part on each device of the program."""
    whole = np.asarray(contract_actor.weights(version)["w"])
    return {"w": jax.make_array_from_callback(whole.shape, NamedSharding(mesh, PartitionSpec("x")), lambda index: whole[index])}


def localise(weights: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Brings the parts together on this process's first device; all processes call it together."""
    mesh = weights["w"].sharding.mesh
    whole = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))(weights)
    return jax.tree.map(lambda x: x.addressable_data(0), whole)


def polls(engine: InlineEngine, mesh: Mesh) -> list[dict[str, object]]:
    """Publishes and submits as the rounds say and returns what each poll returned, the last of each round an empty one."""
    said = []
    for versions, units in zip(VERSIONS, UNITS, strict=True):
        engine.publish(types.SimpleNamespace(versions={v: spread(w, mesh) for v, w in reversed(versions.items())}))
        for unit in units:
            engine.submit(unit)
        happened = True
        while happened:
            events = engine.poll(timeout_secs=1.0)
            said.append({
                "kinds": [type(event).__name__ for event in events],
                "begun": [[event.work.index, event.worker] for event in events if isinstance(event, Started)],
                "rollouts": pack_rollouts([event.rollouts for event in events if isinstance(event, Finished)]).hex(),
                "secs": [event.secs for event in events if isinstance(event, Tick)],
            })
            happened = len(events) > 1
    return said


def failing(actor: contract_actor.ScriptedActor, exchange: Exchange, mesh: Mesh) -> str:
    """What the poll raises in which the second process's unit fails."""
    engine = InlineEngine(actor, localise=localise, exchange=exchange)
    engine.publish(types.SimpleNamespace(versions={0: spread(0, mesh)}))
    for index in (20, 21):
        engine.submit(Work(index=index, step=0, version=0))
    try:
        engine.poll(timeout_secs=1.0)
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main(folder: str, port: str, process: int, num_processes: int) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes, process, initialization_timeout=60)
    mesh, exchange = Mesh(np.array(jax.devices()), "x"), Exchange(timeout_secs=60.0)
    own = pathlib.Path(folder, f"process{process}")
    own.mkdir()
    actor = contract_actor.ScriptedActor(str(own), failures={"judge 21": "no sandbox"})
    engine = InlineEngine(actor, localise=localise, exchange=exchange)
    said = {"slots": engine.slots, "polls": polls(engine, mesh)}
    said["generated"] = sorted(int(path.name.split()[1]) for path in own.glob("generate * done"))
    said["failure"] = failing(actor, exchange, mesh)
    pathlib.Path(folder, f"out{process}.json").write_text(json.dumps(said))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
