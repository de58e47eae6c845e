"""One of several processes that run the pmapped advantage kernel together: `advantage_worker.py FOLDER PORT PROCESS NUM_PROCESSES`.

Reads its own rows of the case from FOLDER, writes what the kernel returned next to it. Started by test_advantage_modes.py.
"""

import sys

import jax
import numpy as np

from pgrpo_jax import parallel
from pgrpo_jax.algorithms.advantages import AdvantageSettings
from pgrpo_jax.structs import RewardHistory


def main(folder: str, port: str, process: int, num_processes: int) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes, process, initialization_timeout=60)
    assert (jax.device_count(), jax.local_device_count()) == (2 * num_processes, 2)
    with np.load(f"{folder}/case.npz") as case:
        rows = [np.split(case[name], num_processes)[process] for name in ("rewards", "prompt_index", "preference_ids", "mask")]
        history = RewardHistory(**{name: case[name] for name in ("count", "weight", "mean", "m2")})
        options = {name: case[name].item() for name in ("epsilon", "std_floor", "min_count")}
        num_prompts = case["num_prompts"].item()
    with jax.enable_x64(rows[0].dtype == np.float64):
        kernel = parallel.advantage_kernel(AdvantageSettings(**options), jax.devices(), num_prompts=num_prompts)
        rewards, prompt_index, preference_ids, mask = rows
        arguments = rewards, prompt_index, preference_ids, preference_ids, np.zeros_like(preference_ids), mask
        advantage, merged, diagnostics = kernel(*arguments, history)
    np.savez(f"{folder}/out{process}.npz", advantages=advantage, **vars(merged), **vars(diagnostics))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
