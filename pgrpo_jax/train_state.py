"""Floor 2: the training state before the first update, and copies of what an update would donate."""

import functools
from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pgrpo_jax import parallel
from pgrpo_jax.optimiser import make_optimiser, OptimiserSettings
from pgrpo_jax.structs import TrainState


def initial_state(
    params: Any, history: Any, optimiser: OptimiserSettings, mesh: Mesh, *, objective: Mapping[str, Any] = {}, keep_reference: bool = False
) -> TrainState:
    """Returns the state before the first update, on its devices: no device ever holds more than its share.

    Args:
        params: what is trained of the policy, from the host or this process's devices; the same in every process. Copied, since updates donate their input.
        history: before the first reward.
        optimiser: AdamW's settings.
        mesh: of `parallel.make_mesh`.
        objective: of `kl_control.initial`.
        keep_reference: the reference is refreshed, so it is state; at first it is the policy itself.
    """
    placed = parallel.place(params, parallel.layout(params, mesh))
    shardings = parallel.layout(jax.eval_shape(functools.partial(_start, optimiser=optimiser), placed), mesh)
    trainable, moments = parallel.compiled(_start, shardings, optimiser=optimiser)(placed)
    counted = {"step": np.int32(0), "next_work": np.int32(0), "history": history, "objective": dict(objective)}
    state = TrainState(trainable=trainable, optimiser=moments, **parallel.replicate(counted, mesh))
    if keep_reference:
        state.objective["reference"] = parallel.compiled(copied, shardings[0], dtype=None)(trainable)
    return state


# One program for all leaves, in these two: an eager copy would compile one for each shape.
def _start(params: Any, *, optimiser: OptimiserSettings) -> tuple[Any, Any]:
    copies = jax.tree.map(jnp.copy, params)
    return copies, make_optimiser(optimiser).init(copies)


def copied(params: Any, *, dtype: str | None) -> Any:
    """Returns a copy that no update touches, in another dtype; None keeps each leaf's."""
    return jax.tree.map(lambda x: jnp.copy(x).astype(dtype or x.dtype), params)
