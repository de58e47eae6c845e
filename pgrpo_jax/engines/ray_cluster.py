"""The Ray cluster a run lives in: a local one of its own that leaves nothing behind, or an existing one by address.

Ray authenticates by token (Ray >= 2.52): whoever can reach its ports without one can run nothing. A local cluster draws its own token; an
existing one is joined with the user's (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token). Records travel between the processes of
one cluster only, so the cluster is the trust boundary.
"""

import concurrent.futures
import logging
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
from typing import Any, Callable, Sequence

import numpy as np
import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from ray.util.tpu import SlicePlacementGroup

from pgrpo_jax.engines import ray_reaper
from pgrpo_jax.parameter_server import BlobsLost

_LOCAL_CPUS = 4  # logical ones, for Ray's own bookkeeping: roles reserve none where the cluster is our own
_CONNECT_SECS = 20.0


class Cluster:
    """A connection to Ray, held by the driver.

    Args:
        address: "" starts a local cluster, which ends with this process, however it ends; "auto" or "host:port" joins an existing one.
        object_store_bytes: size of a local cluster's shared memory; 0 = Ray's choice (30 % of the memory).

    Attributes:
        is_local: the cluster is this process's own.
        directory: where a local cluster keeps its sockets and logs.

    Raises:
        ConnectionError: no cluster answers at the address, or it refuses the token.
    """

    def __init__(self, address: str = "", *, object_store_bytes: int = 0):
        self.is_local = not address
        self._reaper, self._joined = None, False
        self.directory: str | None = None
        if self.is_local:
            marker = secrets.token_hex(16)
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # stays: Ray keeps the first one it reads
            self.directory = tempfile.mkdtemp(prefix="pgrpo-ray-")  # short: the names of its sockets have a limit of 107 bytes
            self._reaper = subprocess.Popen(
                [sys.executable, ray_reaper.__file__, marker, self.directory], stdin=subprocess.PIPE, start_new_session=True
            )
            os.environ[ray_reaper.VARIABLE] = marker  # inherited by all that Ray starts
        # In a thread, where Ray can not replace the handler of SIGTERM: its own would end a preempted run without a save. The thread
        # lives as long as the cluster: Ray has asked the kernel to kill its processes when the thread that started them ends.
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "ray.init")
        self._thread.submit(self._connect, address, object_store_bytes).result()

    def _connect(self, address: str, object_store_bytes: int) -> None:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
        if self.is_local:
            options |= {"include_dashboard": False, "num_cpus": _LOCAL_CPUS, "_temp_dir": self.directory}
            options |= {"object_store_memory": object_store_bytes} if object_store_bytes else {}
        try:
            if ":" in address:  # Ray itself would try for a quarter of an hour
                host, _, port = address.rpartition(":")
                socket.create_connection((host, int(port)), timeout=_CONNECT_SECS).close()
            logging.getLogger("ray").setLevel(logging.ERROR)  # it would remark on the thread
            ray.init(address=address or "local", **options)
            self._joined = True
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            self.close()
            reason = " ".join(str(error).split())[:300]
            where = f"at ray.address = {address!r}" if address else "on this machine"
            remedy = "start it (ray start --head) and give its token in RAY_AUTH_TOKEN" if address else "look at memory, disk and /dev/shm"
            raise ConnectionError(f"no Ray cluster {where} ({reason}): {remedy}") from error

    def close(self) -> None:
        """Disconnects; a local cluster ends, with every process and file of it."""
        if self._joined:  # else Ray may be another's
            ray.shutdown()
            self._joined = False
        self._thread.shutdown(wait=False)
        if self._reaper is not None:
            del os.environ[ray_reaper.VARIABLE]
            self._reaper.stdin.close()
            self._reaper.wait(timeout=60)
            self._reaper = None


class RayBlobStore:
    """Blobs in Ray's object store: shared memory, one copy a node; a blob lives until its last handle is gone."""

    def put(self, array: np.ndarray) -> ray.ObjectRef:
        """Copies an array into the store of this node and returns its handle."""
        return ray.put(array)

    def get(self, handles: Sequence[ray.ObjectRef], timeout_secs: float) -> list[np.ndarray]:
        """Returns read-only arrays over this node's shared memory, fetched from other nodes where they are not here yet.

        Raises:
            TimeoutError: not all arrived in time.
            BlobsLost: the process that put them, or the node that held them, is gone.
        """
        try:
            return ray.get(list(handles), timeout=timeout_secs)
        except ray.exceptions.ObjectLostError as error:
            raise BlobsLost(f"a blob is lost ({type(error).__name__}): its learner process is gone; publish again") from error

    def delete(self, handles: Sequence[ray.ObjectRef]) -> None:
        """Does nothing: Ray counts the handles, and the caller lets go of his."""
        del handles


def free_address() -> str:
    """Returns "host:port" of this node with a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"


def resources(text: str) -> dict[str, float]:
    """Parses what a process reserves on its node, for example "TPU=4,CPU=8"; "" reserves nothing.

    Raises:
        ValueError: an entry is not NAME=NUMBER.
    """
    found = {}
    for entry in filter(None, text.split(",")):
        match = re.fullmatch(r"\s*(\w[\w.:-]*)=(\d+(?:\.\d+)?)\s*", entry)
        if match is None:
            raise ValueError(f"resource {entry!r} is not NAME=NUMBER: write, for example, TPU=4,CPU=8")
        found[match[1]] = float(match[2])
    return found


def placements(text: str, size: int, *, timeout_secs: float) -> Callable[[], list[str | PlacementGroupSchedulingStrategy]]:
    """Returns what chooses the nodes of `size` processes, anew whenever they are started anew.

    Args:
        text: a whole TPU slice to reserve for them, see `on_slice`; "" spreads them over the nodes.
        size: processes.
        timeout_secs: longest wait for a slice.
    """
    if not text:
        return lambda: ["SPREAD"] * size

    def place() -> list[str | PlacementGroupSchedulingStrategy]:
        hosts = on_slice(text, timeout_secs=timeout_secs)
        if len(hosts) != size:
            raise ValueError(f"TPU slice {text!r} has {len(hosts)} hosts for {size} processes: name a slice of {size} hosts")
        return hosts

    return place


def on_slice(text: str, *, timeout_secs: float) -> list[PlacementGroupSchedulingStrategy]:
    """Reserves a whole TPU slice and returns where its hosts' processes go, in the order of the hosts.

    Args:
        text: "VERSION:TOPOLOGY", for example "v6e:4x4"; the slice's nodes must be in the cluster, or come with its autoscaler.
        timeout_secs: longest wait for them.

    Raises:
        ValueError: the text does not name a slice.
        TimeoutError: there is no such slice in time.
    """
    version, _, topology = text.partition(":")
    try:
        reserved = SlicePlacementGroup(topology=topology, accelerator_version=version, head_reservation_timeout_s=timeout_secs)
        ray.get(reserved.slice_placement_group.ready(), timeout=timeout_secs)
    except (ray.exceptions.GetTimeoutError, TimeoutError) as error:
        raise TimeoutError(f"no free TPU slice {text!r} within {timeout_secs:.0f} s: look at the cluster (ray status)") from error
    except (ValueError, KeyError) as error:
        raise ValueError(f"{text!r} is no TPU slice ({error}): write VERSION:TOPOLOGY, for example v6e:4x4") from error
    hosts = reserved.slice_placement_group
    return [PlacementGroupSchedulingStrategy(hosts, placement_group_bundle_index=host) for host in range(reserved.num_hosts)]
