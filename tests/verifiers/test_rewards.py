"""The reward pool against rewards that really hang, crash, lie and kill: named, retried, never a silent 0, and nobody left behind."""

import functools
import os
import re
import signal
import threading

import pytest
import reward_cases as cases
from reward_cases import alive, prompts, read, wait_until

from pgrpo_jax.structs import Prompt, Reward, RewardFailure
from pgrpo_jax.verifiers.rewards import RewardPool

ZERO = Reward(0.0, {"answered": 0.0, "length": 0.0})
NO_VERDICT = [
    ("segfault", "the process was killed by SIGSEGV"),
    ("kill", "the process was killed by SIGKILL"),
    ("exit 0", "the process exited with status 0"),
    ("exit 3", "the process exited with status 3"),
    ("sysexit", r"SystemExit: 3 \(reward_cases.py:\d+\)"),
    ("raise", r"ZeroDivisionError: division by zero \(reward_cases.py:\d+\)"),
    ("total nan", "reward nan is not finite"),
    ("total -inf", "reward -inf is not finite"),
    ("total 1e39", r"reward 1e\+39 is not finite in float32"),
    ("component", "component 'length' nan is not finite"),
    ("missing", "component 'length' is missing"),
    ("unknown", "component 'charm' is not among the task's reward_components .*"),
    ("none", "NoneType returned instead of a Reward"),
]


def pool(fault="", path="", **changes):
    options = {"num_processes": 3, "timeout_secs": 60.0, "on_failure": "zero"} | changes
    return RewardPool(functools.partial(cases.load, fault, str(path)), **options)


@pytest.fixture(scope="module")
def zero():
    made = pool()
    yield made
    made.close()


def judge(of, answers, failed=()):
    return of.judge(prompts(len(answers)), answers, failed)


def lineage(of):
    """(reward process, fork server, process that loaded the task)."""
    ((verdict,), _) = judge(of, ["lineage"])
    return int(verdict.total), int(verdict.components["answered"]), int(verdict.components["length"])


def test_verdicts_come_in_the_order_of_the_answers_and_as_plain_floats(zero):
    verdicts, failures = judge(zero, ["number 0.1", "worth", "late 0.2", "late 0.0", "worth", "number -1e-3"])
    assert [v.total for v in verdicts] == [0.1, 0.125, 0.2, 0.0, 0.5, -0.001] and failures == ()
    assert verdicts[0].components == {"answered": 1.0, "length": 3.0}
    assert list(verdicts[0].components) == ["answered", "length"]
    assert {type(value) for v in verdicts for value in (v.total, *v.components.values())} == {float}
    assert zero.judge([], []) == ([], ())


@pytest.mark.parametrize("answer, reason", NO_VERDICT, ids=[answer for answer, _ in NO_VERDICT])
def test_no_verdict_is_named_and_costs_only_itself(zero, answer, reason):
    verdicts, (failure,) = judge(zero, ["number 0.5", answer, "number 0.25"])
    assert [v.total for v in verdicts] == [0.5, 0.0, 0.25] and verdicts[1] == ZERO
    assert (failure.row, failure.policy) == (1, "zero")
    assert re.fullmatch(reason, failure.reason), failure.reason


def test_a_hang_ends_at_the_deadline(tmp_path):
    made = pool(timeout_secs=1.0, num_processes=4)
    verdicts, failures = judge(made, ["number 0.5", "sleep", "deaf", "spin", f"spawn {tmp_path / 'pids'}", "worth"])
    assert [v.total for v in verdicts] == [0.5, 0.0, 0.0, 0.0, 0.0, 0.625]
    assert failures == tuple(RewardFailure(row, "timeout after 1 s", "zero") for row in (1, 2, 3, 4))
    # Dead, but a fork of it held the connection: found at the deadline, told as it was.
    assert judge(made, ["abandon"])[1] == (RewardFailure(0, "the process exited with status 4", "zero"),)
    assert not any(map(alive, map(int, read(tmp_path / "pids").split())))  # what it started, in a session of its own, went with it
    assert judge(made, ["number 0.5"])[0][0].total == 0.5
    made.close()


