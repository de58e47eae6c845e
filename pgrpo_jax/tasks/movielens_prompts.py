"""From rating tables to prompts: who is held out, what each user reveals, and which films he is asked to choose between.

Nothing leaks, by construction. Every user's films are split in two before any rating is looked at: the *history part*
decides his preference group and the films shown as liked, the *candidate pool* supplies the films to choose from and is used
for nothing else. What is known of a film (mean, disagreement of the preference groups) comes from the history parts of
training users alone.
"""

import dataclasses
import itertools
from typing import Any, Iterator, NamedTuple, Sequence

import numpy as np
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from pgrpo_jax.tasks import preference_groups
from pgrpo_jax.tasks import title_matching
from pgrpo_jax.tasks.movielens_tables import Film, Tables
from pgrpo_jax.tasks.streams import named_stream

NUM_CANDIDATES = 4
MAX_LIKED = 5
MIN_LIKED = 3
LIKED_STARS = 4
TEST_SHARE = 0.16
POOL_SHARE = 0.5
MAX_PROMPTS_PER_USER = 12
# Films of the pool for each prompt made from it: twice the four shown, so that those that divide opinion can be preferred.
POOL_FILMS_PER_PROMPT = 8
# A film with fewer training ratings has no mean to speak of: it is not shown.
MIN_FILM_RATINGS = 5
FILM_SHRINKAGE = 5.0  # ratings' worth of the overall mean added to a film's mean
# Ratings' worth of the film's mean added to that of each preference group: with as few as 5 the disputed films were mostly
# those that one preference group had rated twice.
PREFERENCE_SHRINKAGE = 20.0
MAX_TITLE_LETTERS = 40  # a longer title would fill the answer's token budget
_MIN_WEIGHT = 0.01  # of a film on which nobody disagrees, relative to the most disputed


class FilmStatistics(NamedTuple):
    """What training users' history parts say of each film.

    Attributes:
        count: [F] int, ratings.
        mean: [F] float64, stars, shrunk to the overall mean (a Bayesian average).
        disagreement: [F] float64, deviation over the preference groups of their mean stars, each shrunk to the film's mean.
    """

    count: np.ndarray
    mean: np.ndarray
    disagreement: np.ndarray


@dataclasses.dataclass(frozen=True)
class Preparation:
    """Everything decided before a prompt is written.

    Attributes:
        is_train: [U] bool.
        in_history: [R] bool, True where a rating is in its user's history part, False where it is in the candidate pool.
        clustering: the preference groups of all users.
        films: statistics of all films.
    """

    is_train: np.ndarray
    in_history: np.ndarray
    clustering: preference_groups.PreferenceGroups
    films: FilmStatistics


def prepare(tables: Tables, *, seed: int, num_preference_groups: int) -> Preparation:
    """Splits users and ratings, finds the preference groups and gathers the films' statistics.

    Args:
        tables: the ratings.
        seed: of the run; another one holds out other users.
        num_preference_groups: K.

    Returns:
        The preparation.

    Raises:
        ValueError: K is below 1 or more than the training users can fill.
    """
    is_train, in_history = divide(tables, seed=seed)
    preference_groups.check_num_preference_groups(num_preference_groups, num_train_users=int(is_train.sum()))
    known = in_history & is_train[tables.user]
    count, mean = _film_means(tables, known)
    genres = tuple(sorted({genre for film in tables.films for genre in film.genres}))
    features = preference_groups.taste_features(
        user=tables.user[in_history],
        film=tables.film[in_history],
        rating=tables.rating[in_history],
        film_mean=mean,
        film_genres=np.array([[genre in film.genres for genre in genres] for film in tables.films]).reshape(len(tables.films), -1),
        num_users=len(tables.users),
    )
    clustering = preference_groups.find_preference_groups(
        features, is_train=is_train, genres=genres, num_preference_groups=num_preference_groups, seed=seed
    )
    disagreement = _disagreement(tables, known, clustering.ids, mean, num_preference_groups)
    return Preparation(is_train, in_history, clustering, FilmStatistics(count, mean, disagreement))


