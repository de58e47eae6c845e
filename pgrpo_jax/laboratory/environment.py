"""Floor 1: the laboratory's world: preference groups that disagree about one-token answers, and a policy that they partly share.

    logits   L[k, x, a] = θ0[x, a] + v·θ1[k, x, a]         θ0 shared, θ1 seen only as far as the preference group is visible (v)
    utility  u[k, x, a] = (1 − h·d_x)·((1 − δ)·common[x, a] + δ·own[k, x, a])^e                common, own uniform in [0, 1]
    reward   R = offset_k + scale_k·(b + noise_k·ε)         b = u, or 1 with probability u, else 0;  ε standard normal

Prompt difficulty d_x rises evenly from 0 to 1 over the contexts. What is reported is never R but the exact expected utility under the
policy, so offset, scale and noise change what the estimators see and not what is measured.

Letters: K preference groups, X contexts (prompts there are), A actions (answers), P prompts and N completions of a step.
"""

import dataclasses
from typing import Any, Mapping, Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np


_BOUNDS = {"disagreement": 1.0, "difficulty": 1.0, "binary": 1.0, "visibility": np.inf, "exponent": np.inf}


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Regime:
    """One world, as arrays, so that one compilation serves all of them. The preference group that matters (the minority) is the last.

    Attributes:
        shares: [K] float, share of the prompts that come from each preference group; they add up to 1.
        offsets: [K] float, reward units.
        scales: [K] float, reward units for one unit of utility.
        noise: [K] float, deviation of the reward noise, in units of utility.
        disagreement: scalar δ in [0, 1]; 0 = all want the same.
        visibility: scalar v >= 0; 0 = the policy cannot tell the preference groups apart.
        difficulty: scalar h in [0, 1]; the hardest context keeps 1 − h of its utilities.
        exponent: scalar e > 0; above 1 few answers are good.
        binary: scalar, 1.0 = the reward before noise is 0 or 1 with probability u, 0.0 = it is u.
    """

    shares: chex.Array
    offsets: chex.Array
    scales: chex.Array
    noise: chex.Array
    disagreement: chex.Array
    visibility: chex.Array
    difficulty: chex.Array
    exponent: chex.Array
    binary: chex.Array


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Policy:
    """The tabular softmax policy.

    Attributes:
        shared: [X, A] float, θ0.
        own: [K, X, A] float, θ1.
    """

    shared: chex.Array
    own: chex.Array


def stack(worlds: Sequence[Mapping[str, Any]]) -> Regime:
    """Puts worlds beside each other.

    Args:
        worlds: the fields of `Regime` of each, as plain numbers and tuples; all of the same K.

    Returns:
        `Regime`, float32, with a leading axis over the worlds.

    Raises:
        ValueError: where shares do not add up to 1, the lengths of a world's tuples differ, or a number is out of bounds.
    """
    names = [field.name for field in dataclasses.fields(Regime)]
    for world in worlds:
        if sorted(world) != sorted(names):
            raise ValueError(f"the world has {', '.join(sorted(world))}, must have {', '.join(sorted(names))}: name each once")
        lengths = {len(world[name]) for name in ("shares", "offsets", "scales", "noise")}
        if len(lengths) > 1:
            raise ValueError(f"shares, offsets, scales and noise have lengths {sorted(lengths)}: give one number for each preference group")
        if abs(sum(world["shares"]) - 1) > 1e-6:
            raise ValueError(f"shares add up to {sum(world['shares']):g}, must add up to 1: change them")
        for name, high in _BOUNDS.items():
            if not 0 <= world[name] <= high:
                raise ValueError(f"{name} = {world[name]:g} is outside [0, {high:g}]: change it")
    return Regime(**{name: jnp.asarray([world[name] for world in worlds], jnp.float32) for name in names})


