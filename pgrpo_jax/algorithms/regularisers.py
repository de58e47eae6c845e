"""Floor 0: Grad2 of J: KL to a reference policy, in the loss or in the reward, and its adaptive coefficient.

Three estimators of KL(π_θ ‖ π_ref) from tokens that π_θ sampled, with x = π_ref/π_θ of the token (Schulman, "Approximating KL
divergence", 2020). As a *value* (metrics, penalties of the reward) and as a *loss* (differentiated) they are not the same thing:

| | value | mean of the value | gradient as a loss, on-policy in the mean |
|---|---|---|---|
| k1 | −log x | KL(π_θ ‖ π_ref), unbiased, of either sign | 0: ∇ log π_θ averages to nothing; in the loss it only adds noise |
| k2 | (log x)²/2 | biased, at least 0 | ∇ KL(π_θ ‖ π_ref): the gradient that k1 promises |
| k3 | x − 1 − log x | KL(π_θ ‖ π_ref), unbiased, at least 0 | ∇ KL(π_ref ‖ π_θ), the other direction, from (1 − x)·∇ log π_θ |

So KL(π_θ ‖ π_ref) is trained on by k1 in the reward or by k2 in the loss; GRPO's k3 in the loss (arXiv:2402.03300, eq. 4) pulls the
same way and agrees with it to first order near the reference.

Letters: N completions, T tokens. Log-probs are in nats; log-ratios are held within ±`policy_terms.MAX_LOG_RATIO`.
"""

from typing import Callable

import chex
import jax
import jax.numpy as jnp

from pgrpo_jax.algorithms.policy_terms import log_ratio


def k1(log_probs: chex.Array, reference_log_probs: chex.Array) -> chex.Array:
    """Estimates KL(π ‖ reference) by log π − log ref: unbiased, of either sign; no use in the loss (see the head).

    Args:
        log_probs: [N, T] float, under the policy that sampled the tokens.
        reference_log_probs: [N, T] float; carries no gradient.

    Returns:
        [N, T] float, nats. The log-ratio is held within ±`MAX_LOG_RATIO` (its gradient is 0 beyond), so it is always finite.
    """
    return -_log_reference_ratio(log_probs, reference_log_probs)


def k2(log_probs: chex.Array, reference_log_probs: chex.Array) -> chex.Array:
    """Estimates KL(π ‖ reference) by (log π − log ref)²/2; its gradient as a loss is that of the KL (REINFORCE++, arXiv:2501.03262).

    Args, Returns: as `k1`, at least 0.
    """
    return jnp.square(_log_reference_ratio(log_probs, reference_log_probs)) / 2


def k3(log_probs: chex.Array, reference_log_probs: chex.Array) -> chex.Array:
    """Estimates KL(π ‖ reference) by e^d − d − 1, d = log ref − log π (GRPO, arXiv:2402.03300, eq. 4).

    Args, Returns: as `k1`, at least 0.
    """
    difference = _log_reference_ratio(log_probs, reference_log_probs)
    # expm1 keeps what exp(d) − 1 rounds away: near d = 0 that would give −6e-8 in float32.
    return jnp.expm1(difference) - difference


def _log_reference_ratio(log_probs: chex.Array, reference_log_probs: chex.Array) -> chex.Array:
    """log ref − log π, the d of every estimator."""
    chex.assert_equal_shape([log_probs, reference_log_probs])
    chex.assert_trees_all_equal_dtypes(log_probs, reference_log_probs)
    return log_ratio(jax.lax.stop_gradient(reference_log_probs), log_probs)


ESTIMATORS: dict[str, Callable[[chex.Array, chex.Array], chex.Array]] = {"k1": k1, "k2": k2, "k3": k3}


def penalties(log_probs: chex.Array, reference_log_probs: chex.Array, counted: chex.Array, estimator: str) -> chex.Array:
    """The KL of each completion, to subtract β times from its reward (Ziegler et al., arXiv:1909.08593, eq. 2).

    Args:
        log_probs: [N, T] float, under the policy that sampled the tokens (π_old).
        reference_log_probs: [N, T] float.
        counted: [N, T] bool, True on the tokens that count; others may hold anything.
        estimator: key of `ESTIMATORS`; k1 is the unbiased one here.

    Returns:
        [N] float, nats, the sum over the completion's tokens; 0 for an empty completion. No gradient.

    Raises:
        ValueError: unknown estimator.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"kl_estimator is {estimator!r}, must be one of {', '.join(ESTIMATORS)}: set objective.kl_estimator")
    chex.assert_equal_shape([log_probs, reference_log_probs, counted])
    log_probs, reference_log_probs = [jnp.where(counted, x, 0) for x in (log_probs, reference_log_probs)]
    return jax.lax.stop_gradient(jnp.sum(ESTIMATORS[estimator](log_probs, reference_log_probs), axis=1))


def adapt(coefficient: chex.Array, kl: chex.Array, target: chex.Array, horizon: float) -> chex.Array:
    """The adaptive KL coefficient after an update (Ziegler et al., arXiv:1909.08593, §2.2): β·(1 + clip(KL/target − 1, ±0.2)/horizon).

    Args:
        coefficient: β, any shape: one for the run, or one for each preference group.
        kl: same shape, the KL measured in that update, in the units of the target (nats a token, say). NaN, "no token of this
            preference group in the batch", leaves β as it is.
        target: same shape, the KL to hold; positive.
        horizon: in updates, positive: one update changes β by at most 20 %/horizon. Ziegler's K_β = 0.1 is a horizon of 10.

    Returns:
        The new β, same shape and dtype; positive where it was.
    """
    chex.assert_trees_all_equal_shapes_and_dtypes(coefficient, kl, target)
    error = jnp.clip(kl / target - 1, -0.2, 0.2)
    return coefficient * (1 + jnp.where(jnp.isnan(error), 0, error) / horizon)
