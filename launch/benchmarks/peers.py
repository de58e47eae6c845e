"""Peers on the same work: each a driver of ours (launch/peers/NAME_driver.py) in a process and an environment of its own.

A driver answers every line `round SEED` on its standard input with one JSON object in a line; what it prints besides goes to its log.
So everybody takes turns, and meets the same machine.
"""

import contextlib
import json
import pathlib
import select
import subprocess
import sys
from typing import Any, Iterator, Sequence

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_DRIVERS = _ROOT / "launch" / "peers"
REQUIREMENTS = {
    "transformers": ("torch==2.13.0", "transformers==5.23.0"),
    "trl": ("torch==2.13.0", "trl==1.16.0", "transformers==5.23.0"),
}


ROUND_SECS, INSTALL_SECS = 1800.0, 3600.0


class PeerError(RuntimeError):
    """A peer could not be installed, ended early, or took too long."""


class Peer:
    """A running driver.

    Attributes:
        peak_gib: peak memory of its process so far, GiB.
    """

    def __init__(self, name: str):
        environment = _installed(name)
        self._name, self._log, self.peak_gib = name, environment / "log.txt", 0.0
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [environment / "bin" / "python", _DRIVERS / f"{name}_driver.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )

    def round(self, seed: int) -> dict[str, Any]:
        """Lets the peer do the work once.

        Returns:
            What its driver measured, `peak_gib` included.

        Raises:
            PeerError: it ended, its log says why; or it has not answered within `ROUND_SECS`.
        """
        try:
            self._process.stdin.write(f"round {seed}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer, which will not come, says so
        if not select.select([self._process.stdout], [], [], ROUND_SECS)[0]:
            raise PeerError(f"{self._name} has not finished round {seed} within {ROUND_SECS:g} s: read {self._log}")
        line = self._process.stdout.readline()
        if not line:
            raise PeerError(f"{self._name} ended with status {self._process.wait()}: read {self._log}")
        found = json.loads(line)
        self.peak_gib = found["peak_gib"]
        return found

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def started(names: Sequence[str]) -> Iterator[dict[str, Peer]]:
    """Starts drivers and ends them: {name: `Peer`}."""
    running: dict[str, Peer] = {}
    try:
        for name in names:
            running[name] = Peer(name)
        yield running
    finally:
        for peer in running.values():
            peer.close()


def _installed(name: str) -> pathlib.Path:
    """The peer's environment, made at the first call."""
    environment = _ROOT / ".peers" / name
    done = environment / "installed"
    wanted = "\n".join(REQUIREMENTS[name])
    if not done.exists() or done.read_text() != wanted:
        print(f"installing {name} into {environment} (once; minutes)", file=sys.stderr)
        for command in ([sys.executable, "-m", "venv", environment], [environment / "bin" / "pip", "install", "--quiet", *REQUIREMENTS[name]]):
            if subprocess.run(command, timeout=INSTALL_SECS).returncode:
                raise PeerError(f"{name} could not be installed with: {' '.join(map(str, command))}")
        done.write_text(wanted)
    return environment