def divide(tables: Tables, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Holds users out, and parts every user's ratings in two; no rating is looked at.

    Args:
        tables: the ratings.
        seed: of the run.

    Returns:
        is_train [U] bool, in_history [R] bool, as in `Preparation`.
    """
    num_users = len(tables.users)
    is_train = np.ones(num_users, bool)
    is_train[named_stream(seed, "held-out users").permutation(num_users)[: round(TEST_SHARE * num_users)]] = False
    in_history = np.zeros(len(tables.user), bool)
    for index, user_id in enumerate(tables.users):
        rows = np.flatnonzero(tables.user == index)
        shuffled = named_stream(seed, f"history of user {user_id}").permutation(rows)
        in_history[shuffled[int(POOL_SHARE * len(rows)) :]] = True
    return is_train, in_history


def write_prompts(tables: Tables, preparation: Preparation, *, seed: int, split: str) -> Iterator[dict[str, Any]]:
    """Writes the prompts of a split: several for a training user, with disjoint candidates, at most one for a test user.

    Args:
        tables: the ratings.
        preparation: what `prepare` returned for them.
        seed: of the run.
        split: "train" or "test".

    Yields:
        Flat records: prompt_id, user, preference_id, text, liked, candidates, names (of each candidate, joined by "|"), decoys
        (names of other films that contain a candidate's), ratings (this user's stars for each candidate) and popular (index of
        the candidate with the highest mean). A user without enough ratings yields none.
    """
    longer_names = title_matching.longer_names(name for film in tables.films for name in film.names)
    often_rated = preparation.films.count >= MIN_FILM_RATINGS
    may_be_shown = often_rated & [len(film.title) <= MAX_TITLE_LETTERS for film in tables.films]
    may_be_candidate = may_be_shown & [not any(_is_everyday(name) for name in film.names) for film in tables.films]
    most = MAX_PROMPTS_PER_USER if split == "train" else 1
    for index in np.flatnonzero(preparation.is_train == (split == "train")):
        user_id = tables.users[index]
        mine = tables.user == index
        stars = dict(zip(tables.film[mine].tolist(), tables.rating[mine].tolist()))
        pool = [film for film in tables.film[mine & ~preparation.in_history].tolist() if may_be_candidate[film]]
        liked = [film for film in tables.film[mine & preparation.in_history].tolist() if may_be_shown[film] and stars[film] >= LIKED_STARS]
        stream = named_stream(seed, f"prompts of user {user_id}")
        choices = _choices(pool, liked, stars, tables.films, preparation.films.disagreement, stream)
        for number, (shown, candidates) in enumerate(itertools.islice(choices, most)):
            yield _record(tables.films, shown, candidates, stars, preparation.films.mean, longer_names) | {
                "prompt_id": f"{split}-{user_id}-{number}",
                "user": user_id,
                "preference_id": int(preparation.clustering.ids[index]),
            }


def _film_means(tables: Tables, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    num_films = len(tables.films)
    count = np.bincount(tables.film[known], minlength=num_films)
    total = np.bincount(tables.film[known], weights=tables.rating[known], minlength=num_films)
    overall = tables.rating[known].mean() if known.any() else 0.0
    return count, (total + FILM_SHRINKAGE * overall) / (count + FILM_SHRINKAGE)


def _disagreement(tables: Tables, known: np.ndarray, ids: np.ndarray, mean: np.ndarray, num_preference_groups: int) -> np.ndarray:
    count = np.zeros((num_preference_groups, len(tables.films)))
    total = np.zeros_like(count)
    where = (ids[tables.user[known]], tables.film[known])
    np.add.at(count, where, 1)
    np.add.at(total, where, tables.rating[known])
    return ((total + PREFERENCE_SHRINKAGE * mean) / (count + PREFERENCE_SHRINKAGE)).std(axis=0)


def _choices(
    pool: Sequence[int],
    liked: Sequence[int],
    stars: dict[int, int],
    films: Sequence[Film],
    disagreement: np.ndarray,
    stream: np.random.Generator,
) -> Iterator[tuple[list[int], list[int]]]:
    """Yields (liked films to show, candidates in the order shown) for each prompt that one user's ratings allow."""
    for candidates in _deal(pool, stars, disagreement, stream):
        shown = _choose_liked(liked, candidates, films, disagreement, stream)
        in_random_order = stream.permutation(candidates).tolist()
        if len(shown) >= MIN_LIKED and _is_askable(candidates, stars, films):
            yield shown, in_random_order


def _deal(pool: Sequence[int], stars: dict[int, int], disagreement: np.ndarray, stream: np.random.Generator) -> list[list[int]]:
    """Deals disjoint sets of candidates: the pool's disputed films, one from each quarter of this user's ranking to each set."""
    num_sets = min(MAX_PROMPTS_PER_USER, max(1, len(pool) // POOL_FILMS_PER_PROMPT))
    chosen = _disputed_first(pool, disagreement, stream)[: num_sets * NUM_CANDIDATES]
    if len(chosen) < NUM_CANDIDATES:
        return []
    ranked = sorted(stream.permutation(chosen).tolist(), key=lambda film: stars[film])
    quarters = [stream.permutation(ranked[q * num_sets : (q + 1) * num_sets]) for q in range(NUM_CANDIDATES)]
    return np.stack(quarters, axis=1).tolist()


def _disputed_first(films: Sequence[int], disagreement: np.ndarray, stream: np.random.Generator) -> list[int]:
    """Orders films at random, without replacement, odds in proportion to their squared disagreement (Efraimidis and Spirakis 2006)."""
    weight = (disagreement[list(films)] / max(disagreement.max(initial=0.0), 1e-12)) ** 2 + _MIN_WEIGHT
    keys = np.log(1.0 - stream.random(len(films))) / weight
    return [films[i] for i in np.argsort(-keys, kind="stable")]


def _choose_liked(
    liked: Sequence[int], candidates: Sequence[int], films: Sequence[Film], disagreement: np.ndarray, stream: np.random.Generator
) -> list[int]:
    """Chooses the liked films to show, disputed ones first; no title twice, none that could be taken for a candidate's."""
    shown: dict[str, int] = {}
    for film in _disputed_first(liked, disagreement, stream):
        if not any(_alike(films[film], films[other]) for other in candidates):
            shown.setdefault(films[film].title, film)
    return list(shown.values())[:MAX_LIKED]


def _is_askable(candidates: Sequence[int], stars: dict[int, int], films: Sequence[Film]) -> bool:
    pairs = [(a, b) for i, a in enumerate(candidates) for b in candidates[i + 1 :]]
    return len({stars[film] for film in candidates}) >= 2 and not any(_alike(films[a], films[b]) for a, b in pairs)


def _alike(one: Film, other: Film) -> bool:
    """Whether a name of one film is contained, word for word, in a name of the other."""
    return any(title_matching.contains(a, b) or title_matching.contains(b, a) for a in one.names for b in other.names)


def _is_everyday(name: str) -> bool:
    """Whether an answer may hold the name without meaning the film: a tiny or numeric word alone, or nothing but stop words."""
    words = name.split()
    alone = len(words) == 1 and (len(name) < title_matching.MIN_SINGLE_WORD_LETTERS or name.isdigit())
    return alone or all(word in ENGLISH_STOP_WORDS for word in words)


def _record(
    films: Sequence[Film],
    liked: Sequence[int],
    candidates: Sequence[int],
    stars: dict[int, int],
    mean: np.ndarray,
    longer_names: dict[str, frozenset[str]],
) -> dict[str, Any]:
    """The part of a prompt's record that follows from the films shown."""
    own = {name for film in candidates for name in films[film].names}
    titles = [films[film].title for film in candidates]
    liked_titles = [films[film].title for film in liked]
    return {
        "text": _message(liked_titles, titles),
        "liked": liked_titles,
        "candidates": titles,
        "names": ["|".join(films[film].names) for film in candidates],
        "decoys": sorted(set().union(*(longer_names[name] for name in own)) - own),
        "ratings": [stars[film] for film in candidates],
        "popular": int(np.argmax(mean[list(candidates)])),
    }


def _message(liked: Sequence[str], candidates: Sequence[str]) -> str:
    options = "\n".join(f"- {title}" for title in candidates)
    return (
        f"Films I liked: {'; '.join(liked)}.\nWhich of these would I like best?\n{options}\n"
        "Answer with exactly one title from the list and nothing else."
    )
