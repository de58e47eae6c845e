"""Floor 0: the policy objective as a composition of five independent values (RLAX, arXiv:2512.06392, §4):

    J = E[ Σ_i Σ_t sg[Agg·IS]·( sg[Adv]·Grad1 + Grad2 ) ]     sg: no gradient;  r = π_θ/π_old of one token

Agg is the `aggregation`; IS the objective's own `importance` weight (π_θ against π_old) times the `correction` of a sampler that was not
π_old; Adv the advantages (`advantages.estimate`); Grad1 the `policy_term`; Grad2 = −β·KL + c·entropy. The named algorithms are
compositions of these (`presets.PRESETS`). With π_old recomputed by the learner and the correction on, this is decoupled PPO
(AReaL, arXiv:2505.24298): clipped around π_old, the proximal policy, and weighted by π_old/π_behaviour.

Functions return sums and counts, never means, so that micro-batches of whole prompts add up to exactly the whole batch; dividing
is the caller's last step.

Letters: N completions, T tokens of a padded completion, P prompts. Log-probs are in nats. Masked tokens may hold any log-prob.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp

from pgrpo_jax.algorithms import aggregation, importance, policy_terms, regularisers
from pgrpo_jax.algorithms.importance import Correction


@dataclasses.dataclass(frozen=True)
class Objective:
    """The parts of J apart from the advantage and β, each an independent choice; the defaults are GRPO's.

    Attributes:
        aggregation: key of `aggregation.AGGREGATIONS`: "completion", "prompt_tokens", "batch_tokens", "max_length" or "sum".
        importance: key of `policy_terms.IMPORTANCE`: "none", "ratio", "sequence_ratio" or "clipped_ratio".
        policy_term: key of `policy_terms.POLICY_TERMS`: "ratio", "sequence_ratio" or "log_prob".
        clip_low: ε below 1 of the ratio, in (0, 1]; 1 bounds nothing. Read by "ratio", "sequence_ratio" and "clipped_ratio".
        clip_high: ε above 1, positive.
        dual_clip: largest ratio where A < 0, more than 1; 0 = off. Read by the policy terms that clip.
        kl_estimator: key of `regularisers.ESTIMATORS`: "k1", "k2" or "k3".
        kl_in: "loss", or "reward": then the loss has no KL, and the caller subtracts β·`regularisers.penalties` from the rewards.
        entropy_coefficient: c of the entropy bonus, nats a token; at least 0.
        max_length: L_max, tokens, of the aggregation "max_length".
        correction: weight of π_old against the policy that sampled; see `importance.Correction`.
    """

    aggregation: str = "completion"
    importance: str = "none"
    policy_term: str = "ratio"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 0.0
    kl_estimator: str = "k3"
    kl_in: str = "loss"
    entropy_coefficient: float = 0.0
    max_length: int = 0
    correction: Correction = Correction()


def policy_loss(
    log_probs: chex.Array, old_log_probs: chex.Array, behaviour_log_probs: chex.Array, reference_log_probs: chex.Array | None,
    entropies: chex.Array, advantages: chex.Array, kl_coefficients: chex.Array, mask: chex.Array, valid: chex.Array,
    prompt_index: chex.Array, *, objective: Objective, num_prompts: int,
) -> tuple[chex.Array, chex.Array, dict[str, chex.Array]]:
    """The loss −J as a sum and its count: loss_sum / count, both added up over micro-batches of whole prompts.

    Only log_probs and, where the entropy coefficient is not 0, entropies carry gradient.

    Args:
        log_probs: [N, T] float, under the policy that is trained.
        old_log_probs: [N, T] float, under π_old, the policy before the update; its stopped gradient where it is π_θ itself.
        behaviour_log_probs: [N, T] float, under the policy that sampled, as its sampler reported them; read by the correction.
        reference_log_probs: [N, T] float, under the reference policy; None computes no KL.
        entropies: [N, T] float, nats, of the trained policy's distribution at each token.
        advantages: [N] float.
        kl_coefficients: [N] float, β of each completion, so that a preference group can have its own; 0 measures the KL without
            training on it. Not read with kl_in "reward". A valid completion with β ≠ 0 and no reference makes the loss NaN.
        mask: [N, T] bool, True on sampled tokens.
        valid: [N] bool, False on rows that only pad the batch.
        prompt_index: [N] int, the prompt of each completion, in [0, P).
        objective: the parts of J.
        num_prompts: P.

    Returns:
        (scalar loss_sum, scalar count, sums). `sums` are [N], for each completion over its tokens that count, `token_count` of them (not
        over the batch: whoever measures adds up, by preference group or over all): `clipped` (tokens whose ratio is bounded, in the
        policy term or the importance weight), `ratio` (π_θ/π_old), `old_kl` (nats, k3 of π_old against π_θ), `entropy` (nats), only
        with a reference `kl` (nats, k3 whatever estimator is trained on, so that runs compare), and those of
        `importance.correction_terms`.

    Raises:
        ValueError: where a part has an unknown name.
    """
    counted = mask & valid[:, None]
    # Zeroed before any exp: a NaN or inf in the padding would survive multiplication by a zero weight, and in the gradient too.
    log_probs, old_log_probs, entropies = [jnp.where(counted, x, 0) for x in (log_probs, old_log_probs, entropies)]
    if reference_log_probs is not None:
        reference_log_probs = jnp.where(counted, reference_log_probs, 0)
    advantages, kl_coefficients = [jnp.where(valid, x, 0) for x in (advantages, kl_coefficients)]
    old_log_probs = jax.lax.stop_gradient(old_log_probs)

    weights, count = aggregation.token_weights(
        objective.aggregation, mask, valid, prompt_index, num_prompts=num_prompts, max_length=objective.max_length, dtype=log_probs.dtype
    )
    ratio_weights, bounded = _named(policy_terms.IMPORTANCE, objective, "importance")(
        log_probs, old_log_probs, counted, objective.clip_low, objective.clip_high
    )
    corrections = importance.correction_weights(objective.correction, old_log_probs, behaviour_log_probs, counted)
    bounds = {"clip_low": objective.clip_low, "clip_high": objective.clip_high, "dual_clip": objective.dual_clip}
    gain, clipped = _named(policy_terms.POLICY_TERMS, objective, "policy_term")(log_probs, old_log_probs, advantages, counted, bounds)
    gain = gain + _regulariser(log_probs, reference_log_probs, entropies, kl_coefficients, objective)
    weights = jax.lax.stop_gradient(weights * ratio_weights * corrections)

    per_token = {
        "token_count": jnp.ones_like(log_probs),
        "clipped": (clipped | bounded).astype(log_probs.dtype),
        "ratio": jnp.exp(policy_terms.log_ratio(log_probs, old_log_probs)),
        "old_kl": regularisers.k3(old_log_probs, log_probs),
        "entropy": entropies,
    }
    if reference_log_probs is not None:
        per_token["kl"] = regularisers.k3(log_probs, reference_log_probs)
    per_token |= importance.correction_terms(corrections, objective.correction)
    sums = {name: jnp.sum(jnp.where(counted, x, 0), axis=1) for name, x in per_token.items()}
    return -jnp.sum(weights * gain), count, jax.lax.stop_gradient(sums)


def _named(choices, objective: Objective, part: str):
    """The function that a part of the objective names."""
    name = getattr(objective, part)
    if name not in choices:
        raise ValueError(f"{part} is {name!r}, must be one of {', '.join(choices)}: set objective.{part}")
    return choices[name]


def _regulariser(log_probs, reference_log_probs, entropies, kl_coefficients, objective: Objective) -> chex.Array:
    """Grad2, [N, T]: −β·KL where the KL belongs to the loss, plus the entropy bonus."""
    estimate = _named(regularisers.ESTIMATORS, objective, "kl_estimator")
    if objective.kl_in not in ("loss", "reward"):
        raise ValueError(f"kl_in is {objective.kl_in!r}, must be loss or reward: set objective.kl_in")
    gain = jnp.zeros_like(log_probs)
    if objective.kl_in == "loss" and reference_log_probs is not None:
        gain = -jax.lax.stop_gradient(kl_coefficients)[:, None] * estimate(log_probs, reference_log_probs)
    elif objective.kl_in == "loss":
        # A β without a reference would silently train without a KL: NaN shows in the loss.
        gain = jnp.broadcast_to(jnp.where(kl_coefficients == 0, 0, jnp.nan).astype(log_probs.dtype)[:, None], log_probs.shape)
    if objective.entropy_coefficient:
        gain = gain + objective.entropy_coefficient * entropies
    return gain
