"""Floor 0: the mismatch kit: what to do where the policy that sampled is not the policy that is trained.

A completion sampled by π_behaviour (weights some updates old, or the same weights in a sampler that rounds differently) is worth
w = π_old/π_behaviour of itself to an update around π_old. Weighting by w gives back the expectation under π_old exactly; w has no
upper bound, and over the tokens of a completion it is a product, so it is held: truncated (IMPALA, arXiv:1802.01561, §4.1) or, beyond
its bounds, not trained on at all. With π_old recomputed by the learner as the proximal policy, clipping around it and these weights
together are decoupled PPO (arXiv:2110.00641, §3; AReaL, arXiv:2505.24298, §5.2). What each bound costs in bias and buys in variance
is tabulated in docs/experiments.md, by `laboratory.truncation`; what it makes of stale rollouts, by `laboratory.staleness`.

Letters: N completions, T tokens of a padded completion. Log-probs are in nats. Masked tokens may hold any log-prob.
"""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp

MAX_LOG_RATIO = 20.0  # nats. exp(20) is 5e8, far outside any useful bound; float32 overflows at exp(88), and inf·0 is NaN


def _token(log_ratios: chex.Array, counted: chex.Array) -> chex.Array:
    return log_ratios


def _sequence(log_ratios: chex.Array, counted: chex.Array) -> chex.Array:
    return jnp.broadcast_to(jnp.sum(log_ratios, axis=1, keepdims=True), log_ratios.shape)


def _geometric(log_ratios: chex.Array, counted: chex.Array) -> chex.Array:
    lengths = jnp.sum(counted, axis=1, keepdims=True, dtype=log_ratios.dtype)
    return _sequence(log_ratios, counted) / jnp.maximum(lengths, 1)


# What one weight spans, as the logarithm of the ratio that each token takes; log-ratios are 0 where nothing counts.
LEVELS = {"none": None, "token": _token, "sequence": _sequence, "geometric": _geometric}

# What happens to a weight out of bounds: truncated only from above, a small weight being no danger; masked on both sides.
BOUNDS = {
    "truncate": lambda weights, low, high: jnp.minimum(weights, high),
    "mask": lambda weights, low, high: jnp.where((weights >= low) & (weights <= high), weights, 0),
}


