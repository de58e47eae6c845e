"""Packing: every token once, in order, in its own prompt's rows; against first fit by hand."""

import learner_cases as cases
import numpy as np
import pytest

from pgrpo_jax import batching, packing
from pgrpo_jax.buckets import packed_rows


def first_fit(lengths: np.ndarray, width: int) -> list[list[list[int]]]:
    """The rows of each prompt, each a list of its tokens' codes: longest first, of equal ones the first."""
    found = []
    for of_prompt in lengths.tolist():
        rows = []
        for g in sorted(range(len(of_prompt)), key=lambda g: -of_prompt[g]):
            tokens = [g * width + t for t in range(of_prompt[g])]
            row = next((row for row in rows if len(row) + len(tokens) <= 2 * width), None)
            if row is None and tokens:
                rows.append(tokens)
            elif tokens:
                row.extend(tokens)
        found.append(rows)
    return found


@pytest.mark.parametrize("seed", range(20))
def test_equals_first_fit_by_hand(seed):
    rng = np.random.default_rng(seed)
    num_prompts, per_prompt, width = rng.integers(1, 6), rng.integers(2, 20), int(rng.integers(1, 30))
    lengths = rng.integers(0, width + 1, (num_prompts, per_prompt)) // rng.integers(1, 5, (num_prompts, 1))
    expected, found = first_fit(lengths, width), packing.pack(lengths, width)
    most = max(map(len, expected))
    rows = min(count for count in packed_rows(-(-per_prompt // 2)) if count >= most)
    if found is None:
        assert 2 * rows >= per_prompt
        return
    assert found.dtype == np.int32 and found.shape == (num_prompts, rows, 2 * width) and 2 * rows < per_prompt
    for prompt, rows in zip(found.tolist(), expected):
        for row, tokens in zip(prompt, rows + [[]] * len(prompt)):
            assert row == tokens + [-1] * (2 * width - len(tokens))


@pytest.mark.parametrize(
    "lengths, rows",
    [
        ([[4, 4, 4, 4, 4, 4, 4, 4]], None),  # full: nothing to save
        ([[4, 4, 4, 4, 4, 4, 2, 2]], None),  # seven rows of four, but they are eight long
        ([[3, 3, 3, 3, 3, 3, 3, 3]], None),
        ([[3, 3, 3, 3, 2, 2, 2, 2]], 3),
        ([[2, 2, 2, 2, 2, 2, 2, 2]], 2),
        ([[2, 2, 2, 2, 2, 2, 2, 2], [4, 4, 4, 4, 4, 0, 0, 0]], 3),  # every prompt has as many as that of the most
        ([[0, 0, 0, 0, 0, 0, 0, 0]], 1),
        ([[1, 0, 0, 0, 0, 0, 0, 0]], 1),
        ([[4, 4]], None), ([[1, 1]], None), ([[4, 4, 0]], 1), ([[4, 4, 1]], None),
    ],
)  # fmt: skip
def test_rows_hold_two_completions_of_four_tokens(lengths, rows):
    found = packing.pack(np.array(lengths), 4)
    assert (None if found is None else found.shape) == (None if rows is None else (len(lengths), rows, 8))


@pytest.mark.parametrize("most, counts", [(1, [1]), (2, [1, 2]), (8, [1, 2, 3, 4, 5, 6, 7, 8]), (12, [2, 3, 5, 6, 8, 9, 11, 12]), (64, [8, 16, 24, 32, 40, 48, 56, 64])])
def test_there_are_few_numbers_of_rows(most, counts):
    assert packed_rows(most) == counts


def test_ragged_rows_become_fewer():
    """Uniform in 8..128 with 16 completions a prompt: 8.5 times 128 tokens each, and up to 10.5."""
    lengths = np.random.default_rng(0).integers(8, 129, (16, 16))
    assert 10 < lengths.sum(axis=1).max() / 128 < 11 and packing.pack(lengths, 128).shape == (16, 6, 256)


def short():
    """Completions of two tokens at most: the four of a prompt fit into one row of ten."""
    batch = cases.batch("batch")
    return batch.replace(completion_mask=batch.completion_mask & (np.arange(cases.TC) < 2))


def test_a_batch_keeps_its_packing_with_its_prompts():
    batch = batching.pack(short())
    assert batch.packing.shape == (cases.P, 1, 2 * cases.TC) and np.array_equal(batch.completions, short().completions)
    some, _ = batching.take_prompts(batch, np.array([6, 0, 3, 5]))
    np.testing.assert_array_equal(some.packing, batch.packing[[6, 0, 3, 5]])
    np.testing.assert_array_equal(batching.micro_batches(batch, 4).packing, batch.packing.reshape(4, 2, 1, 2 * cases.TC))
    full = short().replace(completion_mask=np.ones((cases.P * cases.G, cases.TC), bool))
    assert batching.pack(full).packing is None


@pytest.mark.parametrize(
    "at_least, most_tokens, devices, expected",
    [
        (1, 0, 1, 1), (2, 0, 1, 2), (1, 208, 1, 1), (1, 207, 1, 2), (1, 104, 1, 2), (1, 103, 1, 4), (1, 26, 1, 8), (1, 25, 1, 8),
        (2, 208, 1, 2), (4, 50, 1, 8), (1, 104, 2, 1), (1, 103, 2, 2), (1, 26, 2, 4), (1, 1, 2, 4), (2, 0, 4, 2),
    ],
)  # fmt: skip
def test_slices_hold_no_more_tokens_than_a_device_may_have(at_least, most_tokens, devices, expected):
    """8 prompts of 6 tokens with 4 completions of 5: 208 tokens, 26 a prompt."""
    found = batching.num_slices(cases.batch("batch"), at_least=at_least, most_tokens=most_tokens, devices=devices)
    assert found == expected and cases.P % (found * devices) == 0


def test_packed_rows_are_counted_as_they_are():
    """48 + 8 * 10 tokens."""
    batch = batching.pack(short())
    assert [batching.num_slices(batch, at_least=1, most_tokens=most, devices=1) for most in (128, 127)] == [1, 2]
