"""Fixtures: the real MovieLens tables, and small synthetic ones written by the tests themselves."""

import pathlib

import numpy as np
import pytest

from pgrpo_jax.tasks import movielens_prompts
from pgrpo_jax.tasks import movielens_tables

REAL_DATA = pathlib.Path(__file__).resolve().parents[2] / ".assets" / "ml-100k"
ADJECTIVES = ("Crimson", "Silent", "Golden", "Broken", "Hidden", "Distant", "Burning", "Frozen")
NOUNS = ("Harbour", "Orchard", "Lantern", "Voyage", "Garden", "Thunder", "Meadow", "Empire")


@pytest.fixture(scope="session")
def real_dir() -> str:
    """The directory of the real data, which launch/test.sh fetches."""
    for name in movielens_tables.FILES:
        assert (REAL_DATA / name).exists(), f"{REAL_DATA / name} is missing: run ./launch/test.sh once, it fetches the data"
    return str(REAL_DATA)


@pytest.fixture(scope="session")
def real_tables(real_dir):
    return movielens_tables.read(real_dir)


@pytest.fixture(scope="session")
def real_preparation(real_tables):
    return movielens_prompts.prepare(real_tables, seed=3, num_preference_groups=5)


@pytest.fixture(scope="session")
def real_records(real_tables, real_preparation):
    """split -> records, for seed 3 and K = 5."""
    return {
        split: list(movielens_prompts.write_prompts(real_tables, real_preparation, seed=3, split=split)) for split in ("train", "test")
    }


@pytest.fixture
def synthetic_dir(tmp_path):
    """Sixty users, even ones fond of Action and odd ones of Romance, who each rated 40 of 64 films."""
    rng = np.random.default_rng(0)
    titles = [f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS]
    items = [f"{i + 1}\t{title}\t1990\t{('Action', 'Romance')[i % 2]}" for i, title in enumerate(titles)]
    ratings = []
    for user in range(60):
        for film in rng.choice(len(titles), 40, replace=False):
            stars = np.clip((4 if user % 2 == film % 2 else 2) + rng.integers(-1, 2), 1, 5)
            ratings.append(f"{user + 1}\t{film + 1}\t{stars}\t{len(ratings)}")
    directory = tmp_path / "synthetic"
    users = [f"{user + 1}\t{15 + user}\t{'MFMM'[user % 4]}\t{'student' if user else 'juggler'}" for user in range(60)]
    write_tables(directory, items=items, users=users, ratings=ratings, user_columns=("age", "gender", "occupation"))
    return str(directory)


def write_tables(directory, *, items, users, ratings, user_columns=("age",)):
    """Writes the three files; each argument is a list of tab-separated lines without their header (users: the id, then `user_columns`)."""
    directory.mkdir(parents=True, exist_ok=True)
    headers = {
        "ml-100k.item": ("item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq", items),
        "ml-100k.user": ("\t".join(f"{name}:token" for name in ("user_id", *user_columns)), users),
        "ml-100k.inter": ("user_id:token\titem_id:token\trating:float\ttimestamp:float", ratings),
    }
    for name, (header, lines) in headers.items():
        (directory / name).write_text("\n".join([header, *lines]) + "\n")


@pytest.fixture
def table_writer():
    return write_tables
