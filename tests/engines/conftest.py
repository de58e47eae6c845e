"""One Ray cluster for all tests, in a process of its own: Ray forks, which a process that uses JAX must not."""

import json
import os
import pathlib
import secrets
import subprocess
import sys

import pytest

os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # before Ray is imported: the cluster's process inherits it

from pgrpo_jax.engines.ray_cluster import Cluster  # noqa: E402

DRIVER = pathlib.Path(__file__).parent / "ray_driver.py"


@pytest.fixture(scope="session")
def cluster():
    """This process's connection to the cluster."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(DRIVER.parent)}
    line = [sys.executable, str(DRIVER), "hold"]
    holder = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        made = json.loads(holder.stdout.readline())
        connection = Cluster(made["address"])
        yield connection
        connection.close()
    finally:
        holder.stdin.close()
        holder.wait(timeout=60)
        holder.stdout.close()