@pytest.mark.parametrize("how", ["kill", "raise", "total"])
def test_a_second_attempt_in_a_fresh_process_cures(zero, tmp_path, how):
    known = {verdict.total for verdict in judge(zero, ["lineage"] * 3)[0]}  # all that there are
    assert len(known) == 3
    verdicts, failures = judge(zero, ["number 0.5", f"once {how} {tmp_path / 'seen'}", "worth"])
    assert failures == () and [verdicts[0].total, verdicts[2].total] == [0.5, 0.25]
    assert int(read(tmp_path / "seen")) in known and verdicts[1].total not in known


def test_a_second_attempt_cures_a_hang_and_a_reward_that_kills_the_fork_server(tmp_path):
    made = pool(timeout_secs=2.0, num_processes=2, on_failure="fail")
    server = lineage(made)[1]
    verdicts, failures = judge(made, [f"once {how} {tmp_path / how}" for how in ("sleep", "killserver")] + ["worth"])
    assert failures == () and verdicts[2].total == 0.25 and lineage(made)[1] != server
    assert all(verdict.total != int(read(tmp_path / how)) for verdict, how in zip(verdicts, ("sleep", "killserver")))
    made.close()


def test_fail_names_prompt_answer_reason_and_remedy(tmp_path):
    made = pool(on_failure="fail")
    with pytest.raises(ValueError) as error:
        judge(made, ["number 0.5", "raise " + "x" * 500])
    message = str(error.value)
    assert message.startswith("reward of prompt p1, answer 'raise xxx") and "\n" not in message and len(message) < 600
    assert "…': ZeroDivisionError: division by zero (reward_cases.py:" in message
    remedy = "fix the task's reward, raise rewards.timeout_secs where it is only slow, or set rewards.on_failure to zero or drop"
    assert message.endswith(remedy)
    with pytest.raises(ValueError, match="RuntimeError: at last"):
        judge(made, [f"spawn {tmp_path / 'pids'}", f"await {tmp_path / 'pids'}"])
    assert not any(map(alive, map(int, read(tmp_path / "pids").split())))  # what was under way was given up
    assert judge(made, ["number 0.5"]) == ([Reward(0.5, {"answered": 1.0, "length": 3.0})], ())
    made.close()


def test_drop_leaves_the_place_empty():
    made = pool(on_failure="drop", num_processes=1)
    verdicts, failures = judge(made, ["raise", "number 0.5", "missing"])
    assert [v and v.total for v in verdicts] == [None, 0.5, None]
    assert [(f.row, f.policy) for f in failures] == [(0, "drop"), (2, "drop")]
    made.close()


def test_what_is_on_record_is_repeated_and_not_judged(zero, tmp_path):
    recorded = (RewardFailure(2, "timeout after 9 s", "drop"), RewardFailure(0, "process killed by SIGKILL", "zero"))
    traces = [tmp_path / str(i) for i in range(3)]
    verdicts, failures = judge(zero, [f"log {trace}" for trace in traces] + ["raise"], recorded)
    assert verdicts[0] == ZERO and verdicts[1].total == 0.5 and verdicts[2] is None and verdicts[3] == ZERO
    assert [trace.exists() for trace in traces] == [False, True, False]
    assert failures[:2] == (recorded[1], recorded[0]) and failures[2].row == 3
    again, same = judge(zero, [f"log {trace}" for trace in traces] + ["raise"], failures)
    assert (again, same) == (verdicts, failures)
    with pytest.raises(ValueError, match="on record for answer 2 of a unit of 1: .*delete verdicts.jsonl"):
        judge(zero, ["number 0.5"], recorded)


def test_the_number_of_processes_decides_nothing():
    answers = ["late 0.3", "raise", "number 0.5", "late 0.0", "total nan", "worth", "late 0.1", "missing"] * 2
    made = [pool(num_processes=n) for n in (0, 1, 8)]
    first, *others = [judge(p, answers) for p in made]
    assert len(first[1]) == 6 and all(other == first for other in others)
    for p in made:
        p.close()


def test_in_this_process_the_reward_runs_here_and_failures_go_by_policy():
    made = pool(num_processes=0, on_failure="fail")
    assert lineage(made)[0] == lineage(made)[2] == os.getpid()
    with pytest.raises(ValueError, match="reward of prompt p0, answer 'raise': ZeroDivisionError") as error:
        judge(made, ["raise"])
    assert isinstance(error.value.__cause__, ZeroDivisionError)  # with its traceback
    made.close()
    with pytest.raises(ValueError, match="the reward pool is closed"):
        judge(made, ["number 0.5"])


