"""Mixtures of experts: each token goes through the few MLPs that its router chooses (Shazeer et al. 2017, arXiv:1701.06538).

Shapes are static and no token is dropped: pairs of a token and one of its experts are sorted by expert, one matmul (grouped_matmul.py) multiplies each
run of rows by its expert's matrix, and a token's rows are summed. All moves are gathers, in the backward pass too, so that bits repeat.

On a mesh each device computes, for all tokens of the devices that it shares experts with, what its own experts add: over "expert" tokens are gathered and
sums are scattered, (n - 1) tokens in and out for each token of a device with n of them. Sending each token only where its k experts are would move
k (n - 1) / n copies, no fewer while k >= n, and could not be sized before the router has chosen. The price is room: rows are allocated for the case that
every token chooses this device, n times what they fill when tokens spread evenly; those that nobody fills are not multiplied.
"""

from typing import Any, Callable, Mapping

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from pgrpo_jax.models.config import ModelConfig
from pgrpo_jax.models.grouped_matmul import grouped_matmul
from pgrpo_jax.models.mesh import device, row_axes, size
from pgrpo_jax.models.quantised import Quantised, Stored, wide

# What is read of a layer, without its axis of layers -> the mesh axes along which each device has only its part. What `parameters.SHARDED_AXES` cuts
# over "fsdp" as well is gathered before, and its gradient scattered after.
_AXES = {
    "router": (None, None),  # [D, E]
    "expert_gate": ("expert", None, "tp"),  # [E, D, F]
    "expert_up": ("expert", None, "tp"),  # [E, D, F]
    "expert_gate_up": ("expert", None, None, "tp"),  # [E, D, 2, F]
    "expert_down": ("expert", "tp", None),  # [E, F, D]
}
Gated = Callable[[chex.Array, chex.Array], chex.Array]


def mlp(config: ModelConfig, weights: Mapping[str, Stored], h: chex.Array, gated: Gated, mesh: Mesh | None = None) -> chex.Array:
    """The experts of one layer.

    Args:
        config: the model's sizes.
        weights: of the layer; expert_gate and expert_up [E, D, F], or both as expert_gate_up [E, D, 2, F].
        h: [B, T, D], normalised activations.
        gated: (gate, up), each [M, F] -> the hidden layer of the MLP.
        mesh: what weights and activations lie on, laid out as `parallel` says; None = one device, or left to the compiler.

    Returns:
        [B, T, D], what is added to the stream.
    """
    own = {name: weights[name] for name in _AXES if name in weights}
    if mesh is None:
        return _on_device(config, own, h, gated, platform=device(None).platform)
    batch = PartitionSpec(row_axes(mesh, len(h)), None, None)

    def on_device(own: Mapping[str, Stored], h: chex.Array) -> chex.Array:
        return _on_device(config, own, h, gated, platform=device(mesh).platform, experts_shared=size(mesh, "expert") > 1)[None]

    # Over "tp" each device has the sum over its own hidden units. The sums are added outside, where the compiler knows that a gradient needs no exchange.
    out = PartitionSpec("tp" if "tp" in mesh.axis_names else None, *batch)
    specs = {name: _spec(mesh, _AXES[name], stored) for name, stored in own.items()}
    parts = jax.shard_map(on_device, mesh=mesh, in_specs=(specs, batch), out_specs=out, check_vma=False)(own, h)
    return jnp.sum(parts, axis=0)


def _spec(mesh: Mesh, axes: tuple[str | None, ...], stored: Stored) -> Any:
    spec = PartitionSpec(*(axis if axis in mesh.axis_names else None for axis in axes))
    return Quantised(integers=spec, scales=PartitionSpec(spec[0], *spec[2:])) if isinstance(stored, Quantised) else spec


def _on_device(
    config: ModelConfig, weights: Mapping[str, Stored], h: chex.Array, gated: Gated, *, platform: str, experts_shared: bool = False
) -> chex.Array:
    """What a device's experts and hidden units add to its own rows [B, T, D]; with `experts_shared` the others' experts too."""
    x = h.reshape(-1, h.shape[-1])
    chosen, shares = route(config, weights["router"], x)
    if not experts_shared:
        return _through(weights, x, chosen, shares, gated, platform).reshape(h.shape)
    x, chosen, shares = jax.lax.all_gather((x, chosen, shares), "expert", tiled=True)
    first = jax.lax.axis_index("expert") * _matrices(weights["expert_down"]).shape[0]
    added = _through(weights, x, chosen - first, shares, gated, platform)
    return jax.lax.psum_scatter(added, "expert", scatter_dimension=0, tiled=True).reshape(h.shape)


