"""Floor 0: how much each preference group weighs in the loss: multipliers of the advantages, by preference group.

    none      1: a preference group weighs what its share of the batch is
    balanced  each preference group in the batch weighs the same, however few its completions are
    dro       the lower a preference group's past reward, the more it weighs: softmax(−μ_p / temperature) against the shares, the
              exponentiated-gradient weights of distributionally robust optimisation (Sagawa et al., arXiv:1911.08731) with the reward
              history as memory; meaningful only where the rewards of all preference groups are on one scale

The multipliers have mean 1 over the batch's completions, so the size of the gradient stays comparable.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp

KINDS = ("none", "dro", "balanced")


@dataclasses.dataclass(frozen=True)
class PreferenceWeights:
    """Which multipliers.

    Attributes:
        kind: one of KINDS.
        temperature: of "dro", reward units, above 0.
    """

    kind: str = "none"
    temperature: float = 0.1


def weights(settings: PreferenceWeights, history_means: chex.Array, counts: chex.Array) -> chex.Array:
    """Returns the multipliers.

    Args:
        settings: which.
        history_means: [K] float, mean past reward of each preference group, reward units; NaN where it has no past: under "dro" it then
            weighs 1, as nobody knows whether it is in need.
        counts: [K] int, completions of each in the batch.

    Returns:
        [K] float in the dtype of the means; mean 1 over the batch's completions, 1 where a preference group has none.

    Raises:
        ValueError: the kind is unknown.
    """
    chex.assert_rank([history_means, counts], 1)
    if settings.kind not in KINDS:
        raise ValueError(f"preference weights are {settings.kind!r}, must be one of {', '.join(KINDS)}: set algorithm.preference_weights")
    if settings.kind == "none":
        return jnp.ones_like(history_means)
    weighed = (counts > 0) & (jnp.isfinite(history_means) | (settings.kind == "balanced"))
    if settings.kind == "balanced":
        raw = 1 / jnp.maximum(counts, 1).astype(history_means.dtype)
    else:
        raw = jax.nn.softmax(jnp.where(weighed, -history_means / settings.temperature, -jnp.inf))
    raw, counted = jnp.where(weighed, raw, 0), jnp.where(weighed, counts, 0)
    share = counted.astype(history_means.dtype) / jnp.maximum(counted.sum(), 1).astype(history_means.dtype)
    mean = jnp.sum(raw * share)
    return jnp.where(weighed, raw / jnp.where(mean > 0, mean, 1), 1)
