"""One layer of the transformer as pure functions: rotation, attention over parts of a context, norms, and the matmuls between them.

The same text serves prefill, decoding and training; what a layer's tokens attend to is a function that it is given.
"""

from typing import Any, Callable, Mapping, Sequence

import chex
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pgrpo_jax.models.families import ModelConfig
from pgrpo_jax.models.quantised import Quantised, read, Stored

MATMUL = "matmul"  # names, for `transformer.REMAT`, what a layer's matmuls lead to

def rotation(positions: chex.Array, config: ModelConfig, dtype: Any) -> tuple[chex.Array, chex.Array]:
    """Angles of the rotary position embedding (Su et al. 2021, arXiv:2104.09864), the same for every layer.

    Args:
        positions: [B, T] int32, tokens from the start of the sequence.
        config: of whose sizes the head's and `rope_theta`, the base of the geometric progression of wavelengths, are read.
        dtype: of the result; angles are computed in float32 or wider.

    Returns:
        (cosines, sines), each [B, T, 1, Dh/2].
    """
    chex.assert_rank(positions, 2)
    half, exact = config.head_dim // 2, wide(dtype)
    frequencies = jnp.asarray(config.rope_theta, exact) ** (-jnp.arange(half, dtype=exact) / half)
    angles = positions.astype(exact)[:, :, None, None] * frequencies[None, None, None, :]
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def rotate(x: chex.Array, angles: tuple[chex.Array, chex.Array]) -> chex.Array:
    """Rotates queries or keys [B, T, heads, Dh] by `rotation`, rotate-half order."""
    chex.assert_rank(x, 4)
    (cos, sin), half = angles, x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attend(query: chex.Array, parts: Sequence[tuple[Stored, Stored, chex.Array]]) -> chex.Array:
    """Grouped-query attention over several parts of a context, with one softmax over all of them.

    Args:
        query: [B, T, H, Dh].
        parts: (keys [Bs, Hkv, Dh, S], values [Bs, Hkv, S, Dh], mask [B or Bs or 1, T or 1, S] bool); Bs divides B. Keys and values may be
            stored in less room, each token's vector with a scale.

    Returns:
        [B, T, H, Dh], the dtype of query; scores and softmax in float32 or wider.
    """
    batch, length, heads, head_dim = query.shape
    read_parts = [(*read(keys, query.dtype), *read(values, query.dtype), mask) for keys, values, mask in parts]
    kv_heads, exact, scores = read_parts[0][0].shape[1], wide(query.dtype), []
    grouped = (kv_heads, heads // kv_heads, length)  # query heads that share a key head lie next to each other
    query = query.reshape(batch, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
    for keys, scales, _, _, mask in read_parts:
        rows, size = keys.shape[0], keys.shape[-1]
        s = jnp.matmul(_by_row(query, rows), keys, preferred_element_type=exact) * jnp.asarray(head_dim**-0.5, exact)
        s = s if scales is None else s * scales.astype(exact)[:, :, None, :]
        s = s.reshape(rows, kv_heads, batch // rows, heads // kv_heads, length, size)
        mask = mask.reshape(rows, -1, *mask.shape[1:]) if len(mask) == batch else mask[:, None]
        s = jnp.where(mask[:, None, :, None, :, :], s, jnp.asarray(jnp.finfo(exact).min, exact))
        scores.append(s.swapaxes(1, 2).reshape(batch, *grouped, size))
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(query.dtype)
    outputs, start = [], 0
    for _, _, values, scales, _ in read_parts:
        rows, size = values.shape[0], values.shape[2]
        part = _by_row(weights[..., start : start + size], rows)
        out = jnp.matmul(part if scales is None else part * scales[:, :, None, :], values)
        out = out.reshape(rows, kv_heads, batch // rows, heads // kv_heads, length, head_dim)
        outputs.append(out.swapaxes(1, 2).reshape(batch, *grouped, head_dim))
        start += size
    return sum(outputs[1:], outputs[0]).transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)


def _by_row(x: chex.Array, rows: int) -> chex.Array:
    """[B, Hkv, G, T, *] -> [Bs, Hkv, B/Bs·G·T, *]: everything that meets the same keys in one matrix."""
    batch, kv_heads, *_, last = x.shape
    return x.reshape(rows, batch // rows, *x.shape[1:]).swapaxes(1, 2).reshape(rows, kv_heads, -1, last)


def rms_norm(x: chex.Array, scale: chex.Array, *, epsilon: float) -> chex.Array:
    """Root-mean-square normalisation (Zhang & Sennrich 2019, arXiv:1910.07467), computed in float32 or wider.

    Args:
        x: [B, T, D].
        scale: [D].
        epsilon: added to the mean square.

    Returns:
        [B, T, D], the dtype of x.
    """
    exact = x.astype(wide(x.dtype))
    inverse = jax.lax.rsqrt(jnp.mean(exact * exact, axis=-1, keepdims=True) + jnp.asarray(epsilon, exact.dtype))
    return (exact * inverse * scale.astype(exact.dtype)[None, None, :]).astype(x.dtype)


def wide(dtype: Any) -> Any:
    """Returns float32 for half-precision types, the type itself otherwise."""
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


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


# (queries [B, T, H, Dh], keys [B, Hkv, Dh, T], values [B, Hkv, T, Dh]) -> (attended [B, T, H, Dh], what the layer returns beside it)
Attention = Callable[[chex.Array, chex.Array, chex.Array], tuple[chex.Array, Any]]


def attention_over(parts: Sequence[tuple[chex.Array, chex.Array, chex.Array]], sequences: chex.Array | None = None) -> Attention:
    """Returns attention over `parts` of a context (of `attend`) and, causally, over the tokens themselves; it returns their keys and values.

    Args:
        parts: every token attends to.
        sequences: [B, T] int32, the sequence that each token belongs to, where a row holds several; None: one a row.
    """

    def attention(query, keys, values):
        own = jnp.tril(jnp.ones((query.shape[1],) * 2, bool))[None]
        if sequences is not None:
            own = own & (sequences[:, :, None] == sequences[:, None, :])
        return attend(query, [*parts, (keys, values, own)]), (keys, values)

    return attention


def layer(
    config: ModelConfig, weights: Mapping[str, Stored], x: chex.Array, angles: tuple[chex.Array, chex.Array], attention: Attention
) -> tuple[chex.Array, Any]:
    """One layer: attention, then a gated MLP; both residual, pre-normalised.

    Args:
        config: the model's sizes.
        weights: of `families.parameter_shapes`, without the axis of layers, in the dtype of x, "output" as one matrix [H·Dh, D]; or of
            `decoding.lay_out`, which has "query_key_value" [D, Hkv, H/Hkv + 2, Dh] and "gate_up" [D, 2, F] in place of the five matrices
            they are made of.
        x: [B, T, D].
        angles: of `rotation`.
        attention: what the tokens attend to.

    Returns:
        (x after the layer, what `attention` returned beside the attended values).
    """
    h = rms_norm(x, weights["attention_norm"], epsilon=config.norm_epsilon)
    if "query_key_value" in weights:
        fused = linear(h, weights["query_key_value"])
        query = fused[:, :, :, :-2].reshape(*x.shape[:2], config.num_heads, config.head_dim)
        keys, values = fused[:, :, :, -2], fused[:, :, :, -1]
    else:
        query, keys, values = [linear(h, weights[name]) for name in ("query", "key", "value")]
    query, keys, values = [checkpoint_name(part, MATMUL) for part in (rotate(query, angles), rotate(keys, angles), values)]
    attended, kept = attention(query, keys.transpose(0, 2, 3, 1), values.swapaxes(1, 2))
    x = checkpoint_name(x + linear(attended.reshape(*x.shape[:2], -1), weights["output"]), MATMUL)

    h = rms_norm(x, weights["mlp_norm"], epsilon=config.norm_epsilon)
    if "gate_up" in weights:
        gate, up = jnp.moveaxis(linear(h, weights["gate_up"]), 2, 0)
    else:
        gate, up = [checkpoint_name(linear(h, weights[name]), MATMUL) for name in ("gate", "up")]
    return x + linear(jax.nn.silu(gate) * up, weights["down"]), kept
