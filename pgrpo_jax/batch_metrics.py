"""Floor 1: the metrics of a step that need no model: rewards, advantages, lengths, repeats, and who is worst off.

`describe` runs on the host, on the flat batch of a step; `of_update` names what the update measured.
"""

from typing import Any, Mapping

import numpy as np

from pgrpo_jax.structs import TrainBatch

CVAR_SHARE = 0.2
"""The share of a step's prompts, the worst ones, that `cvar` is the mean reward of."""


def describe(batch: TrainBatch, advantages: np.ndarray, diagnostics: Any) -> dict[str, float]:
    """Returns the metrics of a batch that need no model, by preference group where it counts; NaN where there is nothing to measure.

    Args:
        batch: flat, on the host.
        advantages: [N].
        diagnostics: `advantages.Diagnostics` on the host, K rows.
    """
    valid = np.asarray(batch.valid)
    preference_ids = batch.preference_ids[batch.prompt_index][valid]
    rewards, kept = batch.rewards[valid].astype(np.float64), advantages[valid].astype(np.float64)
    means, dead = _by_prompt(batch)
    counts = np.maximum(np.asarray(diagnostics.batch_count, np.float64), 0)
    share = counts / max(1.0, counts.sum())
    lengths, repeated = batch.completion_mask.sum(axis=1)[valid], duplicates(batch)[valid]
    metrics = {
        "reward": _mean(rewards),
        "reward_std": rewards.std() if rewards.size else np.nan,
        "advantage_mean": _mean(kept),
        "advantage_std": kept.std() if kept.size else np.nan,
        "advantage_scale": (share * diagnostics.advantage_scale).sum(),
        "advantage_bias": (share * diagnostics.bias).sum(),
        "dead_prompts": dead,
        "length": _mean(lengths),
        "duplicates": _mean(repeated),
        "cvar": cvar(means),
    }
    effective = diagnostics.effective_count
    total = np.abs(kept).sum()
    for p in range(len(counts)):
        prefix, own = f"preference_group/{p}", preference_ids == p
        metrics |= {
            f"{prefix}/reward": diagnostics.batch_mean[p] if counts[p] else np.nan,
            f"{prefix}/count": counts[p],
            f"{prefix}/advantage_scale": diagnostics.advantage_scale[p],
            f"{prefix}/bias": diagnostics.bias[p],
            f"{prefix}/signal_share": np.abs(kept[own]).sum() / total if total > 0 else np.nan,
            f"{prefix}/length": _mean(lengths[own]),
            f"{prefix}/duplicates": _mean(repeated[own]),
            f"{prefix}/history_count": diagnostics.history_count[p],
            f"{prefix}/effective_history_count": effective[p],
            f"{prefix}/history_mean": diagnostics.history_mean[p],
            f"{prefix}/history_std": diagnostics.history_std[p],
        }
    metrics |= worst([metrics[f"preference_group/{p}/reward"] for p in range(len(counts))])
    return {name: float(value) for name, value in metrics.items()}


def _mean(values: np.ndarray) -> float:
    return values.mean() if values.size else np.nan


def _by_prompt(batch: TrainBatch) -> tuple[np.ndarray, float]:
    """(mean reward of each prompt that has completions, share of all prompts whose completions all got one reward or that have none)."""
    parts = [batch.rewards[(batch.prompt_index == p) & batch.valid].astype(np.float64) for p in range(len(batch.prompts))]
    means = np.array([part.mean() for part in parts if part.size])
    return means, np.mean([part.size == 0 or part.max() == part.min() for part in parts])


