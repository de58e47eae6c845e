"""Floor 2: whose gradient is it? The gradient of each preference group's part of the loss, beside the gradient that trains.

    g = Σ_p g_p,   g_p = ∇ (loss sum over the completions of preference group p) / (count of the whole batch)

All parts have the whole batch's divisor, so they add up to the batch's gradient g. Lengths and angles of the parts come from one Gram
matrix, Γ[p, q] = ⟨g_p, g_q⟩.
"""

import math
from typing import Any, Mapping

import chex
import jax
import jax.numpy as jnp
import numpy as np

from pgrpo_jax import parallel, update as updates
from pgrpo_jax.models.transformer import Transformer
from pgrpo_jax.structs import TrainBatch
from pgrpo_jax.update import LossSettings

_CANCELLED = 1e-6
"""|g|² below this share of Σ|g_p|² is rounding: the parts cancel, or there are none."""


def gradient_shares(
    params: Any,
    model: Transformer,
    settings: LossSettings,
    batch: TrainBatch,
    advantages: chex.Array,
    kl_coefficients: chex.Array,
    old_log_probs: chex.Array | None,
    reference_log_probs: chex.Array | None,
    *,
    frozen: Mapping[str, Any] = {},
) -> np.ndarray:
    """Measures the gradients of the preference groups and the angles between them.

    It costs K forward and backward passes over the batch and keeps K gradients, each as large as the parameters in float32 and laid out
    as they are: for a measurement every few updates, not for each one. With several processes all call it at the same place.

    Args:
        params: what is trained of the policy's parameters, on their devices; with weights that are in the learner's own layout.
        model: the transformer, as the learner runs it.
        settings: of the objective.
        batch: with a leading axis of micro-batches (`batching.micro_batches`), laid out as for `update.update`.
        advantages: [M, N/M].
        kl_coefficients: [K] float, beta of each preference group.
        old_log_probs: [M, N/M, Tc], or None where the policy itself generated the batch.
        reference_log_probs: [M, N/M, Tc], or None without a reference.
        frozen: the parameters that are not trained; {} = all are.

    Returns:
        [K, K] float64, the Gram matrix Γ; row and column of a preference group that is not in the batch are 0.
    """
    num_preference_groups = settings.num_preference_groups
    sliced = (batch, advantages, old_log_probs, reference_log_probs)
    parts, counts = [], []
    for p in range(num_preference_groups):
        gradient, count = preference_gradient(params, model, settings, kl_coefficients, sliced, p, frozen)
        parts.append(gradient)
        counts.append(count)
    total = max(1.0, sum(float(jax.device_get(count)) for count in counts))
    gram = np.zeros((num_preference_groups, num_preference_groups))
    dot = parallel.compiled(_dot, None)
    for p in range(num_preference_groups):
        for q in range(p + 1):
            gram[p, q] = gram[q, p] = float(jax.device_get(dot(parts[p], parts[q]))) / total**2
    return gram


def preference_gradient(
    params: Any, model: Transformer, settings: LossSettings, kl_coefficients: chex.Array, parts: tuple[Any, ...], preference_id: int,
    frozen: Mapping[str, Any] = {},
) -> tuple[Any, chex.Array]:  # fmt: skip
    """Gradient of the loss sum over the completions of one preference group, accumulated over micro-batches.

    Args:
        params: what is trained of the policy's parameters, on their devices.
        model: the transformer.
        settings: of the objective.
        kl_coefficients: [K] float.
        parts: (batch, advantages, old log-probs, reference log-probs), each with a leading axis of micro-batches.
        preference_id: p; one program serves all.
        frozen: the parameters that are not trained.

    Returns:
        (gradient, laid out as the parameters and not yet divided; the count to divide by, which adds up over preference groups).
    """
    shardings = jax.tree.map(lambda x: x.sharding, params)
    program = parallel.compiled(_gradient, (shardings, None), model=model, settings=settings)
    return program(params, kl_coefficients, parts, np.int32(preference_id), frozen)


def _gradient(params, kl_coefficients, parts, preference_id, frozen, *, model: Transformer, settings: LossSettings) -> Any:
    def add(carry: Any, part: tuple[Any, ...]) -> tuple[Any, None]:
        batch, advantages, *fixed = part
        own = batch.replace(valid=batch.valid & (batch.preference_ids == preference_id)[batch.prompt_index])
        (_, (count, *_)), gradient = jax.value_and_grad(updates.loss_sums, has_aux=True)(
            params, model, settings, own, advantages, kl_coefficients, *fixed, frozen
        )
        return jax.tree.map(jnp.add, carry, (gradient, count)), None

    start = jax.tree.map(jnp.zeros_like, params), jnp.zeros((), parts[1].dtype)
    return jax.lax.scan(add, start, parts)[0]


def _dot(a: Any, b: Any) -> chex.Array:
    """⟨a, b⟩ over all leaves, in their dtype (that of the state, float32): a sum of products, so that no matrix unit rounds them."""
    return sum(jax.tree.leaves(jax.tree.map(lambda x, y: jnp.sum(x * y), a, b)))


def shares(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reads the Gram matrix of the parts of a gradient.

    Args:
        gram: [K, K].

    Returns:
        (share [K] = ⟨g_p, g⟩ / |g|², what of the update's length along g comes from p: adds up to 1, below 0 where p is pushed back, NaN
        where the parts cancel; norm share [K] = |g_p| / Σ_q |g_q|, NaN without any gradient; cosines [K, K], NaN where either is 0).
    """
    norms = np.sqrt(np.maximum(np.diag(gram), 0.0))
    along, squared, trace = gram.sum(axis=1), gram.sum(), np.diag(gram).sum()
    share = along / squared if squared > _CANCELLED * trace else np.full(len(gram), np.nan)
    norm_share = norms / norms.sum() if norms.sum() > 0 else np.full(len(gram), np.nan)
    lengths = np.outer(norms, norms)
    cosines = np.where(lengths > 0, gram / np.where(lengths > 0, lengths, 1.0), np.nan)
    return share, norm_share, np.clip(cosines, -1.0, 1.0)


def describe(gram: np.ndarray) -> dict[str, Any]:
    """Makes metrics of a Gram matrix.

    Args:
        gram: [K, K], of `gradient_shares`.

    Returns:
        `preference_group/{p}/gradient_share` and `/gradient_norm_share`; `gradient_cosine/min` and `/mean` over the pairs of preference
        groups that both have a gradient, NaN where there is no such pair; `gradient_cosine/matrix`, K lists of K numbers.
    """
    share, norm_share, cosines = shares(gram)
    pairs = cosines[np.triu_indices(len(gram), 1)]
    pairs = pairs[np.isfinite(pairs)]
    metrics = {}
    for p in range(len(gram)):
        metrics[f"preference_group/{p}/gradient_share"] = float(share[p])
        metrics[f"preference_group/{p}/gradient_norm_share"] = float(norm_share[p])
    return metrics | {
        "gradient_cosine/min": float(pairs.min()) if pairs.size else math.nan,
        "gradient_cosine/mean": float(pairs.mean()) if pairs.size else math.nan,
        "gradient_cosine/matrix": cosines.tolist(),
    }
