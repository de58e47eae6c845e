"""The update: a pure jitted function (state, batch, advantages) → state, with gradients accumulated over sums and counts."""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from pgrpo_jax import parallel
from pgrpo_jax.algorithms import objective
from pgrpo_jax.generation.sampler import Support
from pgrpo_jax.generation.scoring import score
from pgrpo_jax.models.transformer import Transformer
from pgrpo_jax.structs import TrainBatch, TrainState


@dataclasses.dataclass(frozen=True)
class OptimiserSettings:
    """AdamW with a schedule and a global gradient norm limit.

    Attributes:
        learning_rate: peak step size.
        schedule: after warm-up, "constant", or "cosine" or "linear" towards 0, which is reached after the last update.
        warmup_steps: updates of linear warm-up.
        num_updates: updates in the whole run.
        b1, b2, eps: Adam's.
        weight_decay: decoupled, on matrices only (not on norm scales).
        clip_norm: limit of the global gradient norm; 0 = off.
    """

    learning_rate: float
    schedule: str
    warmup_steps: int
    num_updates: int
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float


@dataclasses.dataclass(frozen=True)
class ObjectiveSettings:
    """Clip range, KL coefficient and sampling support of the loss; see `objective.policy_loss`."""

    clip_low: float
    clip_high: float
    kl_coefficient: float
    support: Support


def learning_rate(settings: OptimiserSettings) -> optax.Schedule:
    """Returns the step size as a function of the number of updates done.

    Raises:
        ValueError: unknown schedule.
    """
    rest = max(1, settings.num_updates - settings.warmup_steps)
    shapes = {
        "constant": lambda: optax.constant_schedule(settings.learning_rate),
        "cosine": lambda: optax.cosine_decay_schedule(settings.learning_rate, rest),
        "linear": lambda: optax.linear_schedule(settings.learning_rate, 0.0, rest),
    }
    if settings.schedule not in shapes:
        raise ValueError(f"optimiser.schedule = {settings.schedule!r} is unknown: use one of {', '.join(shapes)}")
    after = shapes[settings.schedule]()
    if settings.warmup_steps == 0:
        return after
    # The first update already moves: a step size of 0 would waste a batch of rollouts.
    first = settings.learning_rate / settings.warmup_steps
    warmup = optax.linear_schedule(first, settings.learning_rate, max(1, settings.warmup_steps - 1))
    return optax.join_schedules([warmup, after], [settings.warmup_steps])


def make_optimiser(settings: OptimiserSettings) -> optax.GradientTransformation:
    """Returns AdamW with the schedule, the decay mask and the norm limit of `settings`."""

    def is_matrix(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: "norm" not in jax.tree_util.keystr(path), params)

    adamw = optax.adamw(
        learning_rate(settings), b1=settings.b1, b2=settings.b2, eps=settings.eps, weight_decay=settings.weight_decay, mask=is_matrix
    )
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), adamw) if settings.clip_norm > 0 else adamw


def loss_sums(
    params: Any,
    model: Transformer,
    settings: ObjectiveSettings,
    batch: TrainBatch,
    advantages: chex.Array,
    old_log_probs: chex.Array | None,
    reference_log_probs: chex.Array | None,
) -> tuple[chex.Array, tuple[dict[str, chex.Array], chex.Array]]:
    """The objective over one slice of a batch, as sums that add up over slices.

    Args:
        params: the policy's parameters.
        batch: prompts [P, Tp] and completions [N, Tc].
        advantages: [N] float.
        old_log_probs: [N, Tc], or None where the policy itself generated the batch: then pi_old is its stopped gradient.
        reference_log_probs: [N, Tc], or None where the KL coefficient is 0.

    Returns:
        (loss sum, (sums: scalars to add up, with `completion_count` and `token_count` to divide by, and the largest
        |log-prob difference| to the sampler, which does not add up)).
    """
    log_probs, entropies = score(model, params, batch, settings.support)
    old = jax.lax.stop_gradient(log_probs) if old_log_probs is None else old_log_probs
    loss, count, sums = objective.policy_loss(
        log_probs,
        old,
        reference_log_probs,
        advantages,
        batch.completion_mask,
        batch.valid,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        kl_coefficient=settings.kl_coefficient,
    )
    mask = batch.completion_mask & batch.valid[:, None]
    zero = jnp.zeros((), log_probs.dtype)
    gap = jnp.where(mask, jnp.abs(jax.lax.stop_gradient(log_probs) - batch.behaviour_log_probs.astype(log_probs.dtype)), zero)
    entropy = jnp.sum(jnp.where(mask, jax.lax.stop_gradient(entropies), zero))
    sums = {"clip_fraction": sums.pop("clipped")} | sums | {"completion_count": count, "entropy": entropy, "mismatch/mean": jnp.sum(gap)}
    return loss, (sums, jnp.max(gap))


