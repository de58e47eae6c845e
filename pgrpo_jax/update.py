"""The update: a pure jitted function (state, batch, advantages) → state, with gradients accumulated over sums and counts."""

import dataclasses
import functools
import math
from typing import Any, Mapping

import chex
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from pgrpo_jax import parallel
from pgrpo_jax.algorithms import importance, objective, regularisers
from pgrpo_jax.algorithms.objective import Objective
from pgrpo_jax.algorithms.reward_history import segment_sum
from pgrpo_jax.generation.sampler import Support
from pgrpo_jax.generation.scoring import score
from pgrpo_jax.models import lora
from pgrpo_jax.models.mesh import ROWS
from pgrpo_jax.models.transformer import Transformer
from pgrpo_jax.optimiser import make_optimiser, OptimiserSettings
from pgrpo_jax.structs import TrainBatch, TrainState


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """What the loss is made of.

    Attributes:
        objective: the five parts of `objective.policy_loss`.
        support: the sampling distribution that completions were drawn from.
        num_preference_groups: K.
    """

    objective: Objective
    support: Support
    num_preference_groups: int


def loss_sums(
    params: Any,
    model: Transformer,
    settings: LossSettings,
    batch: TrainBatch,
    advantages: chex.Array,
    kl_coefficients: chex.Array,
    old_log_probs: chex.Array | None,
    reference_log_probs: chex.Array | None,
    frozen: Mapping[str, Any] = {},
) -> tuple[chex.Array, tuple[chex.Array, dict[str, chex.Array], chex.Array]]:
    """The objective over one slice of a batch, as a sum and its count that add up over slices.

    Args:
        params: what is trained of the policy's parameters.
        batch: prompts [P, Tp] and completions [N, Tc], those of a prompt together and equally many for each.
        advantages: [N] float.
        kl_coefficients: [K] float, beta of each preference group.
        old_log_probs: [N, Tc], or None where pi_old is the policy itself: then it is its stopped gradient.
        reference_log_probs: [N, Tc], or None where no KL is paid in the loss.
        frozen: the parameters that are not trained; {} = all are.

    Returns:
        (loss sum, (count to divide it by, sums, gaps)). `sums` are [N], over the tokens of each completion, see `objective.policy_loss`.
        `gaps` are |differences of log-probs| [N, 2, Tc], old policy to sampler and policy to old policy, -1 where nothing is counted.
    """
    log_probs, entropies = score(model, lora.joined(frozen, params), batch, settings.support)
    fixed = jax.lax.stop_gradient(log_probs)
    old = fixed if old_log_probs is None else old_log_probs
    behaviour = batch.behaviour_log_probs.astype(log_probs.dtype)
    # The rows of a prompt lie together, equally many for each: spreading needs no exchange between devices, looking up would.
    per_prompt = batch.valid.shape[0] // batch.prompts.shape[0]
    preference_ids = jnp.broadcast_to(batch.preference_ids[:, None], (batch.prompts.shape[0], per_prompt)).reshape(-1)
    loss, count, sums = objective.policy_loss(
        log_probs,
        old,
        behaviour,
        reference_log_probs,
        entropies,
        advantages,
        jnp.take(kl_coefficients, preference_ids).astype(log_probs.dtype),
        batch.completion_mask,
        batch.valid,
        batch.prompt_index,
        objective=settings.objective,
        num_prompts=batch.prompts.shape[0],
    )
    counted = batch.completion_mask & batch.valid[:, None]
    gaps = jnp.where(counted[:, None], jnp.abs(jnp.stack([old - behaviour, fixed - old], axis=1)), -1)
    return loss, (count, sums, jax.lax.stop_gradient(gaps))


def accumulate(params, model, settings, batch, advantages, kl_coefficients, old_log_probs, reference_log_probs, frozen={}):
    """Gradient and metrics of the whole batch, slice by slice; dividing once by the count makes the slicing invisible.

    Args:
        batch, advantages, old_log_probs, reference_log_probs: as `loss_sums`, with a leading axis of micro-batches.
        kl_coefficients: [K] float.
        frozen: the parameters that are not trained.

    Returns:
        (gradient of the loss, the loss = loss sum / count; sums and gaps with the axis of micro-batches).
    """
    gradient = jax.value_and_grad(loss_sums, has_aux=True)
    parts = (batch, advantages, old_log_probs, reference_log_probs)

    def arguments(part):
        of_batch, of_advantages, old, reference = part
        return params, model, settings, of_batch, of_advantages, kl_coefficients, old, reference, frozen

    def add(carry, part):
        (new_loss, (new_count, sums, gaps)), new_grads = gradient(*arguments(part))
        return jax.tree.map(jnp.add, carry, (new_grads, new_loss, new_count)), (sums, gaps)

    zero = jnp.zeros((), advantages.dtype)
    (grads, loss, count), (sums, gaps) = jax.lax.scan(add, (jax.tree.map(jnp.zeros_like, params), zero, zero), parts)
    count = jnp.maximum(count, jnp.ones_like(count))
    return jax.tree.map(lambda g: g / count.astype(g.dtype), grads), loss / count, sums, gaps


