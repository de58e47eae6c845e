"""One of several processes that train together: `parallel_worker.py FOLDER PORT PROCESS NUM_PROCESSES`. Started by test_parallel.py.

Trains the tiny model on every mesh of two devices, crosses checkpoints, and writes what it found to FOLDER/out<PROCESS>.json. FOLDER/alone
holds a checkpoint that one process made.
"""

import json
import pathlib
import sys

import jax
import learner_cases as cases
import numpy as np

from pgrpo_jax import parallel
from pgrpo_jax.checkpoints import CheckpointError, Checkpoints, state_sha256

MESHES = {"data": {}, "fsdp": {"fsdp": 2}, "tp": {"tp": 2}}
STEPS = 2
OFF_POLICY = cases.Schedule(accept=2)  # version 0 is still needed after the first update


def train(learner, until: int) -> list[dict]:
    """Updates until a step; what each of them returned."""
    found = []
    while learner.step < until:
        metrics, advantages = learner.update((cases.rollouts(learner.step, version=learner.step, step=learner.step),))
        found.append({"metrics": metrics, "advantages": advantages.tolist()})
    return found


def trajectory(learner, folder: pathlib.Path, name: str) -> dict:
    """Trains from the start; the parameters come back through `localise`, as an actor in this process would get them."""
    steps = train(learner, STEPS)
    layout = parallel.layout(learner.state, learner._mesh)
    laid_out = all(a.sharding == b for a, b in zip(jax.tree.leaves(learner.state), jax.tree.leaves(layout), strict=True))
    weights = learner.versions[STEPS]
    digests = {"whole": state_sha256(weights), "state": learner.digest()}
    local = parallel.localise(weights, model=cases.CONFIG, devices=jax.local_devices()[:1])
    digests["local"] = state_sha256(local)
    parallel._WHOLE_BYTES = 0  # layer by layer, as large parameters come together
    digests["by layer"] = state_sha256(parallel.localise(weights, model=cases.CONFIG, devices=jax.local_devices()[:1]))
    digests["state by layer"] = learner.digest()
    parallel._WHOLE_BYTES = 1 << 26
    if jax.process_index() == 0:
        np.savez(folder / f"{name}.npz", **{jax.tree_util.keystr(p): np.asarray(x) for p, x in jax.tree_util.tree_leaves_with_path(local)})
    return {"steps": steps, "laid_out": laid_out, "digests": digests}


def crossing(folder: pathlib.Path) -> dict:
    """A checkpoint of one process is restored here over tp 2; one of two processes over fsdp 2 goes on to the bit."""
    alone = cases.learner(folder / "alone", num_devices=2, schedule=OFF_POLICY, **MESHES["tp"])
    found = {"restored": alone.restore(), "alone": alone.digest(), "alone's versions": state_sha256(alone.versions)}

    def make(schedule):
        return cases.learner(folder / "together", num_devices=2, schedule=schedule, **MESHES["fsdp"])

    saving, whole = make(OFF_POLICY), make(cases.Schedule())
    found["nothing there"] = saving.restore()
    train(saving, 1)
    saving.save(wait=True)
    found |= {"saved": saving.digest(), "saved versions": state_sha256(saving.versions), "versions": sorted(saving.versions)}
    reading, resumed = make(OFF_POLICY), make(cases.Schedule())
    found["restored again"] = [reading.restore(), resumed.restore()]
    found |= {"read": reading.digest(), "read versions": state_sha256(reading.versions)}
    for learner in (whole, resumed):
        train(learner, STEPS)
    for learner in (alone, saving, whole, reading, resumed):
        learner.close()
    return found | {"uninterrupted": whole.digest(), "resumed": resumed.digest()}


def stored_once(folder: pathlib.Path) -> list[dict[str, int]]:
    """Three steps, of which two refer to version 0: the files of `versions/` after each, with the times when they were written."""
    made, found = cases.learner(folder / "once", num_devices=2, schedule=OFF_POLICY, **MESHES["fsdp"]), []
    for step in (1, 2, 3, 4):
        state = made.state.replace(**parallel.replicate({"step": np.int32(step)}, made._mesh))
        made._checkpoints.save(state, {0: made.versions[0]} if step < 3 else {}, wait=True)
        files = [path for path in (folder / "once" / "versions").rglob("*") if path.is_file()] if jax.process_index() == 0 else []
        found.append({str(path): path.stat().st_mtime_ns for path in files})
    made.close()
    return found


def refusals(folder: pathlib.Path) -> dict:
    """What the processes tell when they disagree, and when one of them does not come."""
    process, found = jax.process_index(), {}
    made = cases.learner(folder / "refusals", num_devices=2)
    mean = parallel.replicate(np.full(cases.K, process, np.float32), made._mesh)
    drifted = made.state.replace(history=made.state.history.replace(mean=mean))
    if process == 0:
        (folder / "own0" / "7").mkdir(parents=True)
    own = Checkpoints(folder / f"own{process}", identity={"of": "tests"})
    late = Checkpoints(folder / "late", identity={"of": "tests"}, timeout_secs=2)
    calls = {"drifted": lambda: made._checkpoints.save(drifted, {}), "not shared": own.latest_step}
    if process == 0:
        calls["late"] = lambda: late.save(made.state.replace(step=np.int32(4)), {})
    for name, call in calls.items():
        try:
            call()
        except (CheckpointError, TimeoutError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def main(folder: pathlib.Path, port: str, process: int, num_processes: int) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes, process, initialization_timeout=60)
    found = {}
    for name, mesh in MESHES.items():
        learner = cases.learner(folder / "unused", num_devices=num_processes, num_steps=STEPS, **mesh)
        found[name] = trajectory(learner, folder, name)
        learner.close()
    found["crossing"] = crossing(folder)
    found["stored once"] = stored_once(folder)
    found["refusals"] = refusals(folder)
    (folder / f"out{process}.json").write_text(json.dumps(found))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
