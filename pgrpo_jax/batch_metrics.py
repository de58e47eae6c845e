"""Floor 1: the metrics of a step that need no model: rewards, advantages, lengths, repeats, and who is worst off.

`describe` runs on the host, on the flat batch of a step. What only the update sees of each token (entropy, KL) it adds up with `token_sums`
inside its program, by preference group, and `token_means` makes metrics of it.
"""

from typing import Any, Mapping

import chex
import jax
import jax.numpy as jnp
import numpy as np

from pgrpo_jax.structs import TrainBatch

CVAR_SHARE = 0.2
"""The share of a step's prompts, the worst ones, that `cvar` is the mean reward of."""


def describe(
    batch: TrainBatch, advantages: np.ndarray, diagnostics: Any, *, effective_history_count: np.ndarray | None = None
) -> dict[str, float]:
    """Returns the metrics of a batch that need no model, by preference group where it counts; NaN where there is nothing to measure.

    Args:
        batch: flat, on the host.
        advantages: [N].
        diagnostics: `advantages.Diagnostics` on the host, K rows.
        effective_history_count: [K], rewards the histories count for (count x weight); None = the rewards they hold.
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
    effective = diagnostics.history_count if effective_history_count is None else effective_history_count
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


def token_sums(batch: TrainBatch, values: Mapping[str, chex.Array], *, num_preference_groups: int) -> dict[str, chex.Array]:
    """Adds up values of tokens by preference group; a pure function for the update's program, no gradient goes through.

    Args:
        batch: one slice, N completions.
        values: name -> [N, Tc] float, one value for each token; what is masked may be anything.
        num_preference_groups: K.

    Returns:
        name -> [K] sums over the tokens that count, and `token_count` [K] in the dtype of the values. They add up over slices.
    """
    counted = batch.completion_mask & batch.valid[:, None]
    ids = batch.preference_ids[batch.prompt_index]

    def total(tokens: chex.Array) -> chex.Array:
        rows = jnp.sum(jnp.where(counted, jax.lax.stop_gradient(tokens), jnp.zeros((), tokens.dtype)), axis=1)
        return jax.ops.segment_sum(rows, ids, num_preference_groups)

    ones = jnp.ones(counted.shape, jnp.result_type(*values.values()))
    return {name: total(tokens) for name, tokens in values.items()} | {"token_count": total(ones)}


def token_means(sums: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Makes metrics of `token_sums` on the host.

    Args:
        sums: name -> [K], with `token_count`.

    Returns:
        `preference_group/{p}/{name}`: mean over the tokens of preference group p, NaN where it has none.
    """
    counts = np.asarray(sums["token_count"], np.float64)
    return {
        f"preference_group/{p}/{name}": float(total[p] / counts[p]) if counts[p] else float("nan")
        for name, total in sums.items() if name != "token_count" for p in range(len(counts))
    }  # fmt: skip
