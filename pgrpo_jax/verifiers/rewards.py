"""Judges answers in processes that may hang, crash or be killed without taking the run along; never makes a failure a silent 0.

A reward that raises, gives no finite number, misses a component, outlives its deadline or dies is judged once more in a fresh process. If
that fails too, the policy decides: "fail" ends the run and names prompt, answer and reason; "zero" and "drop" go on and put a
`RewardFailure` on record, which is repeated, not judged again, when the unit of work is made again.
"""

import collections
import json
import math
from multiprocessing.connection import wait
import pickle
import threading
import time
from typing import Callable, NamedTuple, Sequence

from absl import logging

from pgrpo_jax.structs import Prompt, Reward, RewardFailure
from pgrpo_jax.verifiers.fork_server import Fork, ForkServer, ending
from pgrpo_jax.verifiers.reward_process import Rewarding, describe, verdict

POLICIES = ("fail", "zero", "drop")
_SHOWN_CHARS = 200
_WARNINGS = 20  # what fails for good is on record, or ends the run
_KILLED = -9


class _Call(NamedTuple):
    """One answer to judge; `attempt` counts from 1."""

    row: int
    prompt: Prompt
    answer: str
    attempt: int = 1


class _Busy(NamedTuple):
    """A reward process at work on a call, until `deadline` (monotonic seconds)."""

    fork: Fork
    call: _Call
    deadline: float


