"""The demo's reward for peers, in whose environments the package can not be imported, as it needs JAX: the names are found by its own code."""

import importlib.util
import pathlib
from typing import Any, Mapping

_TITLES = pathlib.Path(__file__).resolve().parents[2] / "pgrpo_jax" / "tasks" / "title_matching.py"
MAX_STARS = 5

_SPEC = importlib.util.spec_from_file_location("title_matching", _TITLES)
_title_matching = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_title_matching)


def rating(answer: str, facts: Mapping[str, Any]) -> float:
    """Returns what an answer earns, as `pgrpo_jax.tasks.movielens.MovieLens.reward` has it.

    Args:
        answer: any text.
        facts: of the prompt: "names", "decoys" and "ratings".
    """
    names = [joined.split("|") for joined in facts["names"]]
    named = _title_matching.named_candidates(answer, names, decoys=facts["decoys"])
    return facts["ratings"][next(iter(named))] / MAX_STARS if len(named) == 1 else 0.0
