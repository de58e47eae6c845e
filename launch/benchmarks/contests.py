"""Whom we are measured against at what, and the turn-taking itself."""

import contextlib
import dataclasses
import pathlib
import statistics
import tempfile
from typing import Any, Mapping, Sequence

from launch.benchmarks import peers
from launch.benchmarks.timing import in_turn, ratios
from launch.peers.job import Job


@dataclasses.dataclass(frozen=True)
class Contest:
    """One thing that contestants are timed at.

    Attributes:
        benchmark: what their drivers are told.
        measures: name in a driver's answer -> unit; the first one decides the ratios, others may be missing.
        more_is_better: whether the first one is a rate, not seconds.
        ours: contestants that always take part.
        peers: those that may be asked for.
        cold_starts: whether those of `CACHED` also start with an empty compilation cache; the first measure is then a step's seconds.
    """

    benchmark: str
    measures: dict[str, str]
    more_is_better: bool
    ours: tuple[str, ...]
    peers: tuple[str, ...]
    cold_starts: bool = False


OURS = ("pgrpo_jax", "ceiling")
CACHED = ("pgrpo_jax", "tunix")  # those who keep what JAX compiled
CONTESTS = {
    "generation": Contest("generation", {"generation_tokens_per_sec": "tokens/s"}, True, OURS, ("transformers", "trl", "tunix")),
    "ragged generation": Contest("generation", {"generation_tokens_per_sec": "tokens/s"}, True, ("pgrpo_jax", "batches", "halved batches"), ("transformers",)),
    "storage": Contest("generation", {"generation_tokens_per_sec": "tokens/s"}, True, ("pgrpo_jax", "bfloat16", "int8"), ()),
    "update": Contest("update", {"learner_secs": "s"}, False, OURS, ("trl", "tunix")),
    "ragged update": Contest("update", {"learner_secs": "s"}, False, ("pgrpo_jax", "unpacked"), ()),
    "step": Contest("step", {"step_secs": "s", "step_tokens_per_sec": "tokens/s", "learner_secs": "s of the learner"}, False, OURS, ("trl", "tunix"), cold_starts=True),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Found:
    """What a benchmark found.

    Attributes:
        quantities: name -> measurements, round by round.
        ended: contestant that ended before the last round -> why.
    """

    quantities: dict[str, list[float]]
    ended: dict[str, str] = dataclasses.field(default_factory=dict)


def find(name: str, *, ragged: bool) -> Contest:
    """Returns the contest of a benchmark."""
    return CONTESTS[f"ragged {name}" if ragged else name]


def hold(contest: Contest, job: Job, *, rounds: int, against: Sequence[str]) -> Found:
    """Returns what everybody's driver measured, our speed as a multiple of each other's, memory and cold starts.

    Args:
        contest: what is done.
        job: its size.
        rounds: that count.
        against: peers that take part.

    Raises:
        PeerError: a peer could not be installed.
    """
    names, arguments = [*contest.ours, *against], [contest.benchmark, *job.options()]
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as running:
        caches = {name: _caching(pathlib.Path(directory) / name) for name in names if contest.cold_starts and name in CACHED}
        empty, lost = _cold_starts(caches, arguments)
        contestants = {
            name: running.enter_context(peers.started([name], arguments, caches.get(name, {})))[name] for name in names if name not in lost
        }
        answers, ended = in_turn(rounds, {name: contestant.round for name, contestant in contestants.items()})
    quantities = measured(contest, answers)
    quantities |= {f"{name}, peak memory, GiB": [contestant.peak_gib] for name, contestant in contestants.items() if contestant.peak_gib}
    starts = [(name, "cold start with an empty compilation cache", secs) for name, secs in empty.items()]
    for name, contestant in contestants.items():
        if contestant.cold_start_secs:
            starts.append((name, "cold start with a warm compilation cache" if name in empty else "cold start", contestant.cold_start_secs))
    for name, kind, secs in starts:
        quantities[f"{name}, {kind}, s"] = [secs]
        if contest.cold_starts and answers.get(name):
            step = statistics.median(answer[next(iter(contest.measures))] for answer in answers[name])
            quantities[f"{name}, {kind} less a usual step, s"] = [secs - step]
    return Found(quantities, lost | ended)


def measured(contest: Contest, answers: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[float]]:
    """Returns what was measured of everybody, and our speed as a multiple of each other's, round by round.

    Args:
        contest: what was done.
        answers: of each contestant, round by round; none where it ended before the first round.
    """
    found = {}
    for measure, unit in contest.measures.items():
        of_all = {name: [answer[measure] for answer in rounds if measure in answer] for name, rounds in answers.items()}
        found |= {f"{name}, {unit}": values for name, values in of_all.items() if values}
    first = next(iter(contest.measures))
    values = {name: [answer[first] for answer in rounds] for name, rounds in answers.items() if rounds}
    if ours := values.pop("pgrpo_jax", None):
        for name, theirs in values.items():
            found[f"pgrpo_jax / {name}, speed"] = ratios(ours, theirs) if contest.more_is_better else ratios(theirs, ours)
    return found


def _caching(directory: pathlib.Path) -> dict[str, str]:
    """The environment of a process that keeps all that JAX compiles."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(directory), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }  # fmt: skip


def _cold_starts(caches: Mapping[str, Mapping[str, str]], arguments: Sequence[str]) -> tuple[dict[str, float], dict[str, str]]:
    """Lets each fill its cache, in a process of its own: ({name: seconds of its cold start}, {name of who ended: why})."""
    secs: dict[str, float] = {}
    ended: dict[str, str] = {}
    for name, variables in caches.items():
        with peers.started([name], arguments, variables) as alone:
            ended |= in_turn(0, {name: alone[name].round})[1]
            if name not in ended:
                secs[name] = alone[name].cold_start_secs
    return secs, ended
