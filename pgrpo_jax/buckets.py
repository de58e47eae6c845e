"""The lengths that arrays of tokens are padded to, few of them: each is a program of its own."""

from typing import Sequence

import numpy as np

_FEWEST_COLUMNS = 32  # widths of completions are no nearer to each other


def bucket_length(longest: int, buckets: Sequence[int]) -> int:
    """Returns the smallest bucket that holds a prompt of `longest` tokens.

    Raises:
        ValueError: no bucket is long enough.
    """
    for bucket in buckets:
        if longest <= bucket:
            return bucket
    raise ValueError(
        f"prompt of {longest} tokens is longer than the largest bucket of {max(buckets)}: shorten it or extend generation.prompt_buckets"
    )


def packed_rows(most: int) -> list[int]:
    """Returns how many rows the completions of a prompt may be packed into, rising: eighths of the most that are needed; one compilation each."""
    return sorted({-(-most * eighths // 8) for eighths in range(1, 9)})


def completion_widths(max_new_tokens: int) -> list[int]:
    """Returns the widths that arrays of completions come in, rising: quarters of the longest, but never a few columns more; one compilation each."""
    columns = max(_FEWEST_COLUMNS, -(-max_new_tokens // (4 * _FEWEST_COLUMNS)) * _FEWEST_COLUMNS)
    return [*range(columns, max_new_tokens, columns), max_new_tokens]


def shared_columns(prompts: np.ndarray, lengths: np.ndarray) -> int:
    """Returns how many columns, from the first on, hold the same tokens in all prompts: a power of two, or 0 where sharing them would not pay.

    The last token of each prompt is never among them.

    Args:
        prompts: [P, Tp] int32, padded on the right.
        lengths: [P] int32, tokens.
    """
    if len(prompts) < 2:
        return 0
    differs = np.append((prompts != prompts[:1]).any(axis=0), True)
    columns = min(int(differs.argmax()), int(lengths.min()) - 1)
    return 2 ** (columns.bit_length() - 1) if columns >= _FEWEST_COLUMNS else 0