def utilities(key: chex.PRNGKey, regime: Regime, *, num_contexts: int, num_actions: int) -> chex.Array:
    """Draws what every preference group thinks of every answer.

    Args:
        key: random key; the same key gives the same tastes in every regime of equal disagreement.
        regime: the world's numbers.
        num_contexts: X.
        num_actions: A.

    Returns:
        [K, X, A] float32 in [0, 1].
    """
    shape = (num_contexts, num_actions)
    common_key, own_key = jax.random.split(key)
    common = jax.random.uniform(common_key, shape)
    own = jax.random.uniform(own_key, (regime.shares.shape[0], *shape))
    taste = (1 - regime.disagreement) * common[None] + regime.disagreement * own
    kept = 1 - regime.difficulty * jnp.linspace(0.0, 1.0, num_contexts)
    return kept[None, :, None] * taste**regime.exponent


def initial_policy(num_preference_groups: int, *, num_contexts: int, num_actions: int) -> Policy:
    """Returns the uniform policy: all logits 0, float32."""
    shape = (num_contexts, num_actions)
    return Policy(shared=jnp.zeros(shape), own=jnp.zeros((num_preference_groups, *shape)))


def log_probs(policy: Policy, visibility: chex.Array) -> chex.Array:
    """Returns log π(a | k, x), [K, X, A]."""
    return jax.nn.log_softmax(policy.shared[None] + visibility * policy.own, axis=-1)


def policy_gradient(by_logits: chex.Array, visibility: chex.Array) -> Policy:
    """The chain rule through L = θ0 + v·θ1.

    Args:
        by_logits: [K, X, A] float, gradient of anything by the logits.
        visibility: scalar v.

    Returns:
        Its gradient by the policy.
    """
    return Policy(shared=jnp.sum(by_logits, axis=0), own=visibility * by_logits)


def normalised_rewards(log_probs: chex.Array, utilities: chex.Array) -> chex.Array:
    """True expected reward of every preference group: 0 for the uniform policy, 1 for the best answer everywhere.

    Args:
        log_probs: [K, X, A] float.
        utilities: [K, X, A] float; contexts are equally frequent.

    Returns:
        [K] float. With v < 1 or disagreement under v = 0 the 1 of all preference groups at once is out of the policy's reach.
    """
    expected = jnp.mean(jnp.sum(jnp.exp(log_probs) * utilities, axis=-1), axis=-1)
    random = jnp.mean(utilities, axis=(-2, -1))
    best = jnp.mean(jnp.max(utilities, axis=-1), axis=-1)
    return (expected - random) / (best - random)


def draw_from(probabilities: chex.Array, uniform: chex.Array) -> chex.Array:
    """Inverse of the cumulative distribution, so that one uniform number is one draw in every arm (common random numbers).

    Args:
        probabilities: [..., A] float, adding up to 1 over the last axis, up to rounding.
        uniform: [...] float in [0, 1).

    Returns:
        [...] int32 in [0, A).
    """
    below = jnp.cumsum(probabilities, axis=-1) <= uniform[..., None]
    return jnp.minimum(jnp.sum(below, axis=-1, dtype=jnp.int32), probabilities.shape[-1] - 1)


def at_least(shares: chex.Array, floor: chex.Array) -> chex.Array:
    """Lifts the shares below the floor to it; the others give way in proportion to what they have above it.

    Args:
        shares: [K] float, adding up to 1.
        floor: scalar in [0, 1/K].

    Returns:
        [K] float, adding up to 1, none below the floor.
    """
    above = jnp.maximum(shares - floor, 0)
    return floor + above * ((1 - shares.shape[0] * floor) / jnp.maximum(jnp.sum(above), 1e-30))


def observed_rewards(
    regime: Regime, utility: chex.Array, preference_ids: chex.Array, uniform: chex.Array, normal: chex.Array
) -> chex.Array:
    """The rewards that the estimators see.

    Args:
        regime: the world's numbers.
        utility: [N] float, u of the chosen answers.
        preference_ids: [N] int.
        uniform: [N] float in [0, 1), decides the binary rewards.
        normal: [N] float, standard normal.

    Returns:
        [N] float rewards R.
    """
    success = (uniform < utility).astype(utility.dtype)
    before_noise = regime.binary * success + (1 - regime.binary) * utility
    return regime.offsets[preference_ids] + regime.scales[preference_ids] * (before_noise + regime.noise[preference_ids] * normal)
