"""Prompts over the real tables: nothing leaks, position carries no signal, every prompt can be answered and judged."""

import collections
import dataclasses
import itertools

import numpy as np
import pytest
from scipy import stats

from pgrpo_jax.tasks import movielens_prompts
from pgrpo_jax.tasks import movielens_tables
from pgrpo_jax.tasks import preference_groups
from pgrpo_jax.tasks import title_matching

SEED, K = 3, 5


def prepare(tables):
    return movielens_prompts.prepare(tables, seed=SEED, num_preference_groups=K)


def film_ids(tables, titles, stars, rated, taken=()):
    """Indices of the films that one user rated so and that are shown under these titles; "Sabrina" is two films, each taken once."""
    found = []
    for title, wanted in zip(titles, stars):
        fitting = (film for film in rated if tables.films[film].title == title and rated[film] in wanted)
        found.append(next(film for film in fitting if film not in taken and film not in found))
    return found


def test_sizes(real_preparation, real_records, real_tables):
    assert int((~real_preparation.is_train).sum()) == round(0.16 * len(real_tables.users))
    assert len(real_records["test"]) >= 128
    assert len({record["user"] for record in real_records["test"]}) == len(real_records["test"])
    assert len(real_records["train"]) > 3_000
    users = {split: {record["user"] for record in records} for split, records in real_records.items()}
    assert not users["train"] & users["test"]
    assert users["test"] <= {user for user, train in zip(real_tables.users, real_preparation.is_train) if not train}
    per_user = collections.Counter(record["user"] for record in real_records["train"])
    assert 1 < max(per_user.values()) <= movielens_prompts.MAX_PROMPTS_PER_USER
    assert set(np.unique(real_preparation.clustering.ids)) == set(range(K))


def test_candidates_come_from_the_pool_and_liked_films_from_the_history(real_tables, real_preparation, real_records):
    parts = {True: collections.defaultdict(dict), False: collections.defaultdict(dict)}
    for user, film, stars, in_history in zip(
        real_tables.user.tolist(), real_tables.film.tolist(), real_tables.rating.tolist(), real_preparation.in_history.tolist()
    ):
        parts[in_history][real_tables.users[user]][film] = stars
    shown = collections.defaultdict(list)
    for record in itertools.chain(*real_records.values()):
        history, pool = parts[True][record["user"]], parts[False][record["user"]]
        assert not set(history) & set(pool)
        candidates = film_ids(real_tables, record["candidates"], [{stars} for stars in record["ratings"]], pool, shown[record["user"]])
        liked = film_ids(real_tables, record["liked"], [{4, 5}] * len(record["liked"]), history)
        assert 3 <= len(liked) <= 5 and len(set(record["liked"])) == len(liked)
        shown[record["user"]] += candidates
    # `film_ids` finds no film twice for a user: had two of his prompts shared a candidate, it would have found none
    assert max(len(films) for films in shown.values()) == 4 * movielens_prompts.MAX_PROMPTS_PER_USER


def test_pool_ratings_decide_nothing_but_the_candidates(real_tables, real_preparation):
    adversarial = np.where(real_preparation.in_history, real_tables.rating, 6 - real_tables.rating)
    assert (adversarial != real_tables.rating).sum() > 20_000
    again = prepare(dataclasses.replace(real_tables, rating=adversarial))
    np.testing.assert_array_equal(again.in_history, real_preparation.in_history)
    np.testing.assert_array_equal(again.clustering.ids, real_preparation.clustering.ids)
    np.testing.assert_array_equal(again.clustering.centroids, real_preparation.clustering.centroids)
    for mine, theirs in zip(again.films, real_preparation.films):
        np.testing.assert_array_equal(mine, theirs)


def test_test_users_ratings_decide_nothing_for_others(real_tables, real_preparation, real_records):
    of_train = real_preparation.is_train[real_tables.user]
    tables = dataclasses.replace(real_tables, rating=np.where(of_train, real_tables.rating, 6 - real_tables.rating))
    again = prepare(tables)
    np.testing.assert_array_equal(again.is_train, real_preparation.is_train)
    np.testing.assert_array_equal(again.clustering.centroids, real_preparation.clustering.centroids)
    train = real_preparation.is_train
    np.testing.assert_array_equal(again.clustering.ids[train], real_preparation.clustering.ids[train])
    assert np.any(again.clustering.ids[~train] != real_preparation.clustering.ids[~train])  # their own taste was turned round
    for mine, theirs in zip(again.films, real_preparation.films):
        np.testing.assert_array_equal(mine, theirs)
    assert list(movielens_prompts.write_prompts(tables, again, seed=SEED, split="train")) == real_records["train"]


