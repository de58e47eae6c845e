"""Floor 5: what the microscope measures: sign flips, shares of the signal, suppression, dead prompts, correlations, and a check of itself.

*Signal* is Σ|A| over completions: what the policy gradient is weighted with. It is not the gradient, which also depends on the policy.
A preference group's *share of signal* under a scheme is set against its share under P-GRPO: *suppression* below 1 says that the scheme listens
to these people less than P-GRPO would. All of it but the flips is over warm completions only: where a history is cold, P-GRPO is GRPO.
"""

from typing import Any, Mapping, Sequence

import numpy as np

from pgrpo_jax.microscope import Table
from pgrpo_jax.tasks.streams import named_stream

TOLERANCE = 1e-6  # of the check, relative to 1 + |advantage|
ALIVE = 1e-3  # smallest |advantage| that counts as signal; default of curation.min_information
_RESAMPLES, _LEVEL = 2000, 95.0
_AT_ONCE = 10_000_000  # numbers of a bootstrap that are held at once


def measure(table: Table, samples: Sequence[Mapping[str, Any]] | None = None, *, top: int = 20, seed: int = 0) -> dict[str, Any]:
    """Returns everything that is measured, JSON-serialisable but for NaN (which `run_directory` writes as null).

    Args:
        table: of `microscope.look`.
        samples: records of samples.jsonl, for the check; None = there are none.
        top: flips listed.
        seed: of the bootstrap.
    """
    return {
        "completions": len(table.reward),
        "prompts": len(table.prompts),
        "steps": list(table.numbers),
        "warm_share": float(table.warm.mean()),
        "check": check(table, samples),
        "dead": dead(table),
        "flips": flips(table, top=top),
        "preference_groups": by_preference(table, seed=seed),
        "correlation": correlation(table),
    }


def check(table: Table, samples: Sequence[Mapping[str, Any]] | None) -> dict[str, Any]:
    """Compares the advantages that the run recorded with those recomputed under its own configuration.

    Args:
        table: of `microscope.look`.
        samples: records of samples.jsonl.

    Returns:
        {"agrees": True | False | None, "compared": completions, "largest_difference": relative to 1 + |advantage|, "reason": why not, or ""}.
    """
    wanted = table.advantages.get("own")
    if wanted is None:
        return _unchecked("no configuration of the run was given")
    steps = set(table.numbers)
    recorded = [s for s in samples or () if s["step"] in steps]
    order = np.argsort([s["step"] for s in recorded], kind="stable")
    recorded = [recorded[i] for i in order]
    names = [(int(step), table.prompts[p].prompt_id) for step, p in zip(table.step, table.prompt)]
    if names != [(s["step"], s["prompt_id"]) for s in recorded]:
        return _unchecked(f"{len(recorded)} samples are recorded for {len(names)} completions: samples.jsonl is missing or of another run")
    theirs = np.array([np.nan if s["advantage"] is None else s["advantage"] for s in recorded], np.float64)
    away = np.abs(theirs - wanted) / (1 + np.abs(wanted))
    largest = float(away.max(initial=0.0))
    agrees = bool((away <= TOLERANCE).all())  # False for NaN
    first = "" if agrees else f"first at step {int(table.step[~(away <= TOLERANCE)][0])}"
    return {"agrees": agrees, "compared": len(recorded), "largest_difference": largest, "reason": first}


def _unchecked(reason: str) -> dict[str, Any]:
    return {"agrees": None, "compared": 0, "largest_difference": float("nan"), "reason": reason}


