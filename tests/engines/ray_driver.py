"""A driver process for tests: starts a local cluster, says what it made, and ends as it is told.

    ray_driver.py return | hang      with a busy process in it, ends at once or never
    ray_driver.py hold               ends when its standard input does; others may join meanwhile
"""

import json
import os
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import ray  # noqa: E402

from pgrpo_jax.engines import ray_reaper  # noqa: E402
from pgrpo_jax.engines.ray_cluster import Cluster  # noqa: E402


class Busy:
    """A process with a child of its own, as a pool of reward processes would be."""

    def work(self):
        import subprocess

        child = subprocess.Popen(["sleep", "600"])
        return os.getpid(), child.pid, ray.put(b"x" * (4 << 20))


def main():
    cluster = Cluster(object_store_bytes=400 << 20)
    if sys.argv[1] == "hold":
        print(json.dumps({"address": ray.get_runtime_context().gcs_address}), flush=True)
        sys.stdin.read()
        return cluster.close()
    busy = ray.remote(Busy).remote()
    pids = ray.get(busy.work.remote())[:2]
    print(json.dumps({"marker": os.environ[ray_reaper.VARIABLE], "directory": cluster.directory, "pids": pids}), flush=True)
    if sys.argv[1] == "hang":
        time.sleep(600)
    return cluster.close()


if __name__ == "__main__":
    main()
