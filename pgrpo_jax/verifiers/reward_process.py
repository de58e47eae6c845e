"""What runs in the reward processes: one process that loads the task and is forked from, and its forks, which judge.

Started by `fork_server` as a clean interpreter, not as a fork of a process in which JAX runs. It has no JAX backend, no other thread,
and nothing to say on stdout or stderr. It ignores SIGINT and SIGTERM, which tell the run to save, not its rewards to fail. It ends when
its parent does, whatever the parent died of, and takes along every process that a reward started.

The fork server is asked over a stream socket, in fixed frames: FORK with a descriptor (answered with a pid), or a pid to be ended
(answered with its exit code, negative for a signal). A fork is asked over its own connection: a pickled (prompt, answer) in, a JSON verdict
out, so that nothing a reward made is ever unpickled. A reward runs in the main thread of its process: SIGALRM works there.
"""

import ctypes
import gc
import json
import math
from multiprocessing.connection import Connection
import os
import pathlib
import pickle
import select
import signal
import socket
import struct
import sys
import traceback
from typing import Any, Protocol, Sequence

from pgrpo_jax.structs import Prompt, Reward

FORK = 0
FRAME = struct.Struct("<q")
_PARENT_CHECK_SECS = 2.0
_FLOAT32_MAX = 3.4028234663852886e38
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


class BadVerdict(ValueError):
    """A reward function returned something that can not be trained on."""


class Rewarding(Protocol):
    """The part of a task that a reward process needs.

    Attributes:
        reward_components: names of the components of every verdict.
    """

    reward_components: tuple[str, ...]

    def reward(self, prompt: Prompt, answer: str) -> Reward:
        """Judges an answer."""


def main(descriptor: int, parent: int) -> None:
    """Runs the fork server until its parent closes the connection or dies.

    Args:
        descriptor: of the socket to the parent.
        parent: its process id.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # not SIG_IGN: programs that a reward runs would inherit that
        signal.signal(number, lambda *_: None)
    _die_with(parent)  # by signal while the task is loading, which may hang; afterwards by what `_serve` sees, which cleans up as well
    control = socket.socket(fileno=descriptor)
    try:
        task = pickle.loads(receive(control, FRAME.unpack(receive(control, FRAME.size))[0]))()
        components = tuple(task.reward_components)
        reply = {"components": components}
    except Exception as error:  # of code we do not know; told to the parent
        reply = {"error": describe(error)}
    _prctl(_PR_SET_PDEATHSIG, 0)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    gc.collect()
    gc.freeze()  # forks share these pages for longer
    content = json.dumps(reply).encode()
    control.sendall(FRAME.pack(len(content)) + content)
    if "error" not in reply:
        _serve(control, parent, task, components)


def receive(connection: socket.socket, size: int) -> bytes:
    """Reads exactly `size` bytes.

    Raises:
        ConnectionError: the other end closed before.
        TimeoutError: the socket's timeout passed without a byte.
    """
    content = b""
    while len(content) < size:
        part = connection.recv(size - len(content))
        if not part:
            raise ConnectionError("the other end closed the connection")
        content += part
    return content


def verdict(task: Rewarding, components: Sequence[str], prompt: Prompt, answer: str) -> Reward:
    """Judges an answer and checks the verdict.

    Args:
        task: judges.
        components: names that the verdict's components must have.
        prompt: the prompt answered.
        answer: any text.

    Returns:
        The verdict, of plain floats, components in the order of `components`.

    Raises:
        BadVerdict: the verdict is no `Reward`, a number in it is missing or not finite in float32, or a component is unknown.
        Exception: whatever the reward function raises.
    """
    reward = task.reward(prompt, answer)
    if not isinstance(reward, Reward):
        raise BadVerdict(f"{type(reward).__name__} returned instead of a Reward")
    for name, value in {"reward": reward.total, **{f"component {name!r}": value for name, value in reward.components.items()}}.items():
        if not (math.isfinite(value) and abs(value) <= _FLOAT32_MAX):
            raise BadVerdict(f"{name} {float(value)} is not finite{' in float32' if math.isfinite(value) else ''}")
    if missing := [name for name in components if name not in reward.components]:
        raise BadVerdict(f"component {missing[0]!r} is missing")
    if unknown := [name for name in reward.components if name not in components]:
        raise BadVerdict(f"component {unknown[0]!r} is not among the task's reward_components {tuple(components)}")
    return Reward(total=float(reward.total), components={name: float(reward.components[name]) for name in components})


def describe(error: BaseException) -> str:
    """Returns an error as one line for people, with the place it was raised at; the same in every process."""
    if isinstance(error, BadVerdict):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({pathlib.PurePath(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500] + place


def _serve(control: socket.socket, parent: int, task: Rewarding, components: Sequence[str]) -> None:
    forks: set[int] = set()
    while os.getppid() == parent:
        if not select.select([control], [], [], _PARENT_CHECK_SECS)[0]:
            continue
        frame, descriptors, _, _ = socket.recv_fds(control, FRAME.size, 1)
        if not frame:
            break
        (command,) = FRAME.unpack(frame)
        if command == FORK:
            server, pid = os.getpid(), os.fork()
            if pid == 0:
                control.close()
                _judge(Connection(descriptors[0]), server, task, components)
            os.close(descriptors[0])
            forks.add(pid)
            answer = pid
        else:
            forks.discard(command)
            answer = _end(command)
            _end_orphans(forks)
        control.sendall(FRAME.pack(answer))
    for pid in forks:
        _end(pid)
    _end_orphans(set())


def _end(pid: int) -> int:
    """Kills a fork with its process group and returns its exit code; one that died before keeps the code it died with."""
    for kill in (os.kill, os.killpg):
        try:
            kill(pid, signal.SIGKILL)
        except ProcessLookupError:  # it left its process group, or has not made it yet
            pass
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _end_orphans(forks: set[int]) -> None:
    """Kills what rewards started and nobody waits for any more: as a subreaper this process inherits it (on Linux)."""
    listing = pathlib.Path(f"/proc/self/task/{os.getpid()}/children")
    while listing.exists() and (orphans := set(map(int, listing.read_text().split())) - forks):
        for pid in orphans:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _judge(connection: Connection, server: int, task: Rewarding, components: Sequence[str]) -> None:
    """Answers calls until the connection ends; then, and after anything a reward raised, the process ends."""
    status = 1
    try:
        own = os.getpid()
        os.setpgid(0, 0)
        os.set_inheritable(connection.fileno(), False)
        _die_with(server)
        connection.send_bytes(b"")  # ready: the deadline of a call counts from here
        while call := connection.recv_bytes():
            try:
                reward = verdict(task, components, *pickle.loads(call))
                reply: dict[str, Any] = {"total": reward.total, "components": reward.components}
            except BaseException as error:  # SystemExit, too, is a reward that gave no verdict
                reply = {"error": describe(error)}
            if os.getpid() != own:  # a fork that the reward made and let return: not its turn to answer
                break
            connection.send_bytes(json.dumps(reply).encode())
        status = 0
    except (EOFError, OSError):  # nobody listens any more
        pass
    finally:
        os._exit(status)


def _die_with(parent: int) -> None:
    """Lets the kernel kill this process when the thread that started it ends (on Linux)."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, *map(ctypes.c_ulong, (value, 0, 0, 0)))
