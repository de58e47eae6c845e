"""Bytes and stop requests between real processes: all hear the same, in the order of the processes, and who is missing is named."""

import json
import pathlib

import exchange_worker
import jax
import pytest
from processes import run_together

from pgrpo_jax.exchange import CollectiveStop, Exchange
from pgrpo_jax.preemption import Preempted, Stop

NUM_PROCESSES = 3


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What each of three processes was told, and the folder they wrote in."""
    folder = tmp_path_factory.mktemp("exchange")
    run_together(pathlib.Path(exchange_worker.__file__), folder, NUM_PROCESSES)
    return [json.loads((folder / f"out{process}.json").read_text()) for process in range(NUM_PROCESSES)], folder


def test_every_process_gets_the_bytes_of_all_in_order(said):
    outputs, _ = said
    expected = [[exchange_worker.payload(p, size).hex() for p, size in enumerate(sizes)] for sizes in exchange_worker.SIZES]
    assert [output["rounds"] for output in outputs] == [expected] * NUM_PROCESSES
    assert [output["identity"] for output in outputs] == [[p, NUM_PROCESSES] for p in range(NUM_PROCESSES)]


def test_a_flag_of_any_process_is_everybodys(said):
    assert [output["agreed"] for output in said[0]] == [[False, True, True, True]] * NUM_PROCESSES


def test_a_stop_of_one_process_stops_all_in_the_same_phase(said):
    outputs, _ = said
    assert [output["wished"] for output in outputs] == [[p == 1] * 2 for p in range(NUM_PROCESSES)]
    reasons = ["another process was asked", "SIGTERM", "another process was asked"]
    assert [output["stopped"] for output in outputs] == [["", f"stop requested during three ({reason})"] for reason in reasons]


def test_who_does_not_come_is_named(said):
    _, folder = said
    for process in range(NUM_PROCESSES - 1):
        message = (folder / f"late{process}.txt").read_text()
        assert message.startswith("processes 2 of 3 did not come to exchange rollouts (number 1) within 1 s: ")


def test_a_failed_barrier_that_names_nobody_is_quoted(monkeypatch):
    def fail(**kwargs):
        raise jax.errors.JaxRuntimeError("UNAVAILABLE: the coordinator is gone\nmore")

    exchange = Exchange(timeout_secs=2.0)
    monkeypatch.setattr(exchange, "_wait", fail)
    with pytest.raises(TimeoutError, match=r"^processes unknown \(UNAVAILABLE: the coordinator is gone\) of 1 did not come"):
        exchange.gather("rollouts", b"")


def test_one_process_alone_talks_to_itself():
    exchange = Exchange(timeout_secs=1.0)
    assert (exchange.process, exchange.num_processes) == (0, 1)
    assert exchange.gather("rollouts", b"abc") == [b"abc"] and exchange.gather("rollouts", b"") == [b""]
    assert [exchange.agree("flags", flag) for flag in (True, False)] == [True, False]
    stop = Stop()
    both = CollectiveStop(stop, exchange)
    both.check("training")
    stop.requested = True
    with pytest.raises(Preempted, match=r"^stop requested during training \(the program\)$"):
        both.check("training")
