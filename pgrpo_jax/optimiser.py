"""Floor 2: AdamW with a schedule and a limit of the gradient's norm; of several adapters each has a state of its own."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

_ADAPTERS = 1  # the axis of adapters in each of their parameters, behind that of layers


@dataclasses.dataclass(frozen=True)
class OptimiserSettings:
    """AdamW with a schedule and a global gradient norm limit.

    Attributes:
        learning_rate: peak step size.
        schedule: after warm-up, "constant", or "cosine" or "linear" towards 0, which is reached after the last update.
        warmup_steps: updates of linear warm-up.
        num_updates: updates in the whole run.
        b1, b2, eps: Adam's.
        weight_decay: decoupled, on matrices only (not on norm scales, not on biases).
        clip_norm: limit of the global gradient norm, of adapters that of each by itself; 0 = off.
        num_adapters: K of the adapters that are trained; 0 = the model itself is.
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
    num_adapters: int = 0


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


def make_optimiser(settings: OptimiserSettings) -> optax.GradientTransformationExtraArgs:
    """Returns AdamW with the schedule, the decay mask and the norm limit of `settings`.

    Its `update` takes `present`, [K] bool, where there are adapters: which of them are stepped; None = all.
    """
    norm_limit = [optax.clip_by_global_norm(settings.clip_norm)] if settings.clip_norm > 0 else []
    adam, rate = {"b1": settings.b1, "b2": settings.b2, "eps": settings.eps}, learning_rate(settings)
    if not settings.num_adapters:
        adamw = optax.adamw(rate, **adam, weight_decay=settings.weight_decay, mask=_is_matrix)
        return optax.with_extra_args_support(optax.chain(*norm_limit, adamw) if norm_limit else adamw)
    direction = optax.chain(*norm_limit, optax.scale_by_adam(**adam), optax.add_decayed_weights(settings.weight_decay, _is_matrix))
    return optax.chain(_each_adapter(direction), optax.scale_by_learning_rate(rate))


def _is_matrix(params: Any) -> Any:
    def decays(path: Any, _: Any) -> bool:
        return not any(kind in jax.tree_util.keystr(path) for kind in ("norm", "bias"))

    return jax.tree_util.tree_map_with_path(decays, params)


def _each_adapter(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Applies a transformation to each adapter by itself: its own norm, its own moments, its own count of updates.

    One whose preference group is not in the batch is left alone. A gradient of 0 would not do that: momentum would move it, weight decay shrink it,
    and Adam's correction of the first moments would take updates that never happened for granted.
    """

    def axes(params: Any) -> Any:
        """Where the axis of adapters is in the state: in arrays of parameters where it is in those, else (a count) in front."""
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((*x.shape[:_ADAPTERS], *x.shape[_ADAPTERS + 1 :]), x.dtype), params)
        return jax.tree.map(lambda x: min(_ADAPTERS, x.ndim), jax.eval_shape(inner.init, one))

    def init(params: Any) -> Any:
        return jax.vmap(inner.init, in_axes=_ADAPTERS, out_axes=axes(params))(params)

    def update(gradients: Any, state: Any, params: Any, *, present: Any = None) -> tuple[Any, Any]:
        places = axes(params)
        changes, moved = jax.vmap(inner.update, in_axes=(_ADAPTERS, places, _ADAPTERS), out_axes=(_ADAPTERS, places))(gradients, state, params)
        if present is None:
            return changes, moved

        def chosen(new: Any, old: Any, axis: int) -> Any:
            return jnp.where(present.reshape(-1, *[1] * (new.ndim - axis - 1)), new, old)

        changes = jax.tree.map(lambda x: chosen(x, jnp.zeros_like(x), _ADAPTERS), changes)
        return changes, jax.tree.map(chosen, moved, state, places)

    return optax.GradientTransformationExtraArgs(init, update)
