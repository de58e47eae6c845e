"""Streams that are the same in every process: random numbers named after the work they do, and requests for a batch of prompts."""

import hashlib
from typing import Collection

import numpy as np


def named_stream(seed: int, name: str) -> np.random.Generator:
    """Returns the random generator of one named piece of work.

    Args:
        seed: the run's seed, in [0, 2**32).
        name: what the numbers are for, for example "history of user 17"; another name is an independent stream.

    Returns:
        A generator that depends on nothing but the two arguments (Python's own `hash` differs from process to process).

    Raises:
        ValueError: the seed is outside its range.
    """
    check_seed(seed)
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return np.random.default_rng([seed, int.from_bytes(digest, "little")])


def check_seed(seed: int) -> None:
    """Refuses a seed that the random generators of NumPy, scikit-learn or grain would not take.

    Args:
        seed: the run's seed.

    Raises:
        ValueError: the seed is outside [0, 2**32).
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}, outside [0, 2**32): give a seed in that range")


def check_split(split: str, splits: Collection[str]) -> None:
    """Refuses a split that a task does not have.

    Args:
        split: the split asked for.
        splits: the task's splits.

    Raises:
        ValueError: `split` is none of them.
    """
    if split not in splits:
        raise ValueError(f"split is {split!r}, none of {sorted(splits)}: name one of these")


def batch_range(batch_index: int, batch_size: int) -> range:
    """Returns the positions of a batch in its stream of prompts.

    Args:
        batch_index: position of the batch, at least 0.
        batch_size: prompts in a batch, at least 1.

    Raises:
        ValueError: an argument is below its bound.
    """
    if batch_index < 0 or batch_size < 1:
        raise ValueError(f"batch_index is {batch_index} (at least 0) and batch_size {batch_size} (at least 1): ask within the bounds")
    return range(batch_index * batch_size, (batch_index + 1) * batch_size)
