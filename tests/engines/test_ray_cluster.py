"""A local cluster leaves nothing behind, however its driver ends; what cannot be joined is refused by name."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from pgrpo_jax.engines import ray_cluster, ray_reaper

DRIVER = pathlib.Path(__file__).parent / "ray_driver.py"
SECS = 60


def shared_memory():
    return set(os.listdir("/dev/shm"))


def gone(made, deadline_secs):
    """Waits until no process carries the marker, those known by number are gone and the directory is; what is left of them otherwise."""
    deadline = time.monotonic() + deadline_secs
    while True:
        left = ray_reaper.marked(made["marker"]) + [pid for pid in made["pids"] if pathlib.Path(f"/proc/{pid}").exists()]
        left += [made["directory"]] if pathlib.Path(made["directory"]).exists() else []
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


def listening(pids):
    """Ports that any of the processes listens on."""
    lines = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True, check=False).stdout.splitlines()
    return [line for line in lines if any(f"pid={pid}," in line for pid in pids)]


@pytest.mark.parametrize("ending", ["return", "SIGKILL", "SIGTERM"])
def test_nothing_is_left_behind(ending):
    before = shared_memory()
    what = "return" if ending == "return" else "hang"
    driver = subprocess.Popen([sys.executable, str(DRIVER), what], stdout=subprocess.PIPE, text=True)
    try:
        made = json.loads(driver.stdout.readline())
        running = ray_reaper.marked(made["marker"])
        if what == "hang":
            assert set(made["pids"]) <= set(running), "the marker reaches processes of processes"
            driver.send_signal(getattr(signal, ending))
        status = driver.wait(timeout=SECS)
    finally:
        driver.kill()
        driver.wait()
        driver.stdout.close()
    assert status == {"return": 0, "SIGKILL": -signal.SIGKILL, "SIGTERM": -signal.SIGTERM}[ending]
    assert gone(made, SECS) == []
    assert listening(running) == []
    assert shared_memory() == before


def test_an_address_where_nobody_answers():
    with pytest.raises(ConnectionError, match=r"^no Ray cluster at ray.address = '127.0.0.1:1' .*: start it \(ray start --head\) and give its"):
        ray_cluster.Cluster("127.0.0.1:1")
    assert os.environ["RAY_AUTH_MODE"] == "token"


@pytest.mark.parametrize("text, found", [("", {}), ("TPU=4", {"TPU": 4.0}), ("TPU=4,CPU=0.5", {"TPU": 4.0, "CPU": 0.5})])
def test_resources(text, found):
    assert ray_cluster.resources(text) == found


@pytest.mark.parametrize("text", ["TPU", "TPU=four", "=1"])
def test_resources_that_are_none(text):
    with pytest.raises(ValueError, match=r"^resource .* is not NAME=NUMBER: write, for example, TPU=4,CPU=8$"):
        ray_cluster.resources(text)


def test_a_whole_tpu_slice_is_reserved_once():
    done = subprocess.run([sys.executable, str(DRIVER.parent / "slice_program.py")], capture_output=True, text=True, timeout=SECS, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["chips"] == 4.0
    assert said["v6e:2x2"] == "TimeoutError: no free TPU slice 'v6e:2x2' within 2 s: look at the cluster (ray status)"  # it is taken
    assert said["v6e:3x3"].startswith("ValueError: 'v6e:3x3' is no TPU slice (") and said["v6e:3x3"].endswith("for example v6e:4x4")
    assert said["nonsense"].startswith("ValueError: 'nonsense' is no TPU slice (")
