"""Titles: shown as people write them, matched as whole words, never by luck."""

import unicodedata

import numpy as np
import pytest

from pgrpo_jax.tasks import movielens_prompts
from pgrpo_jax.tasks import title_matching


@pytest.mark.parametrize(
    "raw, shown, names",
    [
        ("Edge, The (1997)", "The Edge", ("edge",)),
        ("Edge, The", "The Edge", ("edge",)),
        ("Fish Called Wanda, A", "A Fish Called Wanda", ("fish called wanda",)),
        ("Enfer, L'", "L'Enfer", ("enfer", "lenfer")),
        ("Misérables, Les", "Les Misérables", ("miserables",)),
        ("Boot, Das", "Das Boot", ("boot",)),
        ("Postino, Il", "Il Postino", ("postino",)),
        ("Good, The Bad and The Ugly, The", "The Good, The Bad and The Ugly", ("good the bad and the ugly",)),
        ("The Courtyard", "The Courtyard", ("courtyard",)),
        ("Die Hard", "Die Hard", ("die hard",)),
        ("L.A. Confidential", "L.A. Confidential", ("la confidential",)),
        ("E.T. the Extra-Terrestrial", "E.T. the Extra-Terrestrial", ("et the extra terrestrial",)),
        ("M*A*S*H", "M*A*S*H", ("mash",)),
        ("Bye Bye, Love", "Bye Bye, Love", ("bye bye love",)),
        ("20,000 Leagues Under the Sea", "20,000 Leagues Under the Sea", ("20000 leagues under the sea",)),
        ("Truth About Cats & Dogs, The", "The Truth About Cats & Dogs", ("truth about cats and dogs",)),
        ("Shanghai Triad (Yao a yao yao dao waipo qiao) (1995)", "Shanghai Triad", ("shanghai triad", "yao a yao yao dao waipo qiao")),
        ("Blue Angel, The (Blaue Engel, Der)", "The Blue Angel", ("blue angel", "blaue engel")),
        ("Tin Drum, The (Blechtrommel, Die)", "The Tin Drum", ("tin drum", "blechtrommel")),
        ("Eye of Vichy, The (Oeil de Vichy, L')", "The Eye of Vichy", ("eye of vichy", "oeil de vichy", "loeil de vichy")),
        ("Independence Day (ID4)", "Independence Day", ("independence day",)),
        ("The", "The", ("the",)),
        ("unkonwn", "unkonwn", ("unkonwn",)),
        ("(1995)", "", ()),
    ],
)
def test_shown_title_and_names(raw, shown, names):
    assert title_matching.shown_title(raw) == shown
    assert title_matching.names_of(raw) == names


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("The Edge", {0}),
        ("Edge, The", {0}),
        ("the edge (1997)", {0}),
        ("Edge", {0}),
        ("EDGE!", {0}),
        ("- The Edge\n- the edge", {0}),
        ("I would choose *The Edge*, of course.", {0}),
        ("Edgewise", set()),
        ("knowledge", set()),
        ("Alien", {1}),
        ("Aliens", set()),
        ("Batman Returns", set()),
        ("Batman Forever", set()),
        ("Batman, then Batman Returns", {2}),
        ("Alien or Batman", {1, 2}),
        ("The Edge, Alien, Batman, L'Enfer", {0, 1, 2, 3}),
        ("l’enfer", {3}),
        ("Enfer, L'", {3}),
        ("", set()),
        ("none of them", set()),
    ],
)
def test_named_candidates_by_hand(answer, expected):
    candidates = [title_matching.names_of(raw) for raw in ("Edge, The", "Alien", "Batman", "Enfer, L'")]
    decoys = ("batman returns", "batman forever", "alien resurrection")
    assert title_matching.named_candidates(answer, candidates, decoys) == expected


def test_longer_candidate_takes_its_words_first():
    candidates = (("batman",), ("batman returns",))
    assert title_matching.named_candidates("Batman Returns", candidates) == {1}
    assert title_matching.named_candidates("Batman", candidates) == {0}
    assert title_matching.named_candidates("Batman Returns to Batman", candidates) == {0, 1}


def test_longer_names_against_a_loop(real_tables):
    names = sorted({name for film in real_tables.films for name in film.names})[::5]
    expected = {
        name: {
            other
            for other in names
            if other != name
            and any(
                other.split()[start : start + len(name.split())] == name.split()
                for start in range(len(other.split()) - len(name.split()) + 1)
            )
        }
        for name in names
    }
    assert title_matching.longer_names(names) == expected
    assert any(expected.values())


def renderings(raw: str, year: str):
    """The ways in which an honest answer may write a title."""
    shown = title_matching.shown_title(raw)
    yield shown
    yield raw
    yield shown.upper()
    yield f"{shown} ({year})"
    yield f"{raw} ({year})"
    yield shown.lower().removeprefix("the ").removeprefix("a ")
    yield f'"{shown}."'
    yield shown.replace("'", "’").replace("-", " ")
    yield "".join(c for c in unicodedata.normalize("NFKD", shown) if not unicodedata.combining(c))
    yield f"{shown}\n{shown}"


def test_every_title_of_the_catalogue_names_itself_and_no_other(real_dir, real_tables):
    with open(f"{real_dir}/ml-100k.item", encoding="utf-8") as file:
        rows = [line.rstrip("\n").split("\t") for line in file][1:]
    longer = title_matching.longer_names(name for film in real_tables.films for name in film.names)
    rows = [row for row in rows if row[1] != "unkonwn" and not any(map(movielens_prompts._is_everyday, title_matching.names_of(row[1])))]
    rng = np.random.default_rng(0)
    tried = 0
    for shuffle in range(2):
        order = rng.permutation(len(rows))
        for start in range(0, len(rows) - 3, 4):
            four = [rows[i] for i in order[start : start + 4]]
            names = [title_matching.names_of(row[1]) for row in four]
            own = {name for each in names for name in each}
            if any(title_matching.contains(a, b) for i in range(4) for j in range(4) if i != j for a in names[i] for b in names[j]):
                continue
            decoys = set().union(*(longer.get(name, ()) for name in own)) - own
            for index, (_, raw, year, _) in enumerate(four):
                for text in renderings(raw, year):
                    assert title_matching.named_candidates(text, names, decoys) == {index}, (text, names, shuffle)
                    tried += 1
    assert tried > 30_000


def test_a_film_that_is_not_listed_is_not_taken_for_one_that_is(real_tables):
    """Over the whole catalogue: the title of a longer-named film never earns the rating of the one whose name it contains."""
    longer = title_matching.longer_names(name for film in real_tables.films for name in film.names)
    pairs = [(name, other) for name, others in longer.items() for other in others]
    assert len(pairs) > 100
    for name, other in pairs:
        assert title_matching.named_candidates(other, [[name]], longer[name]) == set(), (name, other)
