"""Kills what a local Ray cluster leaves behind when its driver is killed: python ray_reaper.py MARKER DIRECTORY, its stdin a pipe to the driver.

When the driver dies, however it dies, the pipe closes; every process that inherited the marker in its environment is then killed, and the
cluster's directory removed. Ray's own agents would linger for a minute or two, and their sockets and logs for ever. Standard library only.
"""

import os
import pathlib
import shutil
import signal
import sys
import time

VARIABLE = "PGRPO_JAX_CLUSTER"
_KILL_SECS = 10.0


def marked(marker: str) -> list[int]:
    """Returns the ids of the processes whose environment carries the marker, this one and the dead left out."""
    found, wanted = [], f"{VARIABLE}={marker}".encode()
    for process in pathlib.Path("/proc").iterdir():
        try:
            if process.name.isdigit() and int(process.name) != os.getpid() and wanted in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
        except (OSError, ValueError):  # gone meanwhile, or somebody else's
            continue
    return found


def reap(marker: str, directory: str) -> None:
    """Kills the marked processes until none is left, and removes the directory.

    Args:
        marker: value of the environment variable `VARIABLE`.
        directory: the cluster's temporary directory.
    """
    deadline = time.monotonic() + _KILL_SECS
    while (processes := marked(marker)) and time.monotonic() < deadline:
        for process in processes:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)
    shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the driver, which decides when this ends
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    reap(sys.argv[1], sys.argv[2])
