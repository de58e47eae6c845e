"""Contestants on the same work: each a driver (launch/peers/NAME_driver.py, own_driver.py for `OWN`) in a process of its own, peers in an environment of their own too.

A driver answers every line `round SEED` on its standard input with one JSON object in a line; what it prints besides goes to its log.
So everybody takes turns, and meets the same machine. All live side by side until the end: their memory adds up.
"""

import contextlib
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any, Iterator, Mapping, Sequence

from launch.benchmarks.timing import EndedError

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_DRIVERS = _ROOT / "launch" / "peers"
OWN = {  # in our own environment: the function that does the work
    "pgrpo_jax": "ours", "ceiling": "ceiling", "batches": "batches", "halved batches": "halved_batches", "bfloat16": "bfloat16", "int8": "int8",
    "unpacked": "unpacked",
}  # fmt: skip
REQUIREMENTS = {
    "transformers": ("torch==2.13.0", "transformers==5.23.0"),
    "trl": ("torch==2.13.0", "trl==1.16.0", "transformers==5.23.0", "gguf==0.19.0"),
    "tunix": ("google-tunix==0.1.7",),
}
ROUND_SECS, INSTALL_SECS = 1800.0, 3600.0
_REASON_CHARS = 200
_SHARED = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # of an accelerator: the first contestant would take most of its memory
    "PYTHONUNBUFFERED": "1",  # the log of one that is killed is whole
}


class PeerError(RuntimeError):
    """A peer could not be installed."""


class Contestant:
    """A driver, started at its first round, so that nobody else works while it starts.

    Args:
        name: of its driver.
        arguments: of its command line.
        variables: of its environment, on top of ours.

    Attributes:
        peak_gib: peak memory of its process so far, GiB.
        cold_start_secs: from the start of its process to the end of its first round; None before.
    """

    def __init__(self, name: str, arguments: Sequence[str] = (), variables: Mapping[str, str] = {}):
        python, directory = installed(name)
        self._name, self._log, self.peak_gib, self.cold_start_secs = name, directory / "log.txt", 0.0, None
        driver = ["own_driver.py", OWN[name]] if name in OWN else [f"{name}_driver.py"]
        self._line, self._variables = [python, _DRIVERS / driver[0], *driver[1:], *arguments], dict(variables)
        self._process: subprocess.Popen | None = None

    def round(self, seed: int) -> dict[str, Any]:
        """Lets it do the work once.

        Returns:
            What its driver measured, `peak_gib` included.

        Raises:
            EndedError: it ended, its log says why; or it has not answered within `ROUND_SECS`.
        """
        start = time.perf_counter()
        process = self._process = self._process or self._started()
        with contextlib.suppress(BrokenPipeError):  # the answer, which will not come, says so
            process.stdin.write(f"round {seed}\n")
            process.stdin.flush()
        if not select.select([process.stdout], [], [], ROUND_SECS)[0]:
            self.close()
            raise EndedError(f"{self._name} has not finished round {seed} within {ROUND_SECS:g} s: read {self._log}")
        line = process.stdout.readline()
        if not line:
            raise EndedError(f"{self._name} ended {_how(process.wait(timeout=ROUND_SECS))} in round {seed}: read {self._log}{self._last_words()}")
        found = json.loads(line)
        self.peak_gib = found["peak_gib"]
        self.cold_start_secs = self.cold_start_secs or time.perf_counter() - start
        return found

    def _started(self) -> subprocess.Popen:
        with self._log.open("w") as log:
            return subprocess.Popen(
                self._line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env={**_SHARED, **os.environ, **self._variables}
            )

    def _last_words(self) -> str:
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return f" ({lines[-1][:_REASON_CHARS]})" if lines else ""

    def close(self) -> None:
        """Ends it."""
        if self._process:
            self._process.kill()
            self._process.communicate(timeout=ROUND_SECS)


@contextlib.contextmanager
def started(names: Sequence[str], arguments: Sequence[str] = (), variables: Mapping[str, str] = {}) -> Iterator[dict[str, Contestant]]:
    """Installs what is missing, and ends the drivers and deletes their temporary files at the end: {name: `Contestant`}."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        running = {name: Contestant(name, arguments, {"TMPDIR": directory, **variables}) for name in names}
        try:
            yield running
        finally:
            for contestant in running.values():
                contestant.close()


def _how(status: int) -> str:
    """What an exit status means."""
    if status >= 0:
        return f"with status {status}"
    hint = ", as Linux does where memory runs out," if -status == signal.SIGKILL else ""
    return f"by {signal.Signals(-status).name}{hint}"


def installed(name: str) -> tuple[pathlib.Path, pathlib.Path]:
    """Returns the contestant's interpreter, in an environment made at the first call, and the directory of its log.

    Raises:
        PeerError: it could not be installed.
    """
    environment = _ROOT / ".peers" / name
    if name in OWN:
        environment.mkdir(parents=True, exist_ok=True)
        return pathlib.Path(sys.executable), environment
    done = environment / "installed"
    wanted = "\n".join(REQUIREMENTS[name])
    if not done.exists() or done.read_text() != wanted:
        print(f"installing {name} into {environment} (once; minutes)", file=sys.stderr)
        for command in ([sys.executable, "-m", "venv", environment], [environment / "bin" / "pip", "install", "--quiet", *REQUIREMENTS[name]]):
            if subprocess.run(command, timeout=INSTALL_SECS).returncode:
                raise PeerError(f"{name} could not be installed with: {' '.join(map(str, command))}")
        done.write_text(wanted)
    return environment / "bin" / "python", environment