def accumulate(params, model, settings, batch, advantages, old_log_probs, reference_log_probs):
    """Gradient and metrics of the whole batch, slice by slice; dividing once by the count makes the slicing invisible.

    Args:
        batch, advantages, old_log_probs, reference_log_probs: as `loss_sums`, with a leading axis of micro-batches.

    Returns:
        (gradient of the loss, the loss = loss sum / completion count, sums, largest |log-prob difference| to the sampler).
    """
    gradient = jax.value_and_grad(loss_sums, has_aux=True)
    parts = (batch, advantages, old_log_probs, reference_log_probs)

    def add(carry, part):
        (grads, loss, sums), largest = carry
        (new_loss, (new_sums, new_largest)), new_grads = gradient(params, model, settings, *part)
        return (jax.tree.map(jnp.add, (grads, loss, sums), (new_grads, new_loss, new_sums)), jnp.maximum(largest, new_largest)), None

    # The shapes of the forward pass tell all: tracing the gradient for them as well would double the time to trace.
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), parts)
    shapes = jax.eval_shape(lambda part: loss_sums(params, model, settings, *part), one)
    loss, (sums, largest) = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    start = ((jax.tree.map(jnp.zeros_like, params), loss, sums), largest)
    ((grads, loss, sums), largest), _ = jax.lax.scan(add, start, parts)
    count = jnp.maximum(sums["completion_count"], jnp.ones_like(sums["completion_count"]))
    return jax.tree.map(lambda g: g / count.astype(g.dtype), grads), loss / count.astype(loss.dtype), sums, largest


def update(
    state: TrainState,
    model: Transformer,
    settings: ObjectiveSettings,
    optimiser_settings: OptimiserSettings,
    batch: TrainBatch,
    advantages: chex.Array,
    old_log_probs: chex.Array | None,
    reference_log_probs: chex.Array | None,
) -> tuple[TrainState, dict[str, chex.Array]]:
    """One optimiser step on one batch; `state` is donated, and the new one lies where it lay.

    Args:
        state: training state, on its devices; `step`, `next_work` and `history` are left to the caller.
        batch: with a leading axis of micro-batches (`batching.micro_batches`), as the three arrays after it.

    Returns:
        (state with new parameters and optimiser state, scalars: the loss, the gradient norm before clipping, means over tokens).
    """
    shardings = jax.tree.map(lambda x: x.sharding, state)
    static = {"model": model, "settings": settings, "optimiser_settings": optimiser_settings}
    step = parallel.compiled(_step, (shardings, None), donate_argnums=(0,), **static)
    return step(state, batch, advantages, old_log_probs, reference_log_probs)


def _step(state, batch, advantages, old_log_probs, reference_log_probs, *, model, settings, optimiser_settings):
    grads, loss, sums, largest = accumulate(state.trainable, model, settings, batch, advantages, old_log_probs, reference_log_probs)
    changes, optimiser_state = make_optimiser(optimiser_settings).update(grads, state.optimiser, state.trainable)
    tokens = jnp.maximum(sums["token_count"], jnp.ones_like(sums["token_count"]))
    means = {name: total / tokens.astype(total.dtype) for name, total in sums.items() if not name.endswith("_count")}
    scalars = means | {"loss": loss, "grad_norm": optax.tree.norm(grads), "mismatch/max": largest}
    return state.replace(trainable=optax.apply_updates(state.trainable, changes), optimiser=optimiser_state), scalars


@functools.partial(jax.jit, static_argnums=(1, 2))
def score_slices(params: Any, model: Transformer, support: Support, batch: TrainBatch) -> chex.Array:
    """Log-probs [M, N/M, Tc] of a sliced batch under fixed weights (the old policy, the reference), in the update's own layout."""
    return jax.lax.map(lambda part: score(model, params, part, support)[0], batch)
