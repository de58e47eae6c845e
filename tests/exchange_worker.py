"""One of several processes that talk to each other: `exchange_worker.py FOLDER PORT PROCESS NUM_PROCESSES`. Started by test_exchange.py.

Writes what it was told as JSON; the last process comes too late in the end, and is named by the others.
"""

import json
import pathlib
import sys
import time

import jax

from pgrpo_jax.exchange import CollectiveStop, Exchange
from pgrpo_jax.preemption import Preempted, Stop


def payload(process: int, size: int) -> bytes:
    return bytes((7 * process + i) % 256 for i in range(size))


SIZES = ((0, 0, 0), (1, 0, 3), (5000, 4096, 1), (70000, 3, 4097))  # round by round, bytes of each process


def stopped_in(stop: CollectiveStop, phases: list[str]) -> str:
    try:
        for phase in phases:
            stop.check(phase)
    except Preempted as reason:
        return str(reason)
    return ""


def main(folder: str, port: str, process: int, num_processes: int) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes, process, initialization_timeout=60)
    exchange = Exchange(timeout_secs=60.0)
    said = {"identity": [exchange.process, exchange.num_processes]}
    rounds = [exchange.gather(f"round {i}", payload(process, sizes[process])) for i, sizes in enumerate(SIZES)]
    said["rounds"] = [[part.hex() for part in parts] for parts in rounds]
    said["agreed"] = [exchange.agree("flags", flag == process) for flag in (-1, 0, 1, 2)]
    stop = Stop()
    said["stopped"] = [stopped_in(CollectiveStop(stop, exchange), ["one", "two"])]
    if process == 1:
        stop.reason = "SIGTERM"
    said["wished"] = [stop.requested, CollectiveStop(stop, exchange).requested]
    said["stopped"].append(stopped_in(CollectiveStop(stop, exchange), ["three", "four"]))
    pathlib.Path(folder, f"out{process}.json").write_text(json.dumps(said))
    hasty = Exchange(timeout_secs=1.0)
    if process == num_processes - 1:
        for other in range(process):
            while not pathlib.Path(folder, f"late{other}.txt").exists():
                time.sleep(0.01)
    try:
        hasty.gather("rollouts", b"")
    except TimeoutError as error:
        pathlib.Path(folder, f"late{process}.txt").write_text(str(error))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
