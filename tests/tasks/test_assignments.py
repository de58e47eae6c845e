"""Assignments: each rule against its definition, and what each says of a user never seen among the training users."""

import collections
import hashlib
import subprocess
import sys

import numpy as np
import pytest

from pgrpo_jax.tasks import assignments


def test_a_pseudonym_is_a_keyed_digest_and_the_same_in_another_process():
    found = assignments.pseudonym("movielens", "196")
    assert found == hashlib.blake2b(b"196", key=b"movielens", digest_size=8).hexdigest()
    assert len(found) == 16 and int(found, 16) >= 0
    assert len({found, assignments.pseudonym("letters", "196"), assignments.pseudonym("movielens", "197")}) == 3
    program = "from pgrpo_jax.tasks import assignments; print(assignments.pseudonym('movielens', '196'))"
    again = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60, env={"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)})  # fmt: skip
    assert again.stdout.strip() == found


def test_users_are_hashed_evenly_and_by_name_alone():
    names = [assignments.pseudonym("movielens", str(user)) for user in range(4000)]
    found = assignments.by_user(names, 8)
    assert found.ids.dtype == np.int32 and len(found.names) == len(set(found.names)) == 8
    assert np.all(np.abs(np.bincount(found.ids, minlength=8) - 500) < 5 * np.sqrt(500))
    alone = assignments.by_user(names[77:78], 8)  # a user never seen: the rest decides nothing
    assert alone.ids.tolist() == [found.ids[77]] == [int(names[77], 16) % 8]
    assert assignments.by_user(names, 1).ids.max() == 0
    with pytest.raises(ValueError, match="num_preference_groups is 0, below 1"):
        assignments.by_user(names, 0)


VALUES = ["b"] * 5 + ["d"] * 3 + ["a"] * 3 + ["c"] + ["new"] * 4 + ["a"]
TRAIN = np.array([True] * 12 + [False] * 5)


@pytest.mark.parametrize(
    "k, rows, names",
    [
        (1, {}, ()),
        (2, {"b": 0}, ("job b",)),
        (3, {"b": 0, "a": 1}, ("job b", "job a")),  # a and d are as frequent: by name
        (4, {"b": 0, "a": 1, "d": 2}, ("job b", "job a", "job d")),
        (5, {"b": 0, "a": 1, "d": 2, "c": 3}, ("job b", "job a", "job d", "job c")),
    ],
)
def test_common_values_have_a_row_and_rare_or_new_ones_share_the_last(k, rows, names):
    found = assignments.by_column(VALUES, is_train=TRAIN, num_preference_groups=k, column="job")
    assert found.ids.tolist() == [rows.get(value, k - 1) for value in VALUES]
    assert found.names == (*names, "job: any other")
    assert set(found.ids[12:16]) == {k - 1}  # "new" is more frequent than "a", but no training user's


@pytest.mark.parametrize("k", [0, 6])
def test_more_rows_than_values_are_refused(k):
    with pytest.raises(ValueError, match=rf"^num_preference_groups is {k}, outside \[1, 5\] \(column 'job' has 4 values among the training"):
        assignments.by_column(VALUES, is_train=TRAIN, num_preference_groups=k, column="job")


def test_rating_buckets_against_sorted_users():
    rng = np.random.default_rng(5)
    means, is_train = rng.uniform(2, 5, 120), np.arange(120) % 6 != 0
    found = assignments.by_rating(means, is_train=is_train, num_preference_groups=4)
    ranked = sorted(np.flatnonzero(is_train), key=lambda u: means[u])
    assert found.ids[ranked].tolist() == [rank // 25 for rank in range(100)]
    edges = [(means[ranked[25 * b - 1]], means[ranked[25 * b]]) for b in (1, 2, 3)]
    for user in np.flatnonzero(~is_train):  # by the training users' edges, wherever exactly those are
        low, high = (sum(means[user] >= edge[side] for edge in edges) for side in (1, 0))
        assert low <= found.ids[user] <= high
    assert found.names[0].startswith("mean rating below ") and found.names[3].endswith(" and over") and " to " in found.names[1]
    assert assignments.by_rating(means, is_train=is_train, num_preference_groups=1).names == ("mean rating of any height",)


def test_rating_edges_come_from_training_users_alone_and_hold_for_the_rest():
    means = np.array([1.0, 2.0, 3.0, 4.0, 9.0, 2.5, -1.0])
    is_train = np.array([True] * 4 + [False] * 3)
    found = assignments.by_rating(means, is_train=is_train, num_preference_groups=2)
    assert found.ids.tolist() == [0, 0, 1, 1, 1, 1, 0] and found.names == ("mean rating below 2.50", "mean rating 2.50 and over")


@pytest.mark.parametrize(
    "means, k, message",
    [
        ([3.0, 3.0, 3.0, 4.0], 2, "fill only 1 of them: lower"),
        ([3.0, 4.0], 3, r"outside \[1, 2\] \(training users\)"),
        ([3.0, 4.0], 0, r"outside \[1, 2\]"),
    ],
)
def test_rating_buckets_without_a_training_user_are_refused(means, k, message):
    with pytest.raises(ValueError, match=message):
        assignments.by_rating(np.array(means), is_train=np.ones(len(means), bool), num_preference_groups=k)


def test_ages():
    expected = {"7": "under 18", "17": "under 18", "18": "18-24", "24": "18-24", "25": "25-34", "44": "35-44", "49": "45-49", "50": "50-55",
                "55": "50-55", "56": "56 and over", "99": "56 and over", "": "unknown", "x": "unknown", "-3": "unknown", "²": "unknown"}  # fmt: skip
    assert {age: assignments.age_bucket(age) for age in expected} == expected
    assert collections.Counter(map(assignments.age_bucket, map(str, range(18, 56)))) == {
        "18-24": 7, "25-34": 10, "35-44": 10, "45-49": 5, "50-55": 6
    }  # fmt: skip


def test_a_rule_is_one_of_those_on_offer():
    assert assignments.check_rule("", task="toy", offered=("one", "two")) == "one"
    assert assignments.check_rule("two", task="toy", offered=("one", "two")) == "two"
    with pytest.raises(ValueError) as caught:
        assignments.check_rule("three", task="toy", offered=("one", "two"))
    assert str(caught.value) == "preference_groups = 'three' is unknown to the task toy: use one of one, two, or '' for the first"
