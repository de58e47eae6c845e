"""The tables: read exactly, and a bad line is named."""

import collections

import pytest

from pgrpo_jax.tasks import movielens_tables

ITEMS = ["1\tEdge, The (1997)\t1997\tThriller Adventure", "2\tunkonwn\tunkonwn\tunknown", "3\tAlien\t1979\tSci-Fi"]


def test_reads_what_is_written(tmp_path, table_writer):
    table_writer(tmp_path, items=ITEMS, users=["7\t30", "8\t40"], ratings=["8\t1\t4\t100", "7\t3\t1\t100", "7\t2\t5\t100"])
    tables = movielens_tables.read(str(tmp_path))
    assert tables.users == ("7", "8")
    assert [film.title for film in tables.films] == ["The Edge", "Alien"]
    assert tables.films[0].genres == ("Thriller", "Adventure")
    assert list(zip(tables.user.tolist(), tables.film.tolist(), tables.rating.tolist())) == [(0, 1, 1), (1, 0, 4)]


def test_a_film_under_two_ids_is_one_and_its_later_rating_counts(tmp_path, table_writer):
    items = ["1\tMaybe, Maybe Not (Bewegte Mann, Der)\t1994\tComedy", "2\tBewegte Mann, Der\t1994\tComedy"]
    items += ["3\tSabrina\t1954\t", "4\tSabrina\t1995\t"]
    table_writer(tmp_path, items=items, users=["1\t30"], ratings=["1\t1\t5\t900", "1\t2\t2\t300", "1\t3\t1\t1", "1\t4\t4\t1"])
    tables = movielens_tables.read(str(tmp_path))
    assert [film.title for film in tables.films] == ["Maybe, Maybe Not", "Sabrina", "Sabrina"]
    assert tables.films[0].names == ("maybe maybe not", "bewegte mann")
    assert tables.rating.tolist() == [5, 1, 4]


def test_real_tables_against_a_count_of_the_lines(real_dir, real_tables):
    with open(f"{real_dir}/ml-100k.inter", encoding="utf-8") as file:
        lines = [line.split("\t") for line in file][1:]
    assert len(lines) == 100_000
    assert len(real_tables.users) == 943
    assert 1_640 < len(real_tables.films) < 1_682  # about eighteen films are listed twice, one has no name
    merged = collections.Counter(item for _, item, _, _ in lines)["267"]
    assert 99_500 < len(real_tables.rating) <= 100_000 - merged
    fargo = next(i for i, film in enumerate(real_tables.films) if film.title == "Fargo")
    expected = sorted((user, int(stars)) for user, item, stars, _ in lines if item == "100")
    found = real_tables.film == fargo
    assert sorted((real_tables.users[u], int(r)) for u, r in zip(real_tables.user[found], real_tables.rating[found])) == expected
    assert sum(film.title == "Chasing Amy" for film in real_tables.films) == 1


@pytest.mark.parametrize(
    "ratings, message",
    [
        (["7\t1\t4"], "line 2: 3 fields, not the 4"),
        (["7\t1\t4\t1", "7\t3\tfour\t1"], "line 3: rating 'four'"),
        (["7\t1\t6\t1"], "line 2: rating 6 is not one of 1, 2, 3, 4, 5"),
        (["7\t1\tnan\t1"], "line 2: rating nan"),
        (["9\t1\t4\t1"], "line 2: '9' is not listed in ml-100k.user"),
        (["7\t99\t4\t1"], "line 2: '99' is not listed in ml-100k.item"),
    ],
)
def test_a_bad_rating_names_file_and_line(tmp_path, table_writer, ratings, message):
    table_writer(tmp_path, items=ITEMS, users=["7\t30"], ratings=ratings)
    with pytest.raises(ValueError, match="ml-100k.inter") as caught:
        movielens_tables.read(str(tmp_path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_column_of_the_users_in_their_order(tmp_path, table_writer):
    users = ["8\t40\tF", "7\t30\tM", "9\t\tF"]
    table_writer(tmp_path, items=ITEMS, users=users, ratings=[], user_columns=("age", "gender"))
    assert movielens_tables.read(str(tmp_path)).users == ("8", "7", "9")
    assert movielens_tables.read_column(str(tmp_path), "gender") == ("F", "M", "F")
    assert movielens_tables.read_column(str(tmp_path), "age") == ("40", "30", "")
    with pytest.raises(ValueError, match="line 1: no column 'job' among"):
        movielens_tables.read_column(str(tmp_path), "job")


def test_bad_files(tmp_path, table_writer):
    table_writer(tmp_path, items=ITEMS + ITEMS[:1], users=["7\t30"], ratings=[])
    with pytest.raises(ValueError, match="line 5: item_id '1' is listed twice"):
        movielens_tables.read(str(tmp_path))
    (tmp_path / "ml-100k.item").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="byte 0 is not UTF-8"):
        movielens_tables.read(str(tmp_path))
    (tmp_path / "ml-100k.item").write_text("")
    with pytest.raises(ValueError, match="line 1: no column 'item_id'"):
        movielens_tables.read(str(tmp_path))
    (tmp_path / "ml-100k.item").unlink()
    with pytest.raises(FileNotFoundError, match=r"ml-100k.item is missing: .*\./launch/local.sh"):
        movielens_tables.read(str(tmp_path))
