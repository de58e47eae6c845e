"""Floor 0: the policy objective, token by token: clipped surrogate and KL to a reference (GRPO, arXiv:2402.03300, eq. 3).

    J = E[ 1/G Σ_i 1/len_i Σ_t ( min(r·A_i, clip(r, 1−ε_low, 1+ε_high)·A_i) − β·k3 ) ],   r = π_θ/π_old of one token

P-GRPO (arXiv:2603.10009) changes the advantage A_i and leaves this alone. Functions return sums and counts, never means, so
that micro-batches add up to exactly the whole batch; dividing is the caller's last step.

Letters: N completions, T tokens of a padded completion. Log-probs are in nats. Masked tokens may hold any log-prob.
"""

import chex
import jax
import jax.numpy as jnp

MAX_LOG_RATIO = 20.0  # nats. exp(20) is 5e8, far outside any clip range; float32 overflows at exp(88), and inf·0 is NaN


def _log_ratio(numerator: chex.Array, denominator: chex.Array) -> chex.Array:
    """numerator − denominator, held within ±MAX_LOG_RATIO; beyond it the gradient is 0."""
    return jnp.clip(numerator - denominator, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def clipped_surrogate(
    log_probs: chex.Array, old_log_probs: chex.Array, advantages: chex.Array, *, clip_low: float, clip_high: float
) -> tuple[chex.Array, chex.Array]:
    """PPO's clipped surrogate (arXiv:1707.06347, eq. 7), with a bound for each side.

    Written by cases rather than with `minimum`, so that the gradient is M·r·A·∇log π everywhere, ties included (RLAX,
    arXiv:2512.06392, §4): M = 0 where A > 0 and r > 1 + clip_high, or A < 0 and r < 1 − clip_low; else 1. Where old_log_probs
    is the stopped gradient of log_probs the ratio is exactly 1 and nothing is clipped.

    Args:
        log_probs: [N, T] float, under the policy that is trained.
        old_log_probs: [N, T] float, under the policy before the update; carries no gradient.
        advantages: [N] float, one for each completion; carries no gradient.
        clip_low: ε below 1.
        clip_high: ε above 1.

    Returns:
        ([N, T] objective to maximise, [N, T] bool, True where the token is clipped, M = 0).
    """
    chex.assert_rank([log_probs, old_log_probs, advantages], [2, 2, 1])
    chex.assert_equal_shape([log_probs, old_log_probs])
    chex.assert_equal_shape_prefix([log_probs, advantages], 1)
    chex.assert_trees_all_equal_dtypes(log_probs, old_log_probs, advantages)
    ratio = jnp.exp(_log_ratio(log_probs, jax.lax.stop_gradient(old_log_probs)))
    advantage = jnp.broadcast_to(jax.lax.stop_gradient(advantages)[:, None], ratio.shape)
    too_high = (advantage > 0) & (ratio > 1 + clip_high)
    too_low = (advantage < 0) & (ratio < 1 - clip_low)
    bounded = jnp.where(too_high, 1 + clip_high, jnp.where(too_low, 1 - clip_low, ratio))
    return bounded * advantage, too_high | too_low


def k3(log_probs: chex.Array, reference_log_probs: chex.Array) -> chex.Array:
    """Estimates KL(π ‖ reference) from tokens sampled by π: e^d − d − 1, d = log ref − log π (GRPO, arXiv:2402.03300, eq. 4).

    Args:
        log_probs: [N, T] float, under the policy that is trained.
        reference_log_probs: [N, T] float; carries no gradient.

    Returns:
        [N, T] float, at least 0. d is held within ±`MAX_LOG_RATIO` (its gradient is 0 beyond), so it is always finite.
    """
    chex.assert_equal_shape([log_probs, reference_log_probs])
    chex.assert_trees_all_equal_dtypes(log_probs, reference_log_probs)
    difference = _log_ratio(jax.lax.stop_gradient(reference_log_probs), log_probs)
    # expm1 keeps what exp(d) − 1 rounds away: near d = 0 that would give −6e-8 in float32.
    return jnp.expm1(difference) - difference


def completion_weights(mask: chex.Array, valid: chex.Array, *, dtype: jnp.dtype = jnp.float32) -> tuple[chex.Array, chex.Array]:
    """GRPO's aggregation, 1/(G·len): every completion weighs the same, its tokens share the weight.

    An empty completion adds nothing to the sum and still counts: it was sampled, and dropping it would let the other
    completions of the batch push harder.

    Args:
        mask: [N, T] bool, True on sampled tokens.
        valid: [N] bool, False on rows that only pad the batch.
        dtype: floating dtype of the results.

    Returns:
        ([N, T] weights: 1/len_i on the sampled tokens of a valid completion, else 0; scalar count of valid completions).
    """
    chex.assert_rank([mask, valid], [2, 1])
    chex.assert_equal_shape_prefix([mask, valid], 1)
    chex.assert_type([mask, valid], bool)
    counted = mask & valid[:, None]
    lengths = jnp.sum(counted, axis=1, dtype=dtype)
    weights = counted.astype(dtype) / jnp.maximum(lengths, 1)[:, None]
    return weights, jnp.sum(valid, dtype=dtype)


def policy_loss(
    log_probs: chex.Array, old_log_probs: chex.Array, reference_log_probs: chex.Array | None, advantages: chex.Array,
    mask: chex.Array, valid: chex.Array, *, clip_low: float, clip_high: float, kl_coefficient: float,
) -> tuple[chex.Array, chex.Array, dict[str, chex.Array]]:
    """The loss of GRPO and P-GRPO, as a sum and its count: loss_sum / completion_count is −J of the module's head.

    Args:
        log_probs: [N, T] float, under the policy that is trained. Only they carry gradient.
        old_log_probs: [N, T] float, under the policy before the update.
        reference_log_probs: [N, T] float, under the reference policy; None computes no KL.
        advantages: [N] float.
        mask: [N, T] bool, True on sampled tokens.
        valid: [N] bool, False on rows that only pad the batch.
        clip_low: ε below 1.
        clip_high: ε above 1.
        kl_coefficient: β; with β = 0 and a reference the KL is measured but not trained on.

    Returns:
        (scalar loss_sum, scalar completion_count, sums). `sums` are scalars over the tokens that count: `token_count`,
        `clipped` (tokens), `ratio` (π_θ/π_old), `old_kl` (nats, k3 of the old policy against the trained one) and, only with
        a reference, `kl` (nats). Divided by `token_count` they are means over tokens.

    Raises:
        ValueError: where β is not 0 and there is no reference.
    """
    if reference_log_probs is None and kl_coefficient != 0:
        raise ValueError(f"kl_coefficient is {kl_coefficient} without a reference, must be 0: pass reference_log_probs or set it to 0")
    weights, completion_count = completion_weights(mask, valid, dtype=log_probs.dtype)
    counted = mask & valid[:, None]
    # Zeroed before any exp: a NaN or inf in the padding would survive multiplication by a zero weight, and in the gradient too.
    log_probs, old_log_probs = [jnp.where(counted, x, 0) for x in (log_probs, old_log_probs)]
    advantages = jnp.where(valid, advantages, 0)
    objective, clipped = clipped_surrogate(log_probs, old_log_probs, advantages, clip_low=clip_low, clip_high=clip_high)
    per_token = {
        "token_count": jnp.ones_like(log_probs),
        "clipped": clipped.astype(log_probs.dtype),
        "ratio": jnp.exp(_log_ratio(log_probs, old_log_probs)),
        "old_kl": k3(old_log_probs, log_probs),
    }
    if reference_log_probs is not None:
        per_token["kl"] = k3(log_probs, jnp.where(counted, reference_log_probs, 0))
        objective = objective - kl_coefficient * per_token["kl"]
    sums = {name: jax.lax.stop_gradient(jnp.sum(jnp.where(counted, x, 0))) for name, x in per_token.items()}
    return -jnp.sum(weights * objective), completion_count, sums