def update(
    state: TrainState,
    model: Transformer,
    settings: LossSettings,
    optimiser_settings: OptimiserSettings,
    batch: TrainBatch,
    advantages: chex.Array,
    old_log_probs: chex.Array | None,
    reference_log_probs: chex.Array | None,
    *,
    frozen: Mapping[str, Any] = {},
    present: Any = None,
) -> tuple[TrainState, dict[str, chex.Array]]:
    """One optimiser step on one batch; `state` is donated, and the new one lies where it lay.

    Args:
        state: training state, on its devices; `step`, `next_work`, `history` and `objective` are left to the caller. Of `objective` the
            loss reads "kl_coefficients" [K]; without it they are 0.
        batch: with a leading axis of micro-batches (`batching.micro_batches`), as the three arrays after it.
        frozen: the parameters that are not trained, on the same devices; {} = all are.
        present: [K] bool, of several adapters those whose preference group is in the batch; the others stay as they are, to the bit. None = all.

    Returns:
        (state with new parameters and optimiser state, metrics: scalars, that is the loss, the gradient norm before clipping, means over
        tokens; and "by_preference/…" [K], means over the tokens of each preference group).
    """
    shardings = jax.tree.map(lambda x: x.sharding, state)
    rows = NamedSharding(state.step.sharding.mesh, PartitionSpec(None, ROWS))
    static = {"model": model, "settings": settings, "optimiser_settings": optimiser_settings}
    step = parallel.compiled(_step, (shardings, None, rows), donate_argnums=(0,), **static)
    state, metrics, measured = step(state, batch, advantages, old_log_probs, reference_log_probs, frozen, present)
    # A program of its own, after the one that trains: its exchange between devices must not mix with that of the gradients.
    everywhere = state.step.sharding
    measure = parallel.compiled(_measure, everywhere, everywhere=everywhere, num_preference_groups=settings.num_preference_groups)
    return state, metrics | measure(*measured, batch.preference_ids)


def _step(state, batch, advantages, old_log_probs, reference_log_probs, frozen, present, *, model, settings, optimiser_settings):
    kl_coefficients = state.objective.get("kl_coefficients", jnp.zeros(settings.num_preference_groups, advantages.dtype))
    fixed = (batch, advantages, kl_coefficients, old_log_probs, reference_log_probs, frozen)
    grads, loss, *measured = accumulate(state.trainable, model, settings, *fixed)
    changes, optimiser_state = make_optimiser(optimiser_settings).update(grads, state.optimiser, state.trainable, present=present)
    state = state.replace(trainable=optax.apply_updates(state.trainable, changes), optimiser=optimiser_state)
    return state, {"loss": loss, "grad_norm": optax.tree.norm(grads)}, measured


def _measure(sums, gaps, preference_ids, *, everywhere, num_preference_groups):
    """Means over the tokens that count, of the batch and of each preference group (NaN where it has none); spread of the gaps."""
    size = len(sums)
    # In one piece: several exchanges at once could wait for each other.
    columns = jnp.concatenate([jnp.stack(list(sums.values()), axis=-1), gaps.reshape(*gaps.shape[:2], -1)], axis=-1)
    columns = jax.lax.with_sharding_constraint(columns, everywhere)
    gaps = columns[..., size:].reshape(gaps.shape)
    rows = dict(zip(sums, jnp.moveaxis(columns[..., :size], -1, 0).reshape(size, -1)))
    ids = jnp.repeat(jax.lax.with_sharding_constraint(preference_ids, everywhere).reshape(-1), columns[..., 0].size // preference_ids.size)
    tokens = jnp.maximum(jnp.sum(rows["token_count"]), 1)
    metrics = {name: jnp.sum(values) / tokens for name, values in rows.items() if name != "token_count"}
    metrics["clip_fraction"] = metrics.pop("clipped")
    everyone = jnp.ones_like(ids, dtype=bool)
    counts = segment_sum(rows["token_count"], ids, everyone, num_preference_groups)
    for name in ("entropy", "kl"):
        if name in rows:
            total = segment_sum(rows[name], ids, everyone, num_preference_groups)
            metrics[f"by_preference/{name}"] = jnp.where(counts > 0, total / jnp.maximum(counts, 1), jnp.nan)
    for place, name in enumerate(("mismatch", "old_gap")):
        values = gaps[:, :, place]
        metrics |= {f"{name}/{key}": value for key, value in importance.gap_statistics(values, values >= 0).items()}
    return metrics


def refuse_non_finite(metrics: Mapping[str, Any], *, step: int) -> None:
    """Refuses what an update measured where the policy is lost.

    Args:
        metrics: of `update`, on the host.
        step: updates done, this one included.

    Raises:
        FloatingPointError: the loss or the gradient is not finite.
    """
    for name in ("loss", "grad_norm"):
        if not math.isfinite(metrics[name]):
            raise FloatingPointError(
                f"{name} = {metrics[name]} at step {step} is not finite: the last checkpoint is good; "
                "lower optimiser.learning_rate or raise algorithm.std_floor and run again"
            )


@functools.partial(jax.jit, static_argnums=(1, 2))
def score_slices(params: Any, model: Transformer, support: Support, batch: TrainBatch) -> chex.Array:
    """Log-probs [M, N/M, Tc] of a sliced batch under fixed weights (the old policy, the reference), in the update's own layout."""
    return jax.lax.map(lambda part: score(model, params, part, support)[0], batch)


def kl_penalties(old_log_probs: chex.Array, reference_log_probs: chex.Array, batch: TrainBatch, *, estimator: str) -> chex.Array:
    """KL of each completion of a sliced batch to the reference, summed over its tokens: [M, N/M] nats."""
    counted = batch.completion_mask & batch.valid[..., None]
    return jax.vmap(lambda *part: regularisers.penalties(*part, estimator))(old_log_probs, reference_log_probs, counted)