class RewardPool:
    """Judges the answers of units of work, in any number of processes and with the same result. Safe to use from several threads.

    Args:
        make_task: called without arguments in the process that reward processes are forked from; its result has `reward` and
            `reward_components`. It must be importable there, so no lambda or function of `__main__` (unless num_processes is 0).
        num_processes: answers judged at once. 0 judges in this process and thread, for debugging: no deadline, no second attempt.
        timeout_secs: longest time for one answer, from when a process that is ready has got it.
        on_failure: "fail", "zero" or "drop".
        start_secs: longest time for loading the task, and for starting a process.
    """

    def __init__(
        self, make_task: Callable[[], Rewarding], *, num_processes: int, timeout_secs: float, on_failure: str, start_secs: float = 300.0
    ):
        if num_processes < 0 or not 0 < timeout_secs < math.inf or on_failure not in POLICIES:
            raise ValueError(
                f"num_processes = {num_processes} (at least 0), timeout_secs = {timeout_secs} (above 0, finite), "
                f"on_failure = {on_failure!r} (one of {', '.join(POLICIES)}): stay within the bounds"
            )
        self._make_task, self._num_processes, self._timeout_secs, self._policy = make_task, num_processes, timeout_secs, on_failure
        self._start_secs = start_secs
        self._judging = threading.Lock()  # one unit at a time: its answers are what runs side by side
        self._changing = threading.Lock()  # of _closed and _server
        self._closed = False
        self._task: Rewarding | None = None
        self._idle: list[Fork] = []
        self._server = self._new_server() if num_processes else None  # starts to load now, in the background

    def judge(
        self, prompts: Sequence[Prompt], answers: Sequence[str], failed: Sequence[RewardFailure] = ()
    ) -> tuple[list[Reward | None], tuple[RewardFailure, ...]]:
        """Judges N answers.

        Args:
            prompts: the N prompts answered, one for each answer.
            answers: N texts.
            failed: failures on record: their rows are not judged, but get what was made of them then.

        Returns:
            (N verdicts, failures by row): under "zero" a failed answer's verdict is 0 in total and components, under "drop" None.

        Raises:
            ValueError: a reward failed under "fail"; the task can not be loaded; a failure on record is of no row; the pool is closed.
            ConnectionError: the process that loads the task died.
            TimeoutError: loading or forking took longer than `start_secs`.
        """
        if strangers := [failure.row for failure in failed if not 0 <= failure.row < len(answers)]:
            raise ValueError(
                f"a failed reward is on record for answer {strangers[0]} of a unit of {len(answers)}: the record is of another run; "
                "delete verdicts.jsonl in the run directory"
            )
        with self._judging:
            components = self._components()
            outcomes: dict[int, Reward | RewardFailure] = {failure.row: failure for failure in failed}
            calls = [_Call(row, *pair) for row, pair in enumerate(zip(prompts, answers, strict=True)) if row not in outcomes]
            outcomes |= self._judge_all(calls) if self._num_processes else {call.row: self._judge_here(call) for call in calls}
        nothing = {"zero": Reward(total=0.0, components=dict.fromkeys(components, 0.0)), "drop": None}
        ordered = [outcomes[row] for row in range(len(answers))]
        verdicts = [nothing[o.policy] if isinstance(o, RewardFailure) else o for o in ordered]
        return verdicts, tuple(o for o in ordered if isinstance(o, RewardFailure))

    def close(self) -> None:
        """Ends the processes, also from another thread while one judges (which is told); afterwards none is left."""
        with self._changing:
            self._closed = True
            server = self._server
        if server is not None:
            server.interrupt()
            with self._judging:
                for fork in self._idle:
                    fork.connection.close()
                self._idle.clear()
                self._server.close()

    def _components(self) -> tuple[str, ...]:
        self._check_open()
        if self._num_processes:
            try:
                return self._server.components()
            except ConnectionError:
                self._check_open()  # else it was `close` that ended the process
                raise
        if self._task is None:
            self._task = self._make_task()
        return tuple(self._task.reward_components)

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the reward pool is closed: judge before closing it")

    def _judge_here(self, call: _Call) -> Reward | RewardFailure:
        try:
            return verdict(self._task, tuple(self._task.reward_components), call.prompt, call.answer)
        except Exception as error:  # a reward function may raise anything; the policy decides, with the reason named
            return self._given_up(call, describe(error), cause=error)

    def _judge_all(self, calls: Sequence[_Call]) -> dict[int, Reward | RewardFailure]:
        """Returns {row: outcome}. What is under way when this raises is given up with its processes."""
        queue, busy, outcomes = collections.deque(calls), [], {}
        try:
            while queue or busy:
                while queue and len(busy) < self._num_processes:
                    busy.append(self._send(self._idle.pop() if self._idle else self._fork(), queue.popleft()))
                left = min(b.deadline for b in busy) - time.monotonic()
                ready = wait([b.fork.connection for b in busy], max(0.0, left))
                now = time.monotonic()
                for b in [b for b in busy if b.fork.connection in ready or now >= b.deadline]:
                    outcome = self._read(b) if b.fork.connection in ready else f"timeout after {self._timeout_secs:g} s"
                    busy.remove(b)
                    if isinstance(outcome, Reward):
                        outcomes[b.call.row] = outcome
                        self._idle.append(b.fork)
                        continue
                    reason = self._end(b.fork, outcome)
                    self._check_open()  # else it was `close` that ended the process
                    if b.call.attempt == 1:
                        busy.append(self._again(b.call, reason))
                    else:
                        outcomes[b.call.row] = self._given_up(b.call, reason)
        finally:
            for b in busy:
                self._end(b.fork, "")
        return outcomes

    def _send(self, fork: Fork, call: _Call) -> _Busy:
        try:
            fork.connection.send_bytes(pickle.dumps((call.prompt, call.answer)))
            return _Busy(fork, call, time.monotonic() + self._timeout_secs)
        except OSError:  # dead, or deaf for as long as a call may take: seen as such at once
            return _Busy(fork, call, time.monotonic())

    def _read(self, busy: _Busy) -> Reward | str:
        """Returns the verdict, or why there is none; "" where the process is gone."""
        try:
            reply = json.loads(busy.fork.connection.recv_bytes())
        except BlockingIOError:  # it stopped in the middle of its verdict
            return f"timeout after {self._timeout_secs:g} s"
        except (EOFError, OSError):
            return ""
        return reply["error"] if "error" in reply else Reward(total=reply["total"], components=reply["components"])

    def _again(self, call: _Call, reason: str) -> _Busy:
        logging.log_first_n(logging.WARNING, "reward of %s: %s; judged again in a fresh process", _WARNINGS, _name(call), reason)
        return self._send(self._fork(), call._replace(attempt=2))

    def _end(self, fork: Fork, reason: str) -> str:
        """Ends a process and returns the reason, the way it died where that says more."""
        try:
            code = fork.server.end(fork)
        except ConnectionError:
            return reason or "the process is gone, with the one it was forked from"
        return reason if reason and code == _KILLED else f"the process {ending(code)}"

    def _fork(self) -> Fork:
        self._check_open()
        try:
            return self._server.fork()
        except ConnectionError as error:  # something killed the fork server: its forks are gone with it
            logging.warning("the process that reward processes are forked from is gone (%s); starting another", error)
            self._idle.clear()
            with self._changing:
                self._check_open()
                self._server.close()
                self._server = self._new_server()
            return self._server.fork()

    def _new_server(self) -> ForkServer:
        try:
            make_task = pickle.dumps(self._make_task)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"make_task can not be sent to another process ({error}): give a function of a module, or a functools.partial of one"
            ) from error
        return ForkServer(make_task, start_secs=self._start_secs, call_secs=self._timeout_secs)

    def _given_up(self, call: _Call, reason: str, *, cause: Exception | None = None) -> RewardFailure:
        if self._policy != "fail":
            return RewardFailure(row=call.row, reason=reason, policy=self._policy)
        raise ValueError(
            f"reward of {_name(call)}: {reason}: fix the task's reward, raise rewards.timeout_secs where it is only slow, "
            "or set rewards.on_failure to zero or drop"
        ) from cause


def _name(call: _Call) -> str:
    answer = call.answer if len(call.answer) <= _SHOWN_CHARS else call.answer[:_SHOWN_CHARS] + "…"
    return f"prompt {call.prompt.prompt_id}, answer {answer!r}"
