"""Which completion a slot that has ended takes up: the order, slot by slot, against the limits themselves."""

import numpy as np

from pgrpo_jax.generation.slots import Slots

LIMITS = np.array([[9, 3, 7], [2, 8, 8], [5, 1, 6], [4, 9, 2]], np.int32)


def begun(*, blocks, rows_per_block, places):
    """The completions in the order in which they begin; each step ends the slot whose limit is the least."""
    slots = Slots(np.full(4, 5, np.int32), np.arange(4, dtype=np.int32), LIMITS, np.zeros(4, np.int32), blocks=blocks, rows_per_block=rows_per_block, places=places, smallest=1)
    order = []
    for step in range(12):
        before = slots.state.running.copy()
        slots.refill(step)
        order += slots.state.completions[~before & slots.state.running].tolist()
        for row in np.flatnonzero(slots.state.running):
            prompt = slots.table[row // rows_per_block, slots.state.places[row]]
            assert prompt == slots.state.completions[row] // 3 == slots.state.inputs[row]
        row = np.argmin(np.where(slots.state.running, slots.state.limits, 99))
        slots.state.running[row] = False
    assert sorted(order) == list(range(12))
    return order


def test_slots_of_their_own_take_the_longest_of_all_prompts():
    limits = LIMITS.reshape(-1)[begun(blocks=3, rows_per_block=1, places=1)]
    assert limits.tolist() == sorted(LIMITS.reshape(-1).tolist(), reverse=True)


def test_slots_of_a_block_take_the_longest_of_its_prompt_first():
    order = begun(blocks=1, rows_per_block=3, places=2)
    assert order[:3] == [0, 2, 1]  # prompt 0 holds the longest completion and the lowest number
    for prompt in range(4):
        of_prompt = [n for n in order if n // 3 == prompt]
        assert order.index(of_prompt[-1]) - order.index(of_prompt[0]) == 2, "a prompt's completions begin one after the other"
        limits = LIMITS.reshape(-1)[of_prompt].tolist()
        assert limits == sorted(limits, reverse=True)
