"""Floor 1: from learning curves to statements: measures, intervals, differences paired by seed, and what is recommended.

Three measures of a policy, each a true expected reward between 0 (random) and 1 (optimal): the *smallest* preference group, the *worst*
one (whichever is lowest for that seed), and the *mean* over users, which is what training maximises. "early" and "final" name the update.

Letters: E regimes, M seeds, S updates, K preference groups.
"""

import dataclasses
import math
from typing import Mapping, Sequence

import numpy as np

MEASURES = ("smallest_early", "smallest_final", "worst_early", "worst_final", "mean_early", "mean_final")
_NORMAL = 1.959964  # 97.5th percentile: what the t distribution of 199 degrees of freedom has to 0.6 %


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean over seeds with the ends of its 95 % interval (normal approximation).

    Attributes:
        mean: the mean.
        low: lower end.
        high: upper end.
    """

    mean: float
    low: float
    high: float


def interval(values: np.ndarray) -> Interval:
    """Returns the mean of independent values, [M], and its 95 % interval; of one value the ends are unknown, NaN."""
    values = np.asarray(values, np.float64)
    half = _NORMAL * values.std(ddof=1) / math.sqrt(values.size) if values.size > 1 else math.nan
    return Interval(mean=float(values.mean()), low=float(values.mean() - half), high=float(values.mean() + half))


def measures(curve: np.ndarray, shares: np.ndarray, early_step: int) -> dict[str, np.ndarray]:
    """Reads the measures off the learning curves of one arm.

    Args:
        curve: [E, M, S, K] normalised true rewards.
        shares: [E, K], adding up to 1 over the last axis.
        early_step: the update after which "early" is measured, from 1.

    Returns:
        `MEASURES` -> [E, M] float64.
    """
    found = {}
    for when, step in (("early", early_step - 1), ("final", curve.shape[2] - 1)):
        rewards = np.asarray(curve[:, :, step], np.float64)
        smallest = np.argmin(shares, axis=1)[:, None, None]
        found[f"smallest_{when}"] = np.take_along_axis(rewards, np.broadcast_to(smallest, (*rewards.shape[:2], 1)), axis=2)[..., 0]
        found[f"worst_{when}"] = rewards.min(axis=2)
        found[f"mean_{when}"] = np.sum(rewards * np.asarray(shares, np.float64)[:, None, :], axis=2)
    return {name: found[name] for name in MEASURES}


def paired(values: np.ndarray, baseline: np.ndarray) -> Interval:
    """Returns the mean difference, seed by seed, with its interval.

    Args:
        values: [M], or [E, M]: then a seed's differences are averaged over the regimes first, whose worlds share their tastes.
        baseline: same shape.
    """
    differences = np.asarray(values, np.float64) - np.asarray(baseline, np.float64)
    return interval(differences.reshape(-1, differences.shape[-1]).mean(axis=0))


def score(found: Mapping[str, np.ndarray]) -> float:
    """What options are chosen by: the final reward, half the worst preference group's and half the mean, over all regimes and seeds."""
    return float(0.5 * np.mean(found["worst_final"]) + 0.5 * np.mean(found["mean_final"]))


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How one arm compares with one baseline on the final reward, over all regimes.

    Attributes:
        worst: paired difference on the worst preference group.
        mean: paired difference on the mean.
        better: regimes in which the worst preference group's interval lies above 0.
        worse: regimes in which it lies below 0.
        lifts: the worst preference group's interval lies above 0 and the mean's above −tolerance.
    """

    worst: Interval
    mean: Interval
    better: tuple[str, ...]
    worse: tuple[str, ...]
    lifts: bool


def verdict(
    found: Mapping[str, np.ndarray], baseline: Mapping[str, np.ndarray], regimes: Sequence[str], *, tolerance: float
) -> Verdict:
    """Compares an arm with a baseline of the same seeds.

    Args:
        found: `measures` of the arm.
        baseline: `measures` of the baseline.
        regimes: E names.
        tolerance: by how much the mean may be lower, normalised reward.

    Returns:
        The `Verdict`.
    """
    each = {name: paired(a, b) for name, a, b in zip(regimes, found["worst_final"], baseline["worst_final"], strict=True)}
    worst = paired(found["worst_final"], baseline["worst_final"])
    mean = paired(found["mean_final"], baseline["mean_final"])
    return Verdict(
        worst=worst, mean=mean, lifts=worst.low > 0 and mean.low > -tolerance,
        better=tuple(name for name, difference in each.items() if difference.low > 0),
        worse=tuple(name for name, difference in each.items() if difference.high < 0),
    )


def recommended(verdicts: Mapping[str, Mapping[str, Verdict]]) -> str | None:
    """The arm to recommend: of those that lift the worst preference group against every baseline, the one that lifts it most.

    Args:
        verdicts: arm -> baseline -> `Verdict`; the baselines themselves are not among the arms.

    Returns:
        Its name, or None where no arm does.
    """
    lifting = [name for name, against in verdicts.items() if all(one.lifts for one in against.values())]
    return max(lifting, key=lambda name: min(one.worst.mean for one in verdicts[name].values()), default=None)
