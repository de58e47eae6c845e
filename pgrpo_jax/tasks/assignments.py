"""Which preference group a user belongs to, by other rules than his taste: a column of the users' table, how he rates, or himself.

Each rule is learned from training users only and answers for every user; what it says of one never seen among them:

    column   a value that no training user has, or few have: the last row, "any other"
    rating   the bucket between the training users' edges, the outermost for anyone beyond them
    user     the row that his pseudonym hashes to: nothing is learned, so nobody is new

(k-means, the rule of `preference_groups`, gives him the nearest centroid.) K, the number of rows, is the caller's.
"""

import collections
import hashlib
from typing import NamedTuple, Sequence

import numpy as np

OTHER = "any other"
AGES = {"under 18": 0, "18-24": 18, "25-34": 25, "35-44": 35, "45-49": 45, "50-55": 50, "56 and over": 56}


class Assignment(NamedTuple):
    """Who belongs where.

    Attributes:
        ids: [U] int32, each user's preference group, in [0, K).
        names: K short descriptions for people.
    """

    ids: np.ndarray
    names: tuple[str, ...]


def pseudonym(task: str, user: str) -> str:
    """Returns the name under which a user's rewards are kept: 16 hexadecimal digits, a BLAKE2b digest keyed with the task's name.

    Equal in every process and every run; users of different tasks differ. It keeps plain user numbers out of records and checkpoints;
    whoever has the list of users can compute it too, so it is no anonymity.

    Args:
        task: name of the task, at most 64 bytes.
        user: as the task names him.
    """
    return hashlib.blake2b(user.encode(), key=task.encode(), digest_size=8).hexdigest()


def by_user(pseudonyms: Sequence[str], num_preference_groups: int) -> Assignment:
    """Gives every user the row that his pseudonym hashes to; with few users for many rows nearly everybody is alone.

    Args:
        pseudonyms: U, of `pseudonym`.
        num_preference_groups: K; users share a row by chance, about U/K of them.

    Raises:
        ValueError: K is below 1.
    """
    if num_preference_groups < 1:
        raise ValueError(f"num_preference_groups is {num_preference_groups}, below 1: set task.num_preference_groups to the rows wanted")
    ids = np.array([int(name, 16) % num_preference_groups for name in pseudonyms], np.int32)
    return Assignment(ids, tuple(f"users hashed to row {row}" for row in range(num_preference_groups)))


def by_column(values: Sequence[str], *, is_train: np.ndarray, num_preference_groups: int, column: str) -> Assignment:
    """Gives each of the K - 1 commonest values a row of its own, commonest first, and all others the last.

    Args:
        values: U, what the column says of each user.
        is_train: [U] bool; only these users are counted.
        num_preference_groups: K.
        column: its name, for people.

    Returns:
        Names read "gender F", the last one "gender: any other".

    Raises:
        ValueError: K is below 1, or leaves a row without a value.
    """
    counts = collections.Counter(value for value, train in zip(values, is_train, strict=True) if train)
    if not 1 <= num_preference_groups <= len(counts) + 1:
        raise ValueError(
            f"num_preference_groups is {num_preference_groups}, outside [1, {len(counts) + 1}] (column {column!r} has {len(counts)} values "
            f"among the training users, and {OTHER!r} is one more): set task.num_preference_groups within it"
        )
    commonest = sorted(counts, key=lambda value: (-counts[value], value))[: num_preference_groups - 1]
    row = {value: index for index, value in enumerate(commonest)}
    ids = np.array([row.get(value, num_preference_groups - 1) for value in values], np.int32)
    return Assignment(ids, (*(f"{column} {value}" for value in commonest), f"{column}: {OTHER}"))


def by_rating(means: np.ndarray, *, is_train: np.ndarray, num_preference_groups: int) -> Assignment:
    """Divides the users by their own mean rating at the quantiles of the training users': strict ones first.

    Args:
        means: [U] float, stars.
        is_train: [U] bool; only these users set the edges.
        num_preference_groups: K.

    Returns:
        Names such as "mean rating 3.28 to 3.60"; each bucket holds its lower edge.

    Raises:
        ValueError: K is below 1, or means are so alike that a bucket would have no training user.
    """
    known = means[is_train]
    if not 1 <= num_preference_groups <= len(known):
        raise ValueError(
            f"num_preference_groups is {num_preference_groups}, outside [1, {len(known)}] (training users): "
            "set task.num_preference_groups within it"
        )
    edges = np.quantile(known, np.arange(1, num_preference_groups) / num_preference_groups)
    ids = np.searchsorted(edges, means, side="right").astype(np.int32)
    filled = len(np.unique(ids[is_train]))
    if filled < num_preference_groups:
        raise ValueError(
            f"num_preference_groups is {num_preference_groups}, but the mean ratings of the training users fill only {filled} of them: "
            "lower task.num_preference_groups"
        )
    bounds = ["", *(f"{edge:.2f}" for edge in edges), ""]
    names = (_between(low, high) for low, high in zip(bounds, bounds[1:]))
    return Assignment(ids, tuple(f"mean rating {name}" for name in names))


def age_bucket(age: str) -> str:
    """Returns the age bucket of MovieLens-1M that an age lies in, for example "25-34"; "unknown" for what is no whole number.

    Args:
        age: years, as the table spells them.
    """
    if not (age.isascii() and age.isdigit()):
        return "unknown"
    return [name for name, first in AGES.items() if int(age) >= first][-1]


def check_rule(rule: str, *, task: str, offered: Sequence[str]) -> str:
    """Returns the rule to use: the task's first one for "".

    Args:
        rule: the rule asked for.
        task: the task's name.
        offered: the task's rules.

    Raises:
        ValueError: the task does not offer the rule.
    """
    if rule and rule not in offered:
        raise ValueError(f"preference_groups = {rule!r} is unknown to the task {task}: use one of {', '.join(offered)}, or '' for the first")
    return rule or offered[0]


def _between(low: str, high: str) -> str:
    return f"{low} to {high}" if low and high else f"below {high}" if high else f"{low} and over" if low else "of any height"
