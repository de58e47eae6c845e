"""One of several processes that run the pmapped advantage kernel together: `advantage_worker.py FOLDER PORT PROCESS NUM_PROCESSES`.

Reads its own rows of the case from FOLDER, writes what the kernel returned next to it. Started by test_advantage_modes.py.
"""

import sys

import jax
import numpy as np

from pgrpo_jax import parallel
from pgrpo_jax.algorithms import advantages
from pgrpo_jax.structs import RewardHistory


def main(folder: str, port: str, process: int, num_processes: int) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes, process, initialization_timeout=60)
    assert (jax.device_count(), jax.local_device_count()) == (2 * num_processes, 2)
    with np.load(f"{folder}/case.npz") as case:
        rows = [np.split(case[name], num_processes)[process] for name in ("rewards", "prompt_index", "preference_ids", "mask")]
        history = RewardHistory(count=case["count"], mean=case["mean"], m2=case["m2"])
        options = {name: case[name].item() for name in ("num_prompts", "epsilon", "std_floor", "min_count")}
    with jax.enable_x64(rows[0].dtype == np.float64):
        kernel = parallel.advantage_kernel(advantages.p_grpo, jax.devices(), **options)
        advantage, merged, diagnostics = kernel(*rows, history)
    np.savez(f"{folder}/out{process}.npz", advantages=advantage, **vars(merged), **vars(diagnostics))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