@dataclasses.dataclass(frozen=True)
class Correction:
    """How π_old/π_behaviour weighs the tokens of a completion.

    Attributes:
        level: key of `LEVELS`: "none" (weight 1), "token" (each token its own ratio: exact only for completions of one token),
            "sequence" (the product over the completion: exact for any length, variance grows with it) or "geometric" (the product's
            geometric mean over tokens: comparable over lengths, never exact).
        bound: key of `BOUNDS`: "truncate", min(w, high), or "mask", w where low <= w <= high, else 0.
        low: least weight that "mask" keeps, in [0, 1].
        high: greatest weight, at least 1; math.inf bounds nothing.

    Raises:
        ValueError: where a name is unknown or a number out of bounds.
    """

    level: str = "none"
    bound: str = "truncate"
    low: float = 0.5
    high: float = 2.0

    def __post_init__(self):
        for name, choices in (("level", LEVELS), ("bound", BOUNDS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"correction {name} is {getattr(self, name)!r}, must be one of {', '.join(choices)}: set one of them")
        if not 0 <= self.low <= 1:
            raise ValueError(f"correction low is {self.low}, must be in [0, 1]: a weight of 1, no mismatch, has to pass")
        if not 1 <= self.high <= math.inf:
            raise ValueError(f"correction high is {self.high}, must be at least 1: a weight of 1, no mismatch, has to pass")


def correction_weights(
    correction: Correction, old_log_probs: chex.Array, behaviour_log_probs: chex.Array, counted: chex.Array
) -> chex.Array:
    """Importance weights π_old/π_behaviour of tokens, held within bounds. They carry no gradient.

    Args:
        correction: level and bounds.
        old_log_probs: [N, T] float, under the policy around which the update is made.
        behaviour_log_probs: [N, T] float, under the policy that sampled, as its sampler reported them; not read at level "none".
        counted: [N, T] bool, True on sampled tokens of valid completions.

    Returns:
        [N, T] float: the weights; 1 where nothing counts, so that padding neither scales nor bounds. The log-ratio of a weight is held
        within ±`MAX_LOG_RATIO` before exp.
    """
    chex.assert_rank([old_log_probs, behaviour_log_probs, counted], 2)
    chex.assert_equal_shape([old_log_probs, behaviour_log_probs, counted])
    chex.assert_type(counted, bool)
    if correction.level == "none":
        return jnp.ones_like(old_log_probs)
    chex.assert_trees_all_equal_dtypes(old_log_probs, behaviour_log_probs)
    # Zeroed before they are added or raised: padding may hold NaN, or minus infinity on both sides.
    old, behaviour = [jnp.where(counted, x, 0) for x in (old_log_probs, behaviour_log_probs)]
    log_weights = LEVELS[correction.level](old - behaviour, counted)
    weights = jnp.exp(jnp.clip(log_weights, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    weights = BOUNDS[correction.bound](weights, correction.low, correction.high)
    return jax.lax.stop_gradient(jnp.where(counted, weights, 1))


def correction_terms(weights: chex.Array, correction: Correction = Correction()) -> dict[str, chex.Array]:
    """What the weights did, token by token; summed over the tokens that count they add up over micro-batches.

    Args:
        weights: [N, T] float, of `correction_weights`.
        correction: what made the weights; tells which of them were bounded (none at level "none").

    Returns:
        [N, T] each: `correction` (w), `correction_squared` (w², for `effective_sample_size`) and `correction_bounded` (tokens whose
        weight was truncated or masked). Divided by the number of tokens: mean weight, mean square and share bounded.
    """
    # Exactly the bound, or exactly 0: no weight within bounds is either, but one that met the bound by itself.
    edge = correction.high if correction.bound == "truncate" else 0.0
    bounded = (weights == edge) & (correction.level != "none")
    return {"correction": weights, "correction_squared": jnp.square(weights), "correction_bounded": bounded.astype(weights.dtype)}


def effective_sample_size(weight_sum: chex.Array, square_sum: chex.Array, count: chex.Array) -> chex.Array:
    """The share of a batch that weighted tokens are worth, (Σw)²/(n·Σw²) (Kish 1965): 1 where all weights are equal, 1/n where one rules.

    Args:
        weight_sum: scalar, Σw.
        square_sum: scalar, Σw².
        count: scalar n. With means in place of the two sums, 1.

    Returns:
        Scalar in [0, 1]; 0 where every weight is 0 or nothing counts.
    """
    square_sum, count = [jnp.asarray(x, jnp.result_type(weight_sum)) for x in (square_sum, count)]
    total = count * square_sum
    return jnp.where(total > 0, jnp.square(weight_sum) / jnp.where(total > 0, total, 1), 0)


def gap_statistics(gaps: chex.Array, counted: chex.Array) -> dict[str, chex.Array]:
    """Mean, 95th percentile and maximum of |gap| over all tokens that count. They do not add up: give the whole batch.

    Args:
        gaps: [..., T] float, differences of log-probs (sampler against learner, or π_old against π_θ), nats.
        counted: [..., T] bool, True on sampled tokens of valid completions.

    Returns:
        {"mean", "p95", "max"}: scalars, nats; 0 where nothing counts. `p95` is the smallest gap that at least 95 % of the tokens do not
        exceed: one of the gaps, not an interpolation.
    """
    chex.assert_equal_shape([gaps, counted])
    chex.assert_type(counted, bool)
    count = jnp.sum(counted, dtype=jnp.int32)
    sizes = jnp.abs(gaps)
    ordered = jnp.sort(jnp.where(counted, sizes, jnp.inf).ravel())
    rank = jnp.maximum(count - count // 20, 1) - 1  # ⌈0.95·n⌉ in whole numbers: float32 would round it
    mean = jnp.sum(jnp.where(counted, sizes, 0)) / jnp.maximum(count, 1).astype(gaps.dtype)
    largest = jnp.max(jnp.where(counted, sizes, 0), initial=0)
    return {"mean": mean, "p95": jnp.where(count > 0, ordered[rank], 0), "max": largest}