def route(config: ModelConfig, router: chex.Array, x: chex.Array) -> tuple[chex.Array, chex.Array]:
    """Chooses the experts of N tokens, in float32 or wider: sampler and learner must not disagree because one of them rounds more.

    Args:
        config: how many experts a token has, and whether their shares add up to 1.
        router: [D, E].
        x: [N, D].

    Returns:
        (experts [N, k] int32, what each gives to the sum [N, k]).
    """
    exact = wide(x.dtype)
    scores = jnp.dot(x.astype(exact), router.astype(exact), precision=jax.lax.Precision.HIGHEST)
    shares, chosen = jax.lax.top_k(jax.nn.softmax(scores, axis=-1), config.experts_per_token)
    return chosen, shares / jnp.sum(shares, axis=-1, keepdims=True) if config.normalised_experts else shares


def _through(weights: Mapping[str, Stored], x: chex.Array, chosen: chex.Array, shares: chex.Array, gated: Gated, platform: str) -> chex.Array:
    """What the experts of this device add to tokens [N, D].

    Args:
        weights: of this device's experts.
        x: [N, D].
        chosen: [N, k] int32, counted from this device's first expert; others than its own are other devices'.
        shares: [N, k].
        gated: as for `mlp`.
        platform: of `grouped_matmul`.
    """
    count, (tokens, k) = _matrices(weights["expert_down"]).shape[0], chosen.shape
    expert = jnp.where((chosen >= 0) & (chosen < count), chosen, count).reshape(-1)  # of each pair; the other devices' are sorted behind
    order = jnp.argsort(expert, stable=True)[: tokens * min(k, count)].astype(jnp.int32)  # a token's experts differ, so no more can be this device's
    sizes = jnp.bincount(expert, length=count).astype(jnp.int32)
    rows = jnp.arange(len(order), dtype=jnp.int32)
    filled = rows < jnp.sum(sizes, dtype=jnp.int32)  # what the rows behind hold is never read
    places = jnp.full(tokens * k, len(order), jnp.int32).at[order].set(jnp.where(filled, rows, len(order)), unique_indices=True)
    where = order // k, places.reshape(tokens, k)

    def matmul(rows: chex.Array, stored: Stored) -> chex.Array:
        out = grouped_matmul(rows, _matrices(stored), sizes, platform=platform)
        if not isinstance(stored, Quantised):
            return out
        return out * jnp.take(stored.scales, expert[order], axis=0, mode="clip").astype(out.dtype)

    inputs = _spread(x, *where)
    if "expert_gate_up" in weights:
        gate, up = jnp.moveaxis(matmul(inputs, weights["expert_gate_up"]), 1, 0)
    else:
        gate, up = matmul(inputs, weights["expert_gate"]), matmul(inputs, weights["expert_up"])
    share = jnp.where(filled, jnp.take(shares.reshape(-1), order), jnp.zeros((), shares.dtype))
    hidden = gated(gate, up) * share.astype(x.dtype)[:, None]  # here and not on what comes out, which then nobody has to keep
    return _collect(matmul(hidden, weights["expert_down"]), *where)


def _matrices(stored: Stored) -> chex.Array:
    return stored.integers if isinstance(stored, Quantised) else stored


@jax.custom_vjp
def _spread(x: chex.Array, tokens: chex.Array, places: chex.Array) -> chex.Array:
    """Rows [M, D] of the `tokens` [M] of x [N, D]; each is the transpose of the other, and neither adds where another thread may be adding."""
    return jnp.take(x, tokens, axis=0)


@jax.custom_vjp
def _collect(rows: chex.Array, tokens: chex.Array, places: chex.Array) -> chex.Array:
    """The sum [N, D] over a token's k rows, those at `places` [N, k]; M = none."""
    own = jnp.take(rows, places, axis=0, mode="fill", fill_value=0)
    return jnp.sum(own, axis=1, dtype=wide(rows.dtype)).astype(rows.dtype)


_spread.defvjp(lambda *given: (_spread(*given), given[1:]), lambda where, dy: (_collect(dy, *where), None, None))
_collect.defvjp(lambda *given: (_collect(*given), given[1:]), lambda where, dy: (_spread(dy, *where), None, None))