def test_units_judged_from_several_threads_do_not_mix(zero):
    def ask(i):
        answers = [f"number {i}.{j}" for j in range(20)] + ["exit 3"] * 10
        verdicts, failures = judge(zero, answers)
        got[i] = verdicts[:20] == [Reward(float(a[7:]), {"answered": 1.0, "length": len(a) - 7.0}) for a in answers[:20]]
        got[i] &= failures == tuple(RewardFailure(row, "the process exited with status 3", "zero") for row in range(20, 30))

    got = {}
    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert got == dict.fromkeys(range(4), True)


def test_the_deadline_does_not_count_the_warm_up_and_the_thread_that_made_the_pool_may_end():
    made = []
    thread = threading.Thread(target=lambda: made.append(pool(fault="slow", timeout_secs=1.0, on_failure="fail")))
    thread.start()
    thread.join(60)
    assert judge(made[0], ["number 0.5"])[0][0].total == 0.5
    made[0].close()


def test_a_fork_server_that_is_killed_is_replaced_and_close_leaves_no_process(tmp_path):
    made = pool(num_processes=2, on_failure="fail")
    judge(made, ["late 0.1"] * 2)
    before, server, loaded_in = lineage(made)
    assert server == loaded_in != before
    assert os.getsid(server) == server  # Ctrl-C in a terminal does not reach it
    os.kill(server, signal.SIGKILL)
    wait_until(lambda: not alive(before), "the death of a fork without its server")
    assert [v.total for v in judge(made, ["number 0.5", "worth", "worth"])[0]] == [0.5, 0.125, 0.25]
    process, other, _ = lineage(made)
    assert other != server
    judge(made, [f"orphan {tmp_path / 'pids'}", "fork", "fork"])
    left = list(map(int, read(tmp_path / "pids").split()))[1]
    assert alive(process) and alive(other) and alive(left)
    made.close()
    assert not any(map(alive, (process, other, left)))
    made.close()
    with pytest.raises(ValueError, match="the reward pool is closed"):
        judge(made, ["number 0.5"])


def test_close_while_a_reward_hangs(tmp_path):
    made, raised = pool(), []

    def ask():
        with pytest.raises(ValueError) as error:
            judge(made, [f"latter {tmp_path / 'pid'}"])
        raised.append(str(error.value))  # and no failure of the reward, though it was the second attempt

    thread = threading.Thread(target=ask)
    thread.start()
    process = int(read(tmp_path / "pid.second"))
    made.close()
    thread.join(60)
    assert raised == ["the reward pool is closed: judge before closing it"] and not alive(process)


def test_close_while_the_task_loads(tmp_path):
    made = pool(fault="sleep", path=tmp_path / "pid")
    process, raised = int(read(tmp_path / "pid")), []

    def ask():
        with pytest.raises(ValueError, match="the reward pool is closed"):
            judge(made, ["number 0.5"])
        raised.append(True)

    thread = threading.Thread(target=ask)
    thread.start()
    assert alive(process)
    made.close()
    thread.join(60)
    assert not alive(process) and raised


@pytest.mark.parametrize(
    "changes, bad",
    [({"num_processes": -1}, "num_processes = -1"), ({"timeout_secs": 0.0}, "timeout_secs = 0.0"),
     ({"timeout_secs": float("nan")}, "timeout_secs = nan"), ({"on_failure": "ignore"}, "on_failure = 'ignore'")],
)  # fmt: skip
def test_options_out_of_bounds_are_refused(changes, bad):
    with pytest.raises(ValueError, match=bad):
        pool(**changes)


def test_a_task_that_no_other_process_can_make_is_refused_at_once():
    with pytest.raises(ValueError, match=r"make_task can not be sent to another process .*functools.partial"):
        RewardPool(lambda: None, num_processes=1, timeout_secs=1.0, on_failure="fail")


def test_prompts_and_answers_must_pair(zero):
    with pytest.raises(ValueError):
        zero.judge([Prompt("p", "?", 0, {})], ["number 1", "number 2"])
