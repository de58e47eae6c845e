"""The hold on the process that loads the task once and is forked for each reward process (`reward_process` runs in there).

A fork of it costs milliseconds, where a fresh interpreter costs seconds: so "judge again in a fresh process" is cheap. It starts in the
background, while the model compiles.
"""

import json
from multiprocessing.connection import Connection
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from typing import BinaryIO, NamedTuple

from pgrpo_jax.verifiers.reward_process import FORK, FRAME, receive

_CLOSE_SECS = 10.0
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from pgrpo_jax.verifiers import reward_process; reward_process.main(int(sys.argv[2]), int(sys.argv[3]))"
)
# Reward processes share the machine with the run: no accelerator, and one thread each.
_ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class Fork(NamedTuple):
    """A reward process: the server it was forked from, its id, and the connection to it."""

    server: "ForkServer"
    pid: int
    connection: Connection


class ForkServer:
    """Starts the process; it ends with `close`, or when this process does.

    Args:
        make_task: pickled callable without arguments; its result judges, and must survive a fork.
        start_secs: longest time it may take to load the task, and to answer afterwards.
        call_secs: longest time that writing a call to a reward process, or reading its verdict, may block.
    """

    def __init__(self, make_task: bytes, *, start_secs: float, call_secs: float):
        self._start_secs, self._call_secs = start_secs, call_secs
        self._failure: ValueError | OSError | None = None
        self._process: subprocess.Popen | None = None
        self._components: tuple[str, ...] = ()
        self._interrupted = False
        self._control, theirs = socket.socketpair()
        self._control.settimeout(start_secs)
        # A thread that waits until the task is loaded: the kernel ties the life of a loading process to the thread that started it.
        self._loading = threading.Thread(target=self._start, args=(make_task, theirs), name="reward processes", daemon=True)
        self._loading.start()

    def components(self) -> tuple[str, ...]:
        """Waits until the task is loaded and returns the names of its rewards' components.

        Raises:
            ValueError: the task could not be loaded there.
            TimeoutError: it took longer than `start_secs`.
            ConnectionError: the process ended early.
        """
        self._loading.join()  # every wait of that thread has a deadline
        if self._failure is not None:
            raise self._failure
        return self._components

    def fork(self) -> Fork:
        """Returns a fresh reward process that waits for a call.

        Raises:
            ConnectionError: the fork server is gone.
            TimeoutError: it did not answer in `start_secs`.
        """
        self.components()
        ours, theirs = socket.socketpair()
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", int(self._call_secs) + 1, 0))
        connection = Connection(ours.detach())  # closes itself where one of the next lines raises
        with theirs:
            socket.send_fds(self._control, [FRAME.pack(FORK)], [theirs.fileno()])
            pid = self._answer("fork")
        fork = Fork(self, pid, connection)
        if not connection.poll(self._start_secs):
            self.end(fork)
            raise TimeoutError(f"a new reward process was not ready after {self._start_secs:g} s: the machine is overloaded, free it")
        try:
            connection.recv_bytes()
        except (EOFError, OSError):
            raise ConnectionError(f"a new reward process {ending(self.end(fork))}") from None
        return fork

    def end(self, fork: Fork) -> int:
        """Kills a reward process with everything it started; returns its exit code, the one it died with if it was dead already.

        Raises:
            ConnectionError: the fork server is gone, and its forks with it.
            TimeoutError: it did not answer in `start_secs`.
        """
        with fork.connection:  # closed afterwards: it must not end by itself now
            if self._control.fileno() < 0:
                raise ConnectionError("the fork server is closed")
            self._control.sendall(FRAME.pack(fork.pid))
            return self._answer(f"end of reward process {fork.pid}")

    def _answer(self, what: str) -> int:
        try:
            return FRAME.unpack(receive(self._control, FRAME.size))[0]
        except TimeoutError:
            self.interrupt()  # a late answer must not be taken for that to the next request
            raise TimeoutError(f"no answer to: {what}, within {self._start_secs:g} s: the machine is overloaded, free it") from None

    def interrupt(self) -> None:
        """Cuts the connection, so that the process and its forks end; whoever waits for one of them is told. From any thread."""
        self._interrupted = True
        try:
            self._control.shutdown(socket.SHUT_RDWR)
        except OSError:  # cut already
            pass

    def close(self) -> None:
        """Ends the process, its forks and what they started, and waits for that."""
        self.interrupt()
        self._loading.join()
        self._control.close()
        if self._failure is None:
            self._end_process(after_secs=_CLOSE_SECS)

    def _start(self, make_task: bytes, theirs: socket.socket) -> None:
        """Starts the process and waits until it has loaded the task; what went wrong is left in `_failure`."""
        with tempfile.TemporaryFile() as errors:
            try:
                with theirs:
                    self._process = _popen(theirs, errors)
                self._components = self._load(make_task)
            except TimeoutError:
                self._failure = TimeoutError(
                    f"the reward process did not load the task within {self._start_secs:g} s: look at the disk that holds task.data_dir, "
                    "or judge in this process (rewards.num_processes=0)"
                )
            except ConnectionError:
                code = self._end_process(after_secs=0.0 if self._interrupted else 1.0)
                errors.seek(0)
                said = errors.read().decode(errors="replace").strip().splitlines()[-1:]
                self._failure = ConnectionError(f"the reward process did not load the task, it {': '.join([ending(code), *said])}")
            except (ValueError, OSError) as error:
                self._failure = error
            if self._failure is not None:
                self._end_process(after_secs=0.0)

    def _load(self, make_task: bytes) -> tuple[str, ...]:
        self._control.sendall(FRAME.pack(len(make_task)) + make_task)
        reply = json.loads(receive(self._control, FRAME.unpack(receive(self._control, FRAME.size))[0]))
        if "error" in reply:
            raise ValueError(
                f"the reward process could not load the task: {reply['error']}: what makes the task must be importable by name in another "
                "process; or judge in this one (rewards.num_processes=0)"
            )
        return tuple(reply["components"])

    def _end_process(self, *, after_secs: float) -> int | None:
        if self._process is None:  # it could not be started
            return None
        try:
            return self._process.wait(after_secs)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def _popen(theirs: socket.socket, errors: BinaryIO) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, json.dumps(sys.path), str(theirs.fileno()), str(os.getpid())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        pass_fds=[theirs.fileno()],
        start_new_session=True,  # Ctrl-C in a terminal is for the run
        env={**os.environ, **_ENVIRONMENT},
    )


def ending(code: int) -> str:
    """Returns an exit code in words, for example "was killed by SIGSEGV"."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