def test_preference_ids_and_film_statistics_against_a_loop(real_tables, real_preparation):
    """From nothing but history parts, with dictionaries instead of arrays."""
    columns = (real_tables.user, real_tables.film, real_tables.rating, real_preparation.in_history)
    rows = list(zip(*(column.tolist() for column in columns)))
    by_film, by_both, histories = collections.defaultdict(list), collections.defaultdict(list), collections.defaultdict(list)
    for user, film, stars, in_history in rows:
        if in_history:
            histories[user].append((film, stars))
            if real_preparation.is_train[user]:
                by_film[film].append(stars)
                by_both[film, int(real_preparation.clustering.ids[user])].append(stars)
    overall = np.mean([stars for ratings in by_film.values() for stars in ratings])
    mean = {film: (sum(by_film[film]) + 5 * overall) / (len(by_film[film]) + 5) for film in range(len(real_tables.films))}
    for film in range(0, len(real_tables.films), 7):
        assert real_preparation.films.count[film] == len(by_film[film])
        assert real_preparation.films.mean[film] == pytest.approx(mean[film], rel=1e-12)
        of_each = [(sum(by_both[film, k]) + 20 * mean[film]) / (len(by_both[film, k]) + 20) for k in range(K)]
        assert real_preparation.films.disagreement[film] == pytest.approx(np.std(of_each), abs=1e-12)
    genres = sorted({genre for film in real_tables.films for genre in film.genres})
    for user in range(0, len(real_tables.users), 9):
        departures = [(film, stars - mean[film]) for film, stars in histories[user]]
        own = np.mean([departure for _, departure in departures])
        taste = []
        for genre in genres:
            values = [departure - own for film, departure in departures if genre in real_tables.films[film].genres]
            taste.append(sum(values) / (len(values) + preference_groups.TASTE_SHRINKAGE))
        distances = [np.linalg.norm(np.array(taste) - centroid) for centroid in real_preparation.clustering.centroids]
        assert real_preparation.clustering.ids[user] == int(np.argmin(distances))


def test_position_carries_no_signal(real_records):
    records = [record for split in real_records.values() for record in split]
    best = [record["ratings"].index(max(record["ratings"])) for record in records if record["ratings"].count(max(record["ratings"])) == 1]
    worst = [record["ratings"].index(min(record["ratings"])) for record in records if record["ratings"].count(min(record["ratings"])) == 1]
    for positions in (best, worst, [record["popular"] for record in records]):
        assert len(positions) > 1_000
        assert stats.chisquare(np.bincount(positions, minlength=4)).pvalue > 1e-3
    ratings = np.array([record["ratings"] for record in records])
    for position in range(4):
        difference = ratings[:, position] - ratings.mean(axis=1)
        assert abs(difference.mean()) < 4 * difference.std() / len(records) ** 0.5


def test_every_prompt_can_be_answered_and_judged(real_records):
    for record in itertools.chain(*real_records.values()):
        names = [joined.split("|") for joined in record["names"]]
        assert len(record["candidates"]) == 4 and len(set(record["ratings"])) >= 2
        liked = [title_matching.names_of(title)[0] for title in record["liked"]]
        for index, own in enumerate(names):
            others = liked + [name for other, theirs in enumerate(names) if other != index for name in theirs]
            for name in own:
                assert len(name) > 3 and not name.isdigit()
                assert not any(f" {name} " in f" {other} " for other in others), (name, others)
            answer = record["candidates"][index]
            assert len(answer) <= movielens_prompts.MAX_TITLE_LETTERS
            assert title_matching.named_candidates(answer, names, record["decoys"]) == {index}
            assert f"\n- {answer}\n" in record["text"]
        assert all(title in record["text"] for title in record["liked"])
        assert len(record["text"]) < 420
        assert record["text"].endswith("Answer with exactly one title from the list and nothing else.")
    ids = [record["prompt_id"] for record in itertools.chain(*real_records.values())]
    assert len(set(ids)) == len(ids)


def test_disputed_films_are_preferred(real_preparation, real_tables):
    pool = np.flatnonzero(real_preparation.films.count >= 20).tolist()
    disagreement = real_preparation.films.disagreement
    stream = np.random.default_rng(0)
    chosen = [movielens_prompts._disputed_first(pool, disagreement, stream)[:20] for _ in range(50)]
    assert disagreement[np.ravel(chosen)].mean() > 1.15 * disagreement[pool].mean()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_another_seed_holds_out_other_users_and_still_enough(real_tables, real_preparation, seed):
    preparation = movielens_prompts.prepare(real_tables, seed=seed, num_preference_groups=2)
    assert 0 < (preparation.is_train != real_preparation.is_train).sum()
    assert len(list(movielens_prompts.write_prompts(real_tables, preparation, seed=seed, split="test"))) >= 128


def test_planted_camps_are_found(synthetic_dir):
    tables = movielens_tables.read(synthetic_dir)
    preparation = movielens_prompts.prepare(tables, seed=0, num_preference_groups=2)
    camps = preparation.clustering.ids
    assert len(set(camps[0::2].tolist())) == len(set(camps[1::2].tolist())) == 1 and camps[0] != camps[1]
    assert {name.split()[0] for name in preparation.clustering.names} == {"+Action", "+Romance"}


def test_users_with_too_little_to_say_yield_no_prompt(tmp_path, table_writer):
    items = [f"{i}\tFilm Number{i}\t1990\tDrama" for i in range(1, 13)]
    ratings = [f"{user}\t{film}\t3\t1" for user in range(1, 31) for film in range(1, 13)]  # everyone likes nothing, dislikes nothing
    table_writer(tmp_path, items=items, users=[f"{user}\t30" for user in range(1, 31)], ratings=ratings)
    tables = movielens_tables.read(str(tmp_path))
    preparation = movielens_prompts.prepare(tables, seed=0, num_preference_groups=1)
    assert not list(movielens_prompts.write_prompts(tables, preparation, seed=0, split="train"))
