"""One layer of the transformer as pure functions: rotation, norms, and the matmuls between them.

The same text serves prefill, decoding and training; what a layer's tokens attend to is a function that it is given (attention.py).
"""

from typing import Any, Mapping

import chex
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from pgrpo_jax.models import experts, lora
from pgrpo_jax.models.attention import Attention
from pgrpo_jax.models.config import ModelConfig
from pgrpo_jax.models.quantised import Quantised, read, Stored, wide

MATMUL = "matmul"  # names, for `transformer.REMAT`, what a layer's matmuls lead to


def rotation(positions: chex.Array, config: ModelConfig, dtype: Any, *, local: bool = False) -> tuple[chex.Array, chex.Array]:
    """Angles of the rotary position embedding (Su et al. 2021, arXiv:2104.09864), the same for every layer of a kind.

    Args:
        positions: [B, T] int32, tokens from the start of the sequence.
        config: of which the frequencies are read.
        dtype: of the result; angles are computed in float32 or wider.
        local: of layers with a window.

    Returns:
        (cosines, sines), each [B, T, 1, Dh/2].
    """
    chex.assert_rank(positions, 2)
    exact = wide(dtype)
    frequencies = jnp.asarray(config.frequencies(local=local), exact)
    angles = positions.astype(exact)[:, :, None, None] * frequencies[None, None, None, :]
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def rotate(x: chex.Array, angles: tuple[chex.Array, chex.Array]) -> chex.Array:
    """Rotates queries or keys [B, T, heads, Dh] by `rotation`, rotate-half order."""
    chex.assert_rank(x, 4)
    (cos, sin), half = angles, x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rms_norm(x: chex.Array, scale: chex.Array, *, epsilon: float, offset: float = 0.0) -> chex.Array:
    """Root-mean-square normalisation (Zhang & Sennrich 2019, arXiv:1910.07467) of the last axis, computed in float32 or wider.

    Args:
        x: [..., D].
        scale: [D].
        epsilon: added to the mean square.
        offset: added to the scale.

    Returns:
        [..., D], the dtype of x.
    """
    exact = x.astype(wide(x.dtype))
    inverse = jax.lax.rsqrt(jnp.mean(exact * exact, axis=-1, keepdims=True) + jnp.asarray(epsilon, exact.dtype))
    scale = scale.astype(exact.dtype) + jnp.asarray(offset, exact.dtype) if offset else scale.astype(exact.dtype)
    return (exact * inverse * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def linear(x: chex.Array, weight: Stored) -> chex.Array:
    """A matmul [B, T, D] x [D, ...] -> [B, T, ...]; a weight may be stored in less room, each output with a scale (then it has no gradient)."""
    if isinstance(weight, Quantised):
        integers, scales = read(weight, x.dtype)
        return jnp.tensordot(x, integers, 1) * scales[None, None]
    return _linear(x, weight.astype(x.dtype))


@jax.custom_vjp
def _linear(x: chex.Array, weight: chex.Array) -> chex.Array:
    """The matmul of `linear`, whose gradient is laid out by hand.

    The weight's gradient is computed as xᵀ·dy, in the weight's own order: by itself JAX makes dyᵀ·x and turns it over, and XLA then writes dy,
    which is the wider of the two in an MLP, in turned order (a fifth of an update's time on a CPU).
    """
    return jnp.tensordot(x, weight, 1)


def _linear_forward(x: chex.Array, weight: chex.Array) -> tuple[chex.Array, tuple[chex.Array, chex.Array]]:
    return _linear(x, weight), (x, weight)


def _linear_backward(kept: tuple[chex.Array, chex.Array], dy: chex.Array) -> tuple[chex.Array, chex.Array]:
    x, weight = kept
    axes = tuple(range(2, dy.ndim)), tuple(range(1, weight.ndim))
    return jnp.tensordot(dy, weight, axes), jnp.tensordot(x, dy, ((0, 1), (0, 1)))


_linear.defvjp(_linear_forward, _linear_backward)


def layer(
    config: ModelConfig,
    weights: Mapping[str, Stored],
    x: chex.Array,
    angles: tuple[chex.Array, chex.Array],
    attention: Attention,
    *,
    adapters: chex.Array | None = None,
    mesh: Mesh | None = None,
) -> tuple[chex.Array, Any]:
    """One layer: attention, then a gated MLP or experts; both residual, pre-normalised, and post-normalised where the model has those norms.

    Args:
        config: the model's sizes.
        weights: of `parameters.parameter_shapes`, without the axis of layers, in the dtype of x, "output" as one matrix [H·Dh, D]; or of
            `decoding.lay_out`, which has "query_key_value" [D, Hkv, H/Hkv + 2, Dh] and "gate_up" [D, 2, F], or "expert_gate_up"
            [E, D, 2, F], in place of the five matrices they are made of.
        x: [B, T, D].
        angles: of `rotation`.
        attention: what the tokens attend to.
        adapters: [B] int32, which of the model's adapters each row uses; not read where it has at most one.
        mesh: of `experts.mlp`.

    Returns:
        (x after the layer, what `attention` returned beside the attended values).
    """

    def norm(x: chex.Array, name: str) -> chex.Array:
        return rms_norm(x, weights[name], epsilon=config.norm_epsilon, offset=config.norm_offset)

    def added(x: chex.Array, change: chex.Array, name: str) -> chex.Array:
        return x + norm(checkpoint_name(change, MATMUL), name) if config.post_norms else x + change

    query, keys, values = _projected(config, weights, norm(x, "attention_norm"), adapters)
    if config.qk_norm:
        query, keys = norm(checkpoint_name(query, MATMUL), "query_norm"), norm(checkpoint_name(keys, MATMUL), "key_norm")
    query, keys, values = [checkpoint_name(part, MATMUL) for part in (rotate(query, angles), rotate(keys, angles), values)]
    attended, kept = attention(query, keys.transpose(0, 2, 3, 1), values.swapaxes(1, 2))
    attended = attended.reshape(*x.shape[:2], -1)
    output = lora.added(config.lora, weights, "output", attended, linear(attended, weights["output"]), adapters)
    x = checkpoint_name(added(x, output, "post_attention_norm"), MATMUL)
    return added(x, _mlp(config, weights, norm(x, "mlp_norm"), adapters, mesh), "post_mlp_norm"), kept


def _projected(config: ModelConfig, weights: Mapping[str, Stored], h: chex.Array, adapters: chex.Array | None) -> list[chex.Array]:
    """Queries [B, T, H, Dh], keys and values [B, T, Hkv, Dh] of normalised activations."""
    names = ("query", "key", "value")
    if "query_key_value" in weights:
        fused = linear(h, weights["query_key_value"])
        if config.qkv_bias:
            fused = fused + weights["query_key_value_bias"].astype(h.dtype)[None, None]
        query = fused[:, :, :, :-2].reshape(*h.shape[:2], config.num_heads, config.head_dim)
        parts = [query, fused[:, :, :, -2], fused[:, :, :, -1]]
    else:
        parts = [linear(h, weights[name]) for name in names]
        if config.qkv_bias:
            parts = [part + weights[f"{name}_bias"].astype(h.dtype)[None, None] for name, part in zip(names, parts, strict=True)]
    return [lora.added(config.lora, weights, name, h, part, adapters) for name, part in zip(names, parts, strict=True)]


def _mlp(config: ModelConfig, weights: Mapping[str, Stored], h: chex.Array, adapters: chex.Array | None, mesh: Mesh | None) -> chex.Array:
    """The gated MLP of normalised activations [B, T, D] (Shazeer 2020, arXiv:2002.05202), or each token's experts."""

    def gated(gate: chex.Array, up: chex.Array) -> chex.Array:
        gate, up = checkpoint_name(gate, MATMUL), checkpoint_name(up, MATMUL)
        return (jax.nn.silu(gate) if config.activation == "silu" else jax.nn.gelu(gate, approximate=True)) * up

    if config.num_experts:
        return experts.mlp(config, weights, h, gated, mesh)
    names = ("gate", "up")
    parts = jnp.moveaxis(linear(h, weights["gate_up"]), 2, 0) if "gate_up" in weights else [linear(h, weights[name]) for name in names]
    hidden = gated(*[lora.added(config.lora, weights, name, h, part, adapters) for name, part in zip(names, parts, strict=True)])
    return lora.added(config.lora, weights, "down", hidden, linear(hidden, weights["down"]), adapters)