def flips(table: Table, a: str = "grpo", b: str = "p_grpo", *, top: int = 20) -> dict[str, Any]:
    """Finds the completions that one scheme rewards and the other punishes.

    Args:
        table: of `microscope.look`.
        a: a scheme.
        b: another.
        top: listed at most, the strongest first: those whose smaller |advantage| is largest.

    Returns:
        {"count", "share" (of all completions), "up" (a punishes, b rewards), "strongest": records with the row of the table}.
    """
    one, other = table.advantages[a], table.advantages[b]
    flipped = np.flatnonzero(one * other < 0)
    strength = np.minimum(np.abs(one), np.abs(other))[flipped]
    strongest = flipped[np.argsort(-strength, kind="stable")][:top]
    records = [
        {
            "row": int(i), "step": int(table.step[i]), "preference_id": int(table.preference[i]),
            "prompt_id": table.prompts[table.prompt[i]].prompt_id, "prompt": table.prompts[table.prompt[i]].text, "answer": table.answers[i],
            "reward": float(table.raw[i]), a: float(one[i]), b: float(other[i]),
        }
        for i in strongest
    ]  # fmt: skip
    up = int((other[flipped] > 0).sum())
    return {"schemes": [a, b], "count": len(flipped), "share": len(flipped) / max(1, len(one)), "up": up, "strongest": records}


def dead(table: Table) -> dict[str, Any]:
    """Counts prompts whose completions all earn the same: GRPO learns nothing from them.

    Returns:
        {"prompts": with completions, "dead", "share", "warm" (dead ones with a warm history), "revived" (of these, with an advantage of at least
        `ALIVE` under P-GRPO)}.
    """
    counts = np.bincount(table.prompt, minlength=len(table.prompts))
    highest, lowest = np.full(len(counts), -np.inf), np.full(len(counts), np.inf)
    np.maximum.at(highest, table.prompt, table.reward)
    np.minimum.at(lowest, table.prompt, table.reward)
    strongest = np.zeros(len(counts))
    np.maximum.at(strongest, table.prompt, np.abs(table.advantages["p_grpo"]))
    warm = np.zeros(len(counts), bool)
    warm[table.prompt[table.warm]] = True
    is_dead = (counts > 0) & (highest == lowest)
    answered = int((counts > 0).sum())
    return {
        "prompts": answered,
        "dead": int(is_dead.sum()),
        "share": float(is_dead.sum() / max(1, answered)),
        "warm": int((is_dead & warm).sum()),
        "revived": int((is_dead & warm & (strongest >= ALIVE)).sum()),
    }


def by_preference(table: Table, *, seed: int = 0) -> list[dict[str, Any]]:
    """Measures each preference group, over warm completions.

    Args:
        table: of `microscope.look`.
        seed: of the bootstrap over prompts.

    Returns:
        One record for each of the K: "preference_id", "completions", "warm", "share" (of warm completions), "scale" and "bias" (means over steps,
        weighted by completions), and by scheme "mean_abs", "signal_share", "amplification" (signal share over share of completions),
        "suppression" {"mean", "low", "high"}: signal share over that under P-GRPO, with its 95 % interval; NaN where P-GRPO gives it none.
    """
    sums, mine = _prompt_sums(table)
    shares = {name: _shares(np.ones((1, len(mine))), values, mine)[0] for name, values in sums.items()}
    resampled = _resampled(sums, mine, seed)
    low_high = {name: _interval(_over(values, resampled["p_grpo"])) for name, values in resampled.items()}
    warm = np.bincount(table.preference[table.warm], minlength=table.num_preference_groups)
    everyone = np.bincount(table.preference, minlength=table.num_preference_groups)
    records = []
    for k in range(table.num_preference_groups):
        rows = table.warm & (table.preference == k)
        share = warm[k] / max(1, warm.sum())
        records.append({
            "preference_id": k, "completions": int(everyone[k]), "warm": int(warm[k]), "share": float(share),
            "scale": _weighted(table.scale[:, k], table.present[:, k]), "bias": _weighted(table.bias[:, k], table.present[:, k]),
            "mean_abs": {name: float(np.abs(a[rows]).mean()) if rows.any() else float("nan") for name, a in table.advantages.items()},
            "signal_share": {name: float(values[k]) for name, values in shares.items()},
            "amplification": {name: float(_over(values[k], share)) for name, values in shares.items()},
            "suppression": {
                name: {"mean": float(_over(values[k], shares["p_grpo"][k])), "low": low_high[name][0][k], "high": low_high[name][1][k]}
                for name, values in shares.items()
            },
        })  # fmt: skip
    return records


