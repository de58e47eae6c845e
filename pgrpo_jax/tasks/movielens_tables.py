"""The three MovieLens-100k tables (tab-separated, header `name:type`), read and checked line by line."""

import dataclasses
from typing import Iterator, NamedTuple

from etils import epath
import numpy as np

from pgrpo_jax.tasks import title_matching

FILES = ("ml-100k.inter", "ml-100k.item", "ml-100k.user")
# The data set holds one nameless entry, spelt both ways in different copies.
_NAMELESS = frozenset({"unknown", "unkonwn"})
_AGAIN = ": fetch the file again with ./launch/local.sh"


class Film(NamedTuple):
    """One film.

    Attributes:
        title: as it is shown to a person.
        names: the normalised names it answers to (`title_matching.names_of`), main title first.
        genres: names of its genres, may be empty.
    """

    title: str
    names: tuple[str, ...]
    genres: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Tables:
    """Users, films and ratings; the three rating arrays run in parallel, one entry for each (user, film) pair.

    Attributes:
        users: U user ids as the file spells them.
        films: F films; the data set's duplicates (same year, a shared name) are one.
        user: [R] int32, index into `users`.
        film: [R] int32, index into `films`.
        rating: [R] int32, stars, 1 to 5.
    """

    users: tuple[str, ...]
    films: tuple[Film, ...]
    user: np.ndarray
    film: np.ndarray
    rating: np.ndarray


def read(directory: str) -> Tables:
    """Reads the tables of a directory.

    Args:
        directory: where `ml-100k.inter`, `ml-100k.item` and `ml-100k.user` lie.

    Returns:
        The checked tables, sorted by user, then film.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a line is malformed, or a rating names an unlisted user or film (file and line are named).
    """
    paths = source_files(directory)
    users = [user for _, (user,) in _rows(paths["ml-100k.user"], ("user_id",))]
    films, film_index = _films(paths["ml-100k.item"])
    user, film, rating = _ratings(paths["ml-100k.inter"], {name: i for i, name in enumerate(users)}, film_index)
    return Tables(tuple(users), films, user, film, rating)


def read_column(directory: str, column: str) -> tuple[str, ...]:
    """Reads one column of the users' table.

    Args:
        directory: where `ml-100k.user` lies.
        column: its name in the header, for example "occupation".

    Returns:
        U values as the file spells them, in the order of `Tables.users`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a line is malformed, or the table has no such column.
    """
    return tuple(value for _, (value,) in _rows(source_files(directory)["ml-100k.user"], (column,)))


def source_files(directory: str) -> dict[str, epath.Path]:
    """Returns the path of each source file, by its name.

    Args:
        directory: the data directory.

    Raises:
        FileNotFoundError: a file is missing.
    """
    paths = {name: epath.Path(directory) / name for name in FILES}
    for path in paths.values():
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: fetch the MovieLens-100k files with ./launch/local.sh, or set task.data_dir")
    return paths


def _rows(path: epath.Path, columns: tuple[str, ...]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yields (place, values of `columns`) for each data line; place reads "path, line 12"."""
    try:
        lines = path.read_text().splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8{_AGAIN}") from error
    header = [field.split(":")[0] for field in lines[0].split("\t")] if lines else []
    missing = [name for name in columns if name not in header]
    if missing:
        raise ValueError(f"{path}, line 1: no column {missing[0]!r} among {header}{_AGAIN}")
    positions = [header.index(name) for name in columns]
    for number, line in enumerate(lines[1:], start=2):
        fields = line.split("\t")
        if len(fields) != len(header):
            raise ValueError(f"{path}, line {number}: {len(fields)} fields, not the {len(header)} of the header{_AGAIN}")
        yield f"{path}, line {number}", tuple(fields[position] for position in positions)


def _films(path: epath.Path) -> tuple[tuple[Film, ...], dict[str, int | None]]:
    """Returns the films and, for each id of the file, the index of its film (None for the nameless entry)."""
    films: list[Film] = []
    index: dict[str, int | None] = {}
    known: dict[tuple[str, str], int] = {}
    for place, (item, title, year, genres) in _rows(path, ("item_id", "movie_title", "release_year", "class")):
        names = title_matching.names_of(title)
        if item in index:
            raise ValueError(f"{place}: item_id {item!r} is listed twice: remove one of the two lines")
        if not names or names[0] in _NAMELESS:
            index[item] = None
            continue
        twin = next((known[name, year] for name in names if (name, year) in known), None)
        if twin is None:
            twin = len(films)
            films.append(Film(title_matching.shown_title(title), names, tuple(g for g in genres.split() if g != "unknown")))
        else:
            films[twin] = films[twin]._replace(names=tuple(dict.fromkeys(films[twin].names + names)))
        index[item] = twin
        known.update({(name, year): twin for name in names})
    return tuple(films), index


def _ratings(
    path: epath.Path, user_index: dict[str, int], film_index: dict[str, int | None]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns users, films and stars, [R] int32 each; of two ratings of one film by one user the later one counts."""
    latest: dict[tuple[int, int], tuple[float, int]] = {}
    for place, (user, item, stars, time) in _rows(path, ("user_id", "item_id", "rating", "timestamp")):
        for value, index, table in ((user, user_index, "ml-100k.user"), (item, film_index, "ml-100k.item")):
            if value not in index:
                raise ValueError(f"{place}: {value!r} is not listed in {table}: use the three files of one download")
        try:
            stars, time = float(stars), float(time)
        except ValueError:
            raise ValueError(f"{place}: rating {stars!r} or timestamp {time!r} is no number: correct or remove the line") from None
        if stars not in (1, 2, 3, 4, 5):
            raise ValueError(f"{place}: rating {stars:g} is not one of 1, 2, 3, 4, 5: correct or remove the line")
        if film_index[item] is None:
            continue
        pair = (user_index[user], film_index[item])
        if pair not in latest or time >= latest[pair][0]:
            latest[pair] = (time, int(stars))
    rows = np.array([(user, film, stars) for (user, film), (_, stars) in sorted(latest.items())], dtype=np.int32).reshape(-1, 3)
    return rows[:, 0], rows[:, 1], rows[:, 2]
