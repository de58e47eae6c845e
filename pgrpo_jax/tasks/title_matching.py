"""Film titles: how one is shown, the names it answers to, and which titles a free text names.

A *name* is a title reduced to words: case, accents and punctuation gone, its article dropped ("Edge, The (1997)", "the edge"
and "The Edge!" all become "edge"). A text names a film when a name occurs in it as a run of whole words, so "Alien" is not in
"Aliens"; longer names take their words first, so "Batman" is not in "Batman Returns".
"""

import re
import unicodedata
from typing import Iterable, Sequence

# The data set moves an article behind a comma ("Enfer, L'"); there any of these is one. At the front only those that are no
# English word besides: "Die Hard" and "O Pioneers!" keep theirs.
_MOVED_ARTICLE = re.compile(r"^(?P<rest>.+), (?P<article>The|A|An|Les|La|Le|L'|Das|Der|Die|Det|El|Los|Las|Il|Lo|O|Un|Une)$", re.IGNORECASE)
_FRONT_ARTICLE = re.compile(r"^(?:(?:The|A|An|Les|La|Le|Das|Der|Det|El|Los|Las|Il)\s+|L')(?=\w)", re.IGNORECASE)
_YEAR = re.compile(r"\s*\(\d{4}\)\s*$")
_ALTERNATIVE = re.compile(r"\s*\(([^()]*)\)")

MIN_SINGLE_WORD_LETTERS = 4


def words_of(text: str) -> tuple[str, ...]:
    """Reduces a text to its words.

    Args:
        text: any text.

    Returns:
        Lower-case words of letters and digits; accents are stripped, apostrophes and the dots of initials joined ("Ulee's" is
        "ulees", "E.T." is "et"), "&" reads "and", the comma inside a number vanishes, other punctuation parts words.
    """
    plain = "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))
    plain = plain.replace("&", " and ")
    plain = re.sub(r"['’‘`*]", "", plain)
    plain = re.sub(r"(?<=\b[a-z])\.(?=[a-z]\b)", "", plain)
    plain = re.sub(r"(?<=\d),(?=\d{3})", "", plain)
    return tuple(re.findall(r"[^\W_]+", plain))


def shown_title(raw: str) -> str:
    """Returns a title as a person writes it: year and alternative titles left out, the article back at the front.

    Args:
        raw: a title of the data set, for example "Edge, The (1997)" or "Shanghai Triad (Yao a yao yao dao waipo qiao)".
    """
    return _article_first(_ALTERNATIVE.sub("", _YEAR.sub("", raw)).strip())


def names_of(raw: str) -> tuple[str, ...]:
    """Returns the names a film answers to, that of its main title first.

    Args:
        raw: a title of the data set; alternative titles stand in parentheses.

    Returns:
        Distinct names, each a run of words joined by single spaces. An alternative title of one short word ("ID4") is no
        name: it would be found by luck.
    """
    without_year = _YEAR.sub("", raw)
    names = _names(_ALTERNATIVE.sub("", without_year).strip())
    for title in _ALTERNATIVE.findall(without_year):
        names += [name for name in _names(title.strip()) if " " in name or len(name) >= MIN_SINGLE_WORD_LETTERS]
    return tuple(dict.fromkeys(name for name in names if name))


def contains(name: str, part: str) -> bool:
    """Returns whether `part` occurs in `name` as a run of whole words (a name contains itself)."""
    return f" {part} " in f" {name} "


def longer_names(names: Iterable[str]) -> dict[str, frozenset[str]]:
    """Finds, for each name, the longer names that contain it.

    Args:
        names: all names of a catalogue.

    Returns:
        name -> the other names in which it occurs as a run of whole words; empty for most.
    """
    catalogue = set(names)
    by_word: dict[str, set[str]] = {}
    for name in catalogue:
        for word in name.split():
            by_word.setdefault(word, set()).add(name)
    return {name: frozenset(other for other in by_word[name.split()[0]] if other != name and contains(other, name)) for name in catalogue}


def named_candidates(text: str, candidates: Sequence[Iterable[str]], decoys: Iterable[str] = ()) -> frozenset[int]:
    """Finds the candidates that a text names.

    Args:
        text: an answer.
        candidates: for each candidate the names it answers to.
        decoys: names of other films that contain a candidate's name; they take their words before it can.

    Returns:
        Indices of the different candidates named; a candidate named twice counts once.
    """
    words = words_of(text)
    patterns = [(tuple(name.split()), index) for index, names in enumerate(candidates) for name in names]
    patterns += [(tuple(name.split()), None) for name in decoys]
    taken = [False] * len(words)
    found = set()
    for pattern, index in sorted(patterns, key=lambda item: -len(item[0])):
        for start in range(len(words) - len(pattern) + 1):
            end = start + len(pattern)
            if words[start:end] == pattern and not any(taken[start:end]):
                taken[start:end] = [True] * len(pattern)
                found.add(index)
    return frozenset(found - {None})


def _article_first(title: str) -> str:
    moved = _MOVED_ARTICLE.match(title)
    if moved is None:
        return title
    article = moved["article"]
    return article + ("" if article.endswith("'") else " ") + moved["rest"]


def _names(title: str) -> list[str]:
    """The name without its article; where the article is glued on ("L'Enfer"), the glued form as well."""
    moved = _MOVED_ARTICLE.match(title)
    whole = _article_first(title)
    forms = [_FRONT_ARTICLE.sub("", title) if moved is None else moved["rest"]]
    if whole[:2].casefold() == "l'":
        forms.append(whole)
    return [" ".join(words_of(form)) for form in forms]
