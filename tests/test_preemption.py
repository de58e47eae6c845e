"""Real signals to this process."""

import os
import signal
import subprocess
import sys

import pytest

from pgrpo_jax.preemption import EXIT_PREEMPTED, Preempted, Stop


@pytest.fixture
def handlers():
    """Puts back what a test installs."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def send(number):
    os.kill(os.getpid(), number)


def test_nothing_is_asked_for_at_first():
    stop = Stop()
    stop.check("training")
    assert not stop.requested and EXIT_PREEMPTED == 75


def test_sigterm_asks_once_and_names_the_phase(handlers):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    stop = Stop().install()
    send(signal.SIGTERM)
    send(signal.SIGTERM)  # who asks twice changes nothing
    assert stop.requested
    with pytest.raises(Preempted, match="^stop requested during evaluation$"):
        stop.check("evaluation")


@pytest.mark.parametrize("ignored", [signal.SIG_IGN, signal.SIG_DFL])
def test_no_handler_before_is_no_problem(handlers, ignored):
    signal.signal(signal.SIGTERM, ignored)
    stop = Stop().install()
    send(signal.SIGTERM)
    assert stop.requested


def test_an_earlier_handler_is_called_each_time(handlers):
    calls = []
    signal.signal(signal.SIGTERM, lambda number, frame: calls.append((number, frame is not None)))
    first = Stop().install()
    second = Stop().install()
    send(signal.SIGTERM)
    assert first.requested and second.requested and calls == [(signal.SIGTERM, True)]
    send(signal.SIGTERM)
    assert len(calls) == 2


def test_the_first_interrupt_asks_and_the_second_interrupts(handlers):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stop = Stop().install()
    send(signal.SIGINT)
    assert stop.requested
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)


def test_importing_it_is_cheap_enough_to_come_first():
    listing = "import sys; import pgrpo_jax.preemption; print(*{'jax', 'numpy', 'flax', 'orbax'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
