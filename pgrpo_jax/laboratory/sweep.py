"""Floor 1: runs many arms side by side and gathers what is reported of them; chooses among options by a fixed score."""

import concurrent.futures
import dataclasses
from typing import Any, Iterable, Mapping, Sequence

import jax
import numpy as np

from pgrpo_jax.laboratory import comparison, environment, training
from pgrpo_jax.laboratory.training import Arm, Budget, Outcome

BASELINES = ("grpo", "p_grpo")
INSTRUMENTS = ("gradient_share", "scale", "bias")
ALL = "all regimes"


def run(
    arms: Mapping[Any, Arm], worlds: Mapping[str, Mapping[str, Any]], seeds: Sequence[int], budget: Budget, *, num_threads: int = 2
) -> dict[Any, Outcome]:
    """Trains every arm in every regime from every seed.

    Args:
        arms: name -> arm.
        worlds: regime -> the fields of `environment.Regime`.
        seeds: M whole numbers.
        budget: how much is trained.
        num_threads: arms trained at a time; the outcome does not depend on it.

    Returns:
        name -> `Outcome` of NumPy arrays with leading axes [E, M], in the order of `arms`.
    """
    regimes = environment.stack(list(worlds.values()))
    numbers = np.asarray(seeds, np.int32)
    # Arms that share a compilation go one after the other, so that no two threads compile the same.
    alike: dict[Any, list[Any]] = {}
    for name, arm in arms.items():
        alike.setdefault((arm.settings, arm.weights), []).append(name)

    def train(names: list[Any]) -> dict[Any, Outcome]:
        return {name: jax.tree.map(np.asarray, training.train(arms[name], regimes, numbers, budget)) for name in names}

    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        found = {name: outcome for part in pool.map(train, alike.values()) for name, outcome in part.items()}
    return {name: found[name] for name in arms}


def report(outcomes: Mapping[str, Outcome], worlds: Mapping[str, Mapping[str, Any]], budget: Budget, *, tolerance: float) -> dict[str, Any]:
    """Everything that is said about the arms, as JSON-serialisable values.

    Args:
        outcomes: from `run`; must hold both `BASELINES`.
        worlds: as for `run`.
        budget: as for `run`.
        tolerance: by how much the mean may be lower for an arm to be recommended, normalised reward.

    Returns:
        {"measures": arm -> regime -> measure -> interval, "paired": arm -> baseline -> regime -> measure -> interval of the
        difference, "verdicts": arm -> baseline -> verdict, "recommended": arm or None, "instruments": arm -> regime -> `INSTRUMENTS`,
        each with one mean over seeds for each preference group}. Intervals are {mean, low, high}; beside the regimes stands `ALL`.
    """
    shares = np.asarray([world["shares"] for world in worlds.values()])
    found = {name: comparison.measures(outcome.curve, shares, budget.early_step) for name, outcome in outcomes.items()}
    verdicts = {
        name: {base: comparison.verdict(found[name], found[base], list(worlds), tolerance=tolerance) for base in BASELINES}
        for name in found if name not in BASELINES
    }
    instruments = {
        name: {regime: {part: np.asarray(getattr(outcome, part))[i].mean(axis=0).tolist() for part in INSTRUMENTS}
               for i, regime in enumerate(worlds)}
        for name, outcome in outcomes.items()
    }
    return {
        "measures": {name: _by_regime(worlds, each) for name, each in found.items()},
        "paired": {
            name: {base: _by_regime(worlds, {measure: each[measure] - found[base][measure] for measure in each}) for base in BASELINES}
            for name, each in found.items()
        },
        "verdicts": {name: {base: dataclasses.asdict(one) for base, one in each.items()} for name, each in verdicts.items()},
        "recommended": comparison.recommended(verdicts),
        "instruments": instruments,
    }


def _by_regime(regimes: Iterable[str], values: Mapping[str, np.ndarray]) -> dict[str, dict[str, dict[str, float]]]:
    """Intervals over seeds by regime and measure; a seed's mean over all regimes counts as one value more, `ALL`."""
    rows = list(enumerate(regimes))
    return {
        **{regime: {measure: dataclasses.asdict(comparison.interval(each[i])) for measure, each in values.items()} for i, regime in rows},
        ALL: {measure: dataclasses.asdict(comparison.interval(each.mean(axis=0))) for measure, each in values.items()},
    }


def choose(
    options: Mapping[str, Mapping[str, Arm]], learning_rates: Sequence[float], worlds: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int], budget: Budget, *, num_threads: int = 2,
) -> dict[str, dict[tuple[str, float], float]]:
    """Scores every option of every arm with every learning rate (`comparison.score`).

    Args:
        options: arm -> option -> `Arm`.
        learning_rates: tried with each option.
        worlds: as for `run`.
        seeds: as for `run`; not the ones that are reported.
        budget: as for `run`.
        num_threads: as for `run`.

    Returns:
        arm -> (option, learning rate) -> score, the best first.
    """
    arms = {
        (name, option, rate): dataclasses.replace(arm, learning_rate=rate)
        for name, choices in options.items() for option, arm in choices.items() for rate in learning_rates
    }
    shares = np.asarray([world["shares"] for world in worlds.values()])
    scores: dict[str, dict[tuple[str, float], float]] = {name: {} for name in options}
    for (name, option, rate), outcome in run(arms, worlds, seeds, budget, num_threads=num_threads).items():
        scores[name][option, rate] = comparison.score(comparison.measures(outcome.curve, shares, budget.early_step))
    return {name: dict(sorted(each.items(), key=lambda item: -item[1])) for name, each in scores.items()}
