"""A process for tests: a cluster whose node says of itself that it is a TPU slice, and what can be reserved on it; prints JSON."""

import json
import pathlib
import secrets
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import os  # noqa: E402

os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)

from pgrpo_jax.engines import ray_cluster  # noqa: E402
import ray  # noqa: E402

LABELS = {"tpu-slice-name": "slice-0", "tpu-worker-id": "0", "tpu-topology": "2x2", "tpu-pod-type": "v6e-4", "accelerator-type": "TPU-V6E"}


class Process:
    """Says which chips it was given."""

    def chips(self):
        return ray.get_runtime_context().get_assigned_resources().get("TPU")


def main():
    ray.init(
        address="local", include_dashboard=False, num_cpus=2, resources={"TPU": 4, "TPU-v6e-4-head": 1}, object_store_memory=100 << 20,
        labels={f"ray.io/{name}": value for name, value in LABELS.items()}, log_to_driver=False, logging_level="ERROR",
    )  # fmt: skip
    (strategy,) = ray_cluster.placements("v6e:2x2", 1, timeout_secs=30.0)()
    process = ray.remote(Process).options(num_cpus=0, resources={"TPU": 4}, scheduling_strategy=strategy).remote()
    said = {"chips": ray.get(process.chips.remote(), timeout=30)}
    for text in ("v6e:2x2", "v6e:3x3", "nonsense"):
        try:
            ray_cluster.on_slice(text, timeout_secs=2.0)
        except (TimeoutError, ValueError) as error:
            said[text] = f"{type(error).__name__}: {error}"
    print(json.dumps(said))
    ray.shutdown()


if __name__ == "__main__":
    main()
