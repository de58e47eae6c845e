"""Preference groups: tastes against a loop, planted clusters found again, order by size."""

import numpy as np
import pytest

from pgrpo_jax.tasks import preference_groups

GENRES = ("Action", "Drama", "War")


def test_taste_against_a_loop():
    rng = np.random.default_rng(0)
    num_users, num_films, num_ratings = 7, 9, 60
    user, film = rng.integers(0, num_users - 1, num_ratings), rng.integers(0, num_films, num_ratings)
    rating, film_mean = rng.integers(1, 6, num_ratings), rng.uniform(2, 4, num_films)
    film_genres = rng.random((num_films, 3)) < 0.4
    features = preference_groups.taste_features(
        user=user, film=film, rating=rating, film_mean=film_mean, film_genres=film_genres, num_users=num_users
    )
    for u in range(num_users):
        departures = [(f, r - film_mean[f]) for v, f, r in zip(user, film, rating) if v == u]
        own = np.mean([d for _, d in departures]) if departures else 0.0
        for j in range(3):
            values = [d - own for f, d in departures if film_genres[f, j]]
            expected = sum(values) / (len(values) + preference_groups.TASTE_SHRINKAGE)
            np.testing.assert_allclose(features[u, j], expected, rtol=1e-12, atol=1e-12)
    assert np.all(features[-1] == 0)  # a user without ratings has no opinion


def planted(sizes=(40, 25, 10)):
    rng = np.random.default_rng(1)
    centres = np.array([[2.0, 0, -1], [-2.0, 1, 0], [0, -2.0, 2]])
    labels = np.repeat(np.arange(3), sizes)
    order = rng.permutation(len(labels))
    return (centres[labels] + 0.1 * rng.standard_normal((len(labels), 3)))[order], labels[order]


def test_planted_clusters_come_back_largest_first():
    features, labels = planted()
    is_train = np.ones(len(labels), bool)
    found = preference_groups.find_preference_groups(features, is_train=is_train, genres=GENRES, num_preference_groups=3, seed=0)
    np.testing.assert_array_equal(found.ids, labels)
    assert found.ids.dtype == np.int32
    assert found.names == ("+Action -War", "+Drama -Action", "+War -Drama")
    other_seed = preference_groups.find_preference_groups(features, is_train=is_train, genres=GENRES, num_preference_groups=3, seed=9)
    np.testing.assert_array_equal(other_seed.ids, labels)


def test_held_out_users_take_the_nearest_centroid_and_move_none():
    features, labels = planted()
    is_train = np.arange(len(labels)) % 4 != 0
    found = preference_groups.find_preference_groups(features, is_train=is_train, genres=GENRES, num_preference_groups=3, seed=0)
    for k in range(3):
        np.testing.assert_allclose(found.centroids[k], features[is_train & (labels == k)].mean(axis=0), rtol=1e-6, atol=1e-9)
    moved = np.where(is_train[:, None], features, 100.0 - features)
    again = preference_groups.find_preference_groups(moved, is_train=is_train, genres=GENRES, num_preference_groups=3, seed=0)
    np.testing.assert_array_equal(again.centroids, found.centroids)
    distances = np.array([[np.linalg.norm(row - centroid) for centroid in found.centroids] for row in moved])
    np.testing.assert_array_equal(again.ids, distances.argmin(axis=1))


def test_one_preference_group_is_allowed():
    features, labels = planted()
    found = preference_groups.find_preference_groups(
        features, is_train=np.ones(len(labels), bool), genres=GENRES, num_preference_groups=1, seed=0
    )
    assert set(found.ids.tolist()) == {0}
    assert preference_groups.describe(np.zeros(3), GENRES) == "no marked taste"


def test_correspondence_against_a_loop():
    rng = np.random.default_rng(3)
    old, new = rng.integers(0, 3, 50).astype(np.int32), rng.integers(0, 4, 50).astype(np.int32)
    new[new == 2] = 1  # an empty one
    found = preference_groups.correspondence(old, new, num_old=3, num_new=5)
    expected = [[sum(a == i and b == j for a, b in zip(old, new)) for j in range(5)] for i in range(3)]
    assert found.tolist() == expected and found.dtype == np.int64
    assert found.sum(axis=1).tolist() == np.bincount(old, minlength=3).tolist() and found[:, [2, 4]].sum() == 0
    assert preference_groups.correspondence(old[:0], new[:0], num_old=2, num_new=1).tolist() == [[0], [0]]
    assert preference_groups.correspondence(old, old, num_old=3, num_new=3).tolist() == np.diag(np.bincount(old)).tolist()


@pytest.mark.parametrize(
    "old, new, message",
    [
        ([0, 1], [0], r"old_ids has the shape \(2,\) and new_ids \(1,\)"),
        ([0, 2], [0, 0], r"old_ids holds ids from 0 to 2, outside \[0, 2\)"),
        ([0, 1], [-1, 2], r"new_ids holds ids from -1 to 2, outside \[0, 3\)"),
    ],
)
def test_correspondence_of_other_users_is_refused(old, new, message):
    with pytest.raises(ValueError, match=message):
        preference_groups.correspondence(np.array(old), np.array(new), num_old=2, num_new=3)


@pytest.mark.parametrize(
    "num_preference_groups, message",
    [(0, r"is 0, outside \[1, 75\]"), (-1, r"is -1, outside \[1, 75\]"), (76, r"is 76, outside \[1, 75\]")],
)
def test_a_k_that_does_not_fit_is_refused(num_preference_groups, message):
    features, labels = planted()
    with pytest.raises(ValueError, match=message):
        preference_groups.find_preference_groups(
            features,
            is_train=np.ones(len(labels), bool),
            genres=GENRES,
            num_preference_groups=num_preference_groups,
            seed=0,
        )


def test_more_preference_groups_than_tastes_are_refused():
    features = np.repeat(np.eye(3)[:2], 10, axis=0)
    with pytest.raises(ValueError, match="only 2 different tastes"):
        preference_groups.find_preference_groups(
            features, is_train=np.ones(20, bool), genres=GENRES, num_preference_groups=3, seed=0
        )
