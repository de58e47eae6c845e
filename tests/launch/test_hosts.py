"""Several hosts for real: three network namespaces with addresses of their own on this machine, one of which is cut off and comes back.

Head and learner on the first, an actor on each of the others. Needs root and iproute2; the traffic stays between the namespaces.
"""

import contextlib
import os
import pathlib
import secrets
import shutil
import signal
import subprocess
import sys
import time

import program
import pytest
import test_ray_runs as runs

HOSTS = 3
SUBNET = "10.213.77"
HEAD = f"{SUBNET}.1:6399"
RAY = pathlib.Path(sys.executable).parent / "ray"
STEPS = {"num_steps": 1200, "checkpoint__save_every": 50}
SECS = 120
# How fast a host is taken for dead, and takes itself for cut off: a test must not wait for the minutes that suit a data centre.
QUICK = {
    "RAY_health_check_initial_delay_ms": "1000", "RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3", "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
    "RAY_grpc_client_keepalive_time_ms": "2000", "RAY_grpc_client_keepalive_timeout_ms": "3000",
}  # fmt: skip

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(os.getuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and iproute2"),
]


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def host(i):
    return f"pgrpo{i}"


def inside(i, line):
    return ["ip", "netns", "exec", host(i), *map(str, line)]


def processes(i):
    """{pid: command line} of everything that runs on a host."""
    pids = subprocess.run(["ip", "netns", "pids", host(i)], capture_output=True, text=True, check=False).stdout.split()
    found = {}
    for pid in map(int, pids):
        with contextlib.suppress(OSError):
            found[pid] = pathlib.Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    return found


def working(i):
    """CPU ticks of the actor process on a host, by pid."""
    ticks = {}
    for pid, line in processes(i).items():
        if line.startswith("ray::ActorProcess"):
            with contextlib.suppress(OSError):
                fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks[pid] = int(fields[11]) + int(fields[12])
    return ticks


def wait(what, happened, driver, log):
    deadline = time.monotonic() + SECS
    while not (found := happened()):
        assert driver.poll() is None, f"the run ended before {what}: {log.read_text()}"
        assert time.monotonic() < deadline, f"waited {SECS} s for {what}"
        time.sleep(0.1)
    return found


@pytest.fixture
def hosts():
    """Namespaces on one bridge that lives in a namespace of its own, so that nothing of this machine's network is touched."""
    try:
        ip("netns", "add", "pgrpo-switch")
        ip("-n", "pgrpo-switch", "link", "add", "bridge", "type", "bridge")
        ip("-n", "pgrpo-switch", "link", "set", "bridge", "up")
        for i in range(HOSTS):
            ip("netns", "add", host(i))
            ip("-n", "pgrpo-switch", "link", "add", f"port{i}", "type", "veth", "peer", "name", "eth0", "netns", host(i))
            ip("-n", "pgrpo-switch", "link", "set", f"port{i}", "master", "bridge", "up")
            ip("-n", host(i), "addr", "add", f"{SUBNET}.{i + 1}/24", "dev", "eth0")
            ip("-n", host(i), "link", "set", "eth0", "up")
            ip("-n", host(i), "link", "set", "lo", "up")
        yield
    finally:
        for i in range(HOSTS):
            runs.kill(processes(i))
        time.sleep(0.5)
        for name in [*map(host, range(HOSTS)), "pgrpo-switch"]:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.fixture
def environment(cache, tmp_path, monkeypatch):
    for name, value in {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_TMPDIR": f"/tmp/r{os.getpid()}"}.items():
        monkeypatch.setenv(name, value)
    for name, value in QUICK.items():
        monkeypatch.setenv(name, value)
    yield program.environment(cache) | {"PYTHONPATH": str(program.ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    shutil.rmtree(f"/tmp/r{os.getpid()}", ignore_errors=True)


def start_node(i, environment):
    """A host's launch loop: a node that exits is started afresh, as a preemptible machine's would be."""
    role = "--head --port=6399 --include-dashboard=false --resources='{\"learner\":1}'" if i == 0 else f"--address={HEAD} --resources='{{\"actor\":1}}'"
    command = f"{RAY} start {role} --node-ip-address={SUBNET}.{i + 1} --num-cpus=2 --object-store-memory=200000000 --block"
    loop = f"while true; do {command}; sleep 1; done"
    return subprocess.Popen(
        inside(i, ["bash", "-c", loop]), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def test_three_hosts_one_is_cut_off_and_comes_back(hosts, environment, cache, tmp_path):
    reference, workdir, log = tmp_path / "inline", tmp_path / "run", tmp_path / "log.txt"
    done = program.run(program.command(reference, **STEPS, **runs.staleness(1, 2)), cache=cache)
    assert (done.returncode, done.stderr) == (0, "")
    nodes = [start_node(0, environment)]
    time.sleep(6)
    nodes += [start_node(i, environment) for i in range(1, HOSTS)]
    changes = {"engine": "ray", "ray__address": HEAD, "num_actors": 2}
    changes |= {"ray__learner_resources": "learner=1", "ray__actor_resources": "actor=1"}
    line = inside(0, program.command(workdir, **STEPS, **changes, **runs.staleness(1, 2)))
    with log.open("w") as output:  # a pipe that nobody reads would fill, and hold the driver up
        driver = subprocess.Popen(line, cwd=program.ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait("an actor on each host", lambda: working(1) and working(2) and runs.steps_done(workdir) >= 10, driver, log)
        before = set(working(2))
        cut = runs.steps_done(workdir)
        ip("-n", "pgrpo-switch", "link", "set", "port2", "down")
        wait("the node that is cut off to exit", lambda: not before & set(working(2)), driver, log)
        wait("the run to go on without it", lambda: runs.steps_done(workdir) >= cut + 5, driver, log)
        ip("-n", "pgrpo-switch", "link", "set", "port2", "up")
        fresh = wait("a fresh actor on it", lambda: working(2), driver, log)
        wait("it to work", lambda: any(ticks > fresh.get(pid, ticks) + 20 for pid, ticks in working(2).items()), driver, log)
        driver.wait(timeout=program.TIMEOUT_SECS)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        for node in nodes:
            os.killpg(node.pid, signal.SIGKILL)
            node.wait()
    assert driver.returncode == 0, log.read_text()
    assert program.summary(workdir)["state_sha256"] == program.summary(reference)["state_sha256"]
