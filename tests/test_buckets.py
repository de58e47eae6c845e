"""What arrays of tokens are padded to, and what prompts share: by hand, and against a loop."""

import numpy as np
import pytest

from pgrpo_jax.buckets import shared_columns


def shared(*prompts):
    lengths = np.array([len(p) for p in prompts], np.int32)
    padded = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in zip(padded, prompts):
        row[: len(prompt)] = prompt
    return shared_columns(padded, lengths)


LONG = list(range(1, 141))


@pytest.mark.parametrize(
    "prompts, columns",
    [
        ([LONG], 0),  # one prompt shares with nobody
        ([LONG, LONG], 128),
        ([LONG, LONG[:129], LONG], 128),
        ([LONG, LONG[:128]], 64),  # the last token of each stays its own
        ([LONG, [*LONG[:64], 7, 7]], 64),
        ([LONG, LONG, [*LONG[:63], 7, 7, *LONG[65:]]], 32),
        ([LONG, LONG[:33]], 32),
        ([LONG, LONG[:32]], 0),
        ([LONG, [0, *LONG[1:]]], 0),  # differs at once; 0 is the padding
        ([LONG[:2], LONG[:2]], 0),
    ],
)
def test_shared_columns(prompts, columns):
    assert shared(*prompts) == columns


def test_padding_is_shared_by_nobody():
    padded = np.array([[5] * 100, [5] * 100], np.int32)
    assert shared_columns(padded, np.array([40, 100], np.int32)) == 32