def suppressed(records: Sequence[Mapping[str, Any]], scheme: str = "grpo") -> list[int]:
    """Returns the preference groups whose interval of suppression under a scheme lies below 1."""
    return [record["preference_id"] for record in records if record["suppression"][scheme]["high"] < 1]


def correlation(table: Table) -> dict[str, Any]:
    """Returns Pearson's correlation of the schemes' advantages over warm completions: {"schemes", "values" [S, S]}, NaN where one is constant."""
    names = list(table.advantages)
    values = np.array([table.advantages[name][table.warm] for name in names]).reshape(len(names), -1)
    centred = values - values.mean(axis=1, keepdims=True) if values.size else values
    length = np.sqrt((centred**2).sum(axis=1))
    constant = ~(length > 1e-12 * max(1.0, np.sqrt(values.shape[1])))
    unit = centred / np.where(constant, 1, length)[:, None]
    found = np.where(constant[:, None] | constant[None, :], np.nan, unit @ unit.T)
    return {"schemes": names, "values": np.clip(found, -1, 1).tolist()}


def _prompt_sums(table: Table) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Σ|A| of each prompt with warm completions, by scheme; and [Q', K] who asked it, what to spread over preference groups."""
    rows = np.flatnonzero(table.warm)
    asked, place = np.unique(table.prompt[rows], return_inverse=True)
    sums = {name: np.bincount(place, np.abs(a[rows]), minlength=len(asked)) for name, a in table.advantages.items()}
    mine = np.zeros((len(asked), table.num_preference_groups))
    mine[np.arange(len(asked)), [table.prompts[p].preference_id for p in asked]] = 1
    return sums, mine


def _shares(weights: np.ndarray, sums: np.ndarray, mine: np.ndarray) -> np.ndarray:
    """[R, K]: share of Σ|A| of each preference group, prompts weighted [R, Q']; NaN where there is no signal at all."""
    total = weights @ (sums[:, None] * mine)
    return _over(total, total.sum(axis=1, keepdims=True))


def _resampled(sums: Mapping[str, np.ndarray], mine: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """scheme -> [R, K]: the shares in bootstrap samples of the prompts, the same samples for all schemes."""
    stream, count = named_stream(seed, "bootstrap of the microscope"), len(mine)
    if count == 0:
        return {name: np.full((_RESAMPLES, mine.shape[1]), np.nan) for name in sums}
    at_once = max(1, _AT_ONCE // count)
    drawn = (stream.multinomial(count, np.full(count, 1 / count), min(at_once, _RESAMPLES - done)) for done in range(0, _RESAMPLES, at_once))
    parts = [{name: _shares(weights, values, mine) for name, values in sums.items()} for weights in drawn]
    return {name: np.concatenate([part[name] for part in parts]) for name in sums}


def _over(above: Any, below: Any) -> np.ndarray:
    above, below = np.asarray(above, np.float64), np.asarray(below, np.float64)
    return np.where(below > 0, above / np.where(below > 0, below, 1), np.nan)


def _interval(values: np.ndarray) -> tuple[list[float], list[float]]:
    """Percentiles of [R, K] over the resamples in which there is a value; NaN for a preference group that is missing from most of them."""
    ends = np.full((2, values.shape[1]), np.nan)
    for k in range(values.shape[1]):
        known = values[np.isfinite(values[:, k]), k]
        if len(known) > len(values) / 2:
            ends[:, k] = np.percentile(known, [(100 - _LEVEL) / 2, (100 + _LEVEL) / 2])
    return ends[0].tolist(), ends[1].tolist()


def _weighted(values: np.ndarray, weights: np.ndarray) -> float:
    known = np.isfinite(values) & (weights > 0)
    return float(np.average(values[known], weights=weights[known])) if known.any() else float("nan")
