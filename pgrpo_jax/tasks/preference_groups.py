"""Preference groups: users who like the same genres, found by k-means on how far their ratings stray from the films' means.

A user's *taste* is one number for each genre: his rating minus the film's mean, averaged over the films of the genre, minus
his own average departure (so that a generous and a strict user of one taste look alike), shrunk towards 0 where he rated few
films of the genre. Centroids are learned from training users only; any other user takes the nearest.
"""

import dataclasses

import numpy as np
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

TASTE_SHRINKAGE = 5.0  # ratings' worth of "no opinion" added to each genre
MARKED_TASTE = 0.05  # stars; a description passes over smaller departures
_NUM_RESTARTS = 10


@dataclasses.dataclass(frozen=True)
class PreferenceGroups:
    """The outcome of the clustering.

    Attributes:
        ids: [U] int32, each user's preference group, in [0, K); training users and others alike.
        centroids: [K, J] float64, mean taste of the training users of each preference group, largest first.
        names: K short descriptions, for example "+Action +Sci-Fi -Drama".
    """

    ids: np.ndarray
    centroids: np.ndarray
    names: tuple[str, ...]


def taste_features(
    *, user: np.ndarray, film: np.ndarray, rating: np.ndarray, film_mean: np.ndarray, film_genres: np.ndarray, num_users: int
) -> np.ndarray:
    """Computes every user's taste from the ratings given (pass history parts only).

    Args:
        user: [R] int, index of the user who rated.
        film: [R] int, index of the film.
        rating: [R] stars.
        film_mean: [F] float, mean stars of each film.
        film_genres: [F, J] bool, the genres of each film.
        num_users: U.

    Returns:
        [U, J] float64, stars; 0 where a user rated no film of the genre.
    """
    residual = rating - film_mean[film]
    rated = np.bincount(user, minlength=num_users)
    offset = np.bincount(user, weights=residual, minlength=num_users) / np.maximum(rated, 1)
    residual = residual - offset[user]
    total = np.zeros((num_users, film_genres.shape[1]))
    count = np.zeros_like(total)
    np.add.at(total, user, residual[:, None] * film_genres[film])
    np.add.at(count, user, film_genres[film])
    return total / (count + TASTE_SHRINKAGE)


def find_preference_groups(
    features: np.ndarray, *, is_train: np.ndarray, genres: tuple[str, ...], num_preference_groups: int, seed: int
) -> PreferenceGroups:
    """Clusters the training users and gives every user the nearest centroid.

    Args:
        features: [U, J] float64, taste of each user.
        is_train: [U] bool; only these rows shape the centroids.
        genres: J names.
        num_preference_groups: K.
        seed: of the k-means restarts.

    Returns:
        Preference groups ordered by their number of training users, largest first, so that an id means the same in every run.

    Raises:
        ValueError: K is below 1, or above the number of training users or of their different tastes.
    """
    train = features[is_train]
    check_num_preference_groups(num_preference_groups, num_train_users=len(train))
    different = len(np.unique(train, axis=0))
    if num_preference_groups > different:
        raise ValueError(
            f"num_preference_groups is {num_preference_groups} but the training users have only {different} different tastes: lower it"
        )
    # One thread: sums over threads arrive in any order, and a user half-way between two centroids must not move with them.
    with threadpool_limits(limits=1):
        fitted = KMeans(num_preference_groups, n_init=_NUM_RESTARTS, random_state=seed).fit(train)
    sizes = np.bincount(fitted.labels_, minlength=num_preference_groups)
    order = sorted(range(num_preference_groups), key=lambda k: (-sizes[k], tuple(fitted.cluster_centers_[k])))
    centroids = fitted.cluster_centers_[order]
    return PreferenceGroups(nearest(features, centroids), centroids, tuple(describe(row, genres) for row in centroids))


def nearest(features: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Returns [U] int32, the index of the centroid nearest to each row (the first of equals).

    Args:
        features: [U, J] float64.
        centroids: [K, J] float64.
    """
    return np.argmin(((features[:, None, :] - centroids[None]) ** 2).sum(axis=-1), axis=1).astype(np.int32)


def correspondence(old_ids: np.ndarray, new_ids: np.ndarray, *, num_old: int, num_new: int) -> np.ndarray:
    """Counts how the users of each old preference group are spread over the new ones, for whoever moves histories after a re-clustering.

    Args:
        old_ids: [U] int, each user's preference group before, in [0, num_old).
        new_ids: [U] int, his preference group after, in [0, num_new).
        num_old: K before.
        num_new: K after.

    Returns:
        [num_old, num_new] int64, users; rows add up to the old sizes and columns to the new ones. Only whole users move exactly:
        where a row has two entries, the history must be parted by the users' own contributions, not by these shares.

    Raises:
        ValueError: the two assignments are of different users, or an id is outside its range.
    """
    if old_ids.shape != new_ids.shape or old_ids.ndim != 1:
        raise ValueError(f"old_ids has the shape {old_ids.shape} and new_ids {new_ids.shape}: give one id for each user in both")
    for name, ids, bound in (("old_ids", old_ids, num_old), ("new_ids", new_ids, num_new)):
        if len(ids) and not 0 <= ids.min() <= ids.max() < bound:
            raise ValueError(f"{name} holds ids from {ids.min()} to {ids.max()}, outside [0, {bound}): give the number of preference groups")
    flat = np.bincount(old_ids.astype(np.int64) * num_new + new_ids, minlength=num_old * num_new)
    return flat.reshape(num_old, num_new)


def describe(centroid: np.ndarray, genres: tuple[str, ...]) -> str:
    """Describes a centroid by the two genres it likes most and the two it likes least, for example "+War +Drama -Comedy".

    Args:
        centroid: [J] float64, stars.
        genres: J names.

    Returns:
        A short text; "no marked taste" where every genre stays near 0.
    """
    order = np.argsort(-centroid, kind="stable")
    liked = [f"+{genres[j]}" for j in order[:2] if centroid[j] > MARKED_TASTE]
    disliked = [f"-{genres[j]}" for j in order[::-1][:2] if centroid[j] < -MARKED_TASTE]
    return " ".join(liked + disliked) or "no marked taste"


def check_num_preference_groups(num_preference_groups: int, *, num_train_users: int) -> None:
    """Refuses a number of preference groups that the training users cannot fill.

    Args:
        num_preference_groups: K.
        num_train_users: training users in the data.

    Raises:
        ValueError: K is outside [1, num_train_users].
    """
    if not 1 <= num_preference_groups <= num_train_users:
        raise ValueError(
            f"num_preference_groups is {num_preference_groups}, outside [1, {num_train_users}] (training users): "
            "set task.num_preference_groups within it"
        )
