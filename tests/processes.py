"""Starts the processes of one SPMD program on this machine, for tests."""

import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]


def run_together(script: pathlib.Path, folder, num_processes: int, *, timeout_secs: float = 180.0) -> list[str]:
    """Runs `script FOLDER PORT PROCESS NUM_PROCESSES` in each process and returns what they printed; all must exit 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(script.parent)])}
    commands = [[sys.executable, str(script), str(folder), str(port), str(process), str(num_processes)] for process in range(num_processes)]
    workers = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for command in commands
    ]
    try:
        outputs = [worker.communicate(timeout=timeout_secs)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert [worker.returncode for worker in workers] == [0] * num_processes, "\n".join(outputs)
    return outputs