def duplicates(batch: TrainBatch) -> np.ndarray:
    """Finds completions that repeat an earlier one of the same prompt, token by token.

    Of n equal completions n − 1 count, so that the mean over completions is 0 where all differ and (G − 1)/G where all are equal.

    Args:
        batch: flat, on the host; what lies behind a completion's mask does not matter.

    Returns:
        [N] bool; False on rows that only pad.
    """
    seen: set[tuple[int, bytes]] = set()
    found = np.zeros(len(batch.valid), bool)
    for i in np.flatnonzero(batch.valid):
        key = int(batch.prompt_index[i]), np.ascontiguousarray(batch.completions[i][batch.completion_mask[i]]).tobytes()
        found[i] = key in seen
        seen.add(key)
    return found


def worst(rewards: Any) -> dict[str, float]:
    """Says which preference group is worst off.

    Args:
        rewards: [K] mean rewards, NaN for a preference group that is absent.

    Returns:
        `worst_preference_group` (its number; of equal ones the lowest), `worst_reward`, and `gap`, the reward of the best minus that of the
        worst. NaN where none is present, the gap also where only one is.
    """
    rewards = np.asarray(rewards, np.float64)
    present = np.flatnonzero(np.isfinite(rewards))
    if not present.size:
        return {"worst_preference_group": np.nan, "worst_reward": np.nan, "gap": np.nan}
    lowest = present[rewards[present].argmin()]
    gap = rewards[present].max() - rewards[lowest] if present.size > 1 else np.nan
    return {"worst_preference_group": float(lowest), "worst_reward": rewards[lowest], "gap": gap}


def cvar(rewards: np.ndarray, share: float = CVAR_SHARE) -> float:
    """Conditional value at risk: the mean reward of the worst `share` of prompts (Rockafellar and Uryasev 2000, for an empirical sample).

    With rewards r_1 <= … <= r_n and m = share·n it is (r_1 + … + r_k + (m − k)·r_{k+1}) / m, k = ⌊m⌋: the prompt on the border counts in
    part, so that the value does not jump with n. With fewer than 1/share prompts it is the lowest one.

    Args:
        rewards: [n] mean reward of each prompt's completions.
        share: in (0, 1].

    Returns:
        The mean, reward units; NaN without prompts.

    Raises:
        ValueError: the share is out of range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share = {share} is outside (0, 1]: 0.2 asks for the worst fifth of the prompts")
    if not len(rewards):
        return float("nan")
    ranked = np.sort(np.asarray(rewards, np.float64))
    mass = max(share * len(ranked), 1.0)
    weights = np.clip(mass - np.arange(len(ranked)), 0.0, 1.0)
    return float((weights * ranked).sum() / mass)


def of_update(measured: Mapping[str, Any], kl_coefficients: np.ndarray) -> dict[str, float]:
    """Makes metrics of what the update measured on the tokens it trained on.

    Args:
        measured: of `update.update`: scalars, and "by_preference/…" [K].
        kl_coefficients: [K] beta of each preference group; zeros where no KL is paid.
    """
    found = {name: value for name, value in measured.items() if not name.startswith(("by_preference/", "correction"))}
    mean, square = float(measured["correction"]), float(measured["correction_squared"])
    found |= {
        "correction/weight": mean,
        "correction/bounded": measured["correction_bounded"],
        "effective_sample_size": mean**2 / square if square > 0 else 0.0,
        "kl_coefficient": np.mean(kl_coefficients),
    }
    found.setdefault("kl", np.nan)  # without a reference: not measured
    measured = {"by_preference/kl": np.full(len(kl_coefficients), np.nan)} | dict(measured)
    for name in [name for name in measured if name.startswith("by_preference/")]:
        found |= {f"preference_group/{p}/{name.removeprefix('by_preference/')}": value for p, value in enumerate(measured[name])}
    found |= {f"preference_group/{p}/kl_coefficient": beta for p, beta in enumerate(kl_coefficients)}
    return {name: float(value) for name, value in found.items()}


def mean_reward(rewards: np.ndarray, valid: np.ndarray) -> float:
    """Returns the mean over valid completions of what was trained on, [N] or [N, C]; NaN without any."""
    return float(np.mean(rewards[valid], dtype=np.float64)) if valid.any() else float("nan")
