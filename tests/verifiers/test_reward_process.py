"""What a reward process makes of a verdict and of an error, and how it reads its frames."""

import socket
import threading

import numpy as np
import pytest
from reward_cases import Misbehaving, prompts

from pgrpo_jax.structs import Reward
from pgrpo_jax.verifiers.reward_process import BadVerdict, describe, receive, verdict

NAMES = ("answered", "length")
LARGEST = float(np.finfo(np.float32).max)


def judged(answer):
    return verdict(Misbehaving(), NAMES, prompts(1)[0], answer)


def test_a_verdict_is_plain_numbers_in_the_order_of_the_names():
    made = judged("number 0.25")
    assert made == Reward(0.25, {"answered": 1.0, "length": 4.0}) and list(made.components) == list(NAMES)
    assert {type(value) for value in (made.total, *made.components.values())} == {float}


@pytest.mark.parametrize("total, holds", [(LARGEST, True), (-LARGEST, True), (LARGEST * 1.0001, False), (float("inf"), False)])
def test_a_number_must_be_finite_as_it_is_stored(total, holds):
    if holds:
        assert judged(f"total {total!r}").total == total
    else:
        with pytest.raises(BadVerdict, match="is not finite"):
            judged(f"total {total!r}")


def test_an_error_is_one_line_with_its_place_and_not_endless():
    def fail():
        raise RuntimeError("first\nsecond " + "x" * 9999)

    with pytest.raises(RuntimeError) as error:
        fail()
    said = describe(error.value)
    assert said.startswith("RuntimeError: first second xxx") and "\n" not in said and len(said) < 560
    assert said.endswith(f"(test_reward_process.py:{fail.__code__.co_firstlineno + 1})")
    assert describe(BadVerdict("reward nan is not finite")) == "reward nan is not finite"
    assert describe(KeyError("a")) == "KeyError: 'a'"  # never raised: no place


def test_a_frame_that_comes_in_pieces_is_whole_and_a_cut_one_an_error():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        writer = threading.Thread(target=lambda: [theirs.sendall(b"abc"), theirs.sendall(b"defg"), theirs.shutdown(socket.SHUT_WR)])
        writer.start()
        assert receive(ours, 5) == b"abcde"
        with pytest.raises(ConnectionError, match="closed the connection"):
            receive(ours, 3)
        writer.join(60)
