"""Floor 0: the policy-gradient term, Grad1 of J, and the objective's own importance weight, IS (RLAX, arXiv:2512.06392, §4).

Everything starts from the token's probability ratio r = π_θ/π_old. A term is what advantages multiply *and* differentiate; an
importance weight never carries gradient. The ratio of a completion is the product of its tokens' ratios (an unbiased weight of the
whole completion) or their geometric mean (GSPO: the same for every length). Where old_log_probs is the stopped gradient of log_probs
every ratio is exactly 1 and nothing is clipped.

Letters: N completions, T tokens of a padded completion. Log-probs are in nats. Functions that take `counted` ignore what other
tokens hold; the rest expects finite log-probs everywhere (`objective.policy_loss` zeroes the others before any exp).
"""

from typing import Callable

import chex
import jax
import jax.numpy as jnp

MAX_LOG_RATIO = 20.0  # nats. exp(20) is 5e8, far outside any clip range; float32 overflows at exp(88), and inf·0 is NaN

Term = tuple[chex.Array, chex.Array]


def log_ratio(numerator: chex.Array, denominator: chex.Array) -> chex.Array:
    """Returns numerator − denominator (nats, any shape), held within ±`MAX_LOG_RATIO`; beyond it the gradient is 0."""
    return jnp.clip(numerator - denominator, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def sequence_log_ratio(log_probs: chex.Array, old_log_probs: chex.Array, counted: chex.Array, *, mean: bool) -> chex.Array:
    """The log-ratio of a completion, at every one of its tokens: the sum over its tokens, or their mean (GSPO, arXiv:2507.18071, eq. 7).

    Args:
        log_probs: [N, T] float, under the policy that is trained.
        old_log_probs: [N, T] float, under the policy before the update.
        counted: [N, T] bool, True on the tokens that count.
        mean: True divides by the number of tokens, which makes the ratio a geometric mean.

    Returns:
        [N, T] float, equal along a row, 0 for an empty completion; held within ±`MAX_LOG_RATIO`.
    """
    difference = jnp.sum(jnp.where(counted, log_probs - old_log_probs, 0), axis=1)
    if mean:
        difference = difference / jnp.maximum(jnp.sum(counted, axis=1, dtype=difference.dtype), 1)
    return jnp.broadcast_to(jnp.clip(difference, -MAX_LOG_RATIO, MAX_LOG_RATIO)[:, None], log_probs.shape)


def clipped_surrogate(
    log_ratios: chex.Array, advantages: chex.Array, *, clip_low: float, clip_high: float, dual_clip: float = 0.0
) -> Term:
    """PPO's clipped surrogate (arXiv:1707.06347, eq. 7), with a bound for each side and, as an option, a third where A < 0.

    Written by cases rather than with `minimum`, so that the gradient is M·r·A·∇log π everywhere, ties included (RLAX,
    arXiv:2512.06392, §4): M = 0 where A > 0 and r > 1 + clip_high, or A < 0 and r < 1 − clip_low; else 1. The third bound is
    dual-clip PPO's (arXiv:1912.09729, eq. 5): M = 0 where A < 0 and r > dual_clip, so that one very unlikely token of a bad
    completion cannot dominate.

    Args:
        log_ratios: [N, T] float, log r, of a token or of its completion; carries the gradient.
        advantages: [N] float, one for each completion; carries no gradient.
        clip_low: ε below 1.
        clip_high: ε above 1.
        dual_clip: largest r where A < 0; 0 = off.

    Returns:
        ([N, T] objective to maximise, [N, T] bool, True where the token is clipped, M = 0).
    """
    chex.assert_rank([log_ratios, advantages], [2, 1])
    chex.assert_equal_shape_prefix([log_ratios, advantages], 1)
    chex.assert_trees_all_equal_dtypes(log_ratios, advantages)
    ratio = jnp.exp(log_ratios)
    advantage = jnp.broadcast_to(jax.lax.stop_gradient(advantages)[:, None], ratio.shape)
    too_high = (advantage > 0) & (ratio > 1 + clip_high)
    too_low = (advantage < 0) & (ratio < 1 - clip_low)
    bounded = jnp.where(too_high, 1 + clip_high, jnp.where(too_low, 1 - clip_low, ratio))
    clipped = too_high | too_low
    if dual_clip:
        far = (advantage < 0) & (ratio > dual_clip)
        bounded, clipped = jnp.where(far, dual_clip, bounded), clipped | far
    return bounded * advantage, clipped


def _ratio(log_probs, old_log_probs, advantages, counted, bounds) -> Term:
    return clipped_surrogate(log_ratio(log_probs, old_log_probs), advantages, **bounds)


def _sequence_ratio(log_probs, old_log_probs, advantages, counted, bounds) -> Term:
    return clipped_surrogate(sequence_log_ratio(log_probs, old_log_probs, counted, mean=True), advantages, **bounds)


def _log_prob(log_probs, old_log_probs, advantages, counted, bounds) -> Term:
    return log_probs * jax.lax.stop_gradient(advantages)[:, None], jnp.zeros_like(counted)


# Name → (log_probs [N, T], old_log_probs [N, T], advantages [N], counted [N, T], bounds of `clipped_surrogate`) →
# ([N, T] A·Grad1 as a value to differentiate, [N, T] bool, clipped).
POLICY_TERMS: dict[str, Callable[..., Term]] = {
    "ratio": _ratio,  # M·r of the token (PPO, GRPO)
    "sequence_ratio": _sequence_ratio,  # M·s, s the geometric mean of the completion's ratios, with its gradient (GSPO, arXiv:2507.18071)
    "log_prob": _log_prob,  # log π_θ, never clipped (REINFORCE, RLOO, CISPO)
}


def _no_weight(log_probs, old_log_probs, counted, clip_low, clip_high) -> Term:
    return jnp.ones_like(log_probs), jnp.zeros_like(counted)


def _token_weight(log_probs, old_log_probs, counted, clip_low, clip_high) -> Term:
    return jnp.exp(log_ratio(log_probs, old_log_probs)), jnp.zeros_like(counted)


def _sequence_weight(log_probs, old_log_probs, counted, clip_low, clip_high) -> Term:
    return jnp.exp(sequence_log_ratio(log_probs, old_log_probs, counted, mean=False)), jnp.zeros_like(counted)


def _clipped_weight(log_probs, old_log_probs, counted, clip_low, clip_high) -> Term:
    ratio = jnp.exp(log_ratio(log_probs, old_log_probs))
    return jnp.clip(ratio, 1 - clip_low, 1 + clip_high), (ratio < 1 - clip_low) | (ratio > 1 + clip_high)


# Name → (log_probs [N, T], old_log_probs [N, T], counted [N, T], ε low, ε high) → ([N, T] weights, [N, T] bool, bounded).
IMPORTANCE: dict[str, Callable[..., Term]] = {
    "none": _no_weight,
    "ratio": _token_weight,  # r of the token
    "sequence_ratio": _sequence_weight,  # Π r over the completion: REINFORCE off-policy, unbiased
    "clipped_ratio": _clipped_weight,  # clip(r, 1 − ε_low, 1 + ε_high): CISPO (arXiv:2506.13585, eq. 5)
}
