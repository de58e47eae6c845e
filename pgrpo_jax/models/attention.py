"""Attention over parts of a context with one softmax over all of them: what a prompt, a ring of a cache and the tokens themselves are to a layer."""

from typing import Any, Callable, Sequence

import chex
import jax
import jax.numpy as jnp

from pgrpo_jax.models.config import ModelConfig
from pgrpo_jax.models.quantised import read, Stored, wide

def attend(
    query: chex.Array, parts: Sequence[tuple[Stored, Stored, chex.Array]], *, scale: float | None = None, soft_cap: float = 0.0
) -> chex.Array:
    """Grouped-query attention over several parts of a context, with one softmax over all of them.

    Args:
        query: [B, T, H, Dh].
        parts: (keys [Bs, Hkv, Dh, S], values [Bs, Hkv, S, Dh], mask [B or Bs or 1, T or 1, S] bool); Bs divides B. Keys and values may be
            stored in less room, each token's vector with a scale.
        scale: that scores are multiplied by; None = Dh^-0.5.
        soft_cap: c of c·tanh(score / c) (Gemma 2, arXiv:2408.00118); 0 = none.

    Returns:
        [B, T, H, Dh], the dtype of query; scores and softmax in float32 or wider.
    """
    batch, length, heads, head_dim = query.shape
    read_parts = [(*read(keys, query.dtype), *read(values, query.dtype), mask) for keys, values, mask in parts]
    kv_heads, exact, scores = read_parts[0][0].shape[1], wide(query.dtype), []
    scale = jnp.asarray(head_dim**-0.5 if scale is None else scale, exact)
    grouped = (kv_heads, heads // kv_heads, length)  # query heads that share a key head lie next to each other
    query = query.reshape(batch, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
    for keys, scales, _, _, mask in read_parts:
        rows, size = keys.shape[0], keys.shape[-1]
        s = jnp.matmul(_by_row(query, rows), keys, preferred_element_type=exact) * scale
        s = s if scales is None else s * scales.astype(exact)[:, :, None, :]
        s = capped(s, soft_cap).reshape(rows, kv_heads, batch // rows, heads // kv_heads, length, size)
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


# (queries [B, T, H, Dh], keys [B, Hkv, Dh, T], values [B, Hkv, T, Dh]) -> (attended [B, T, H, Dh], what the layer returns beside it)
Attention = Callable[[chex.Array, chex.Array, chex.Array], tuple[chex.Array, Any]]
Part = tuple[Stored, Stored, chex.Array, chex.Array]  # keys [Bs, Hkv, Dh, S], values [Bs, Hkv, S, Dh], mask [Bs, 1, S], positions [Bs, S]


def attention_over(
    config: ModelConfig, parts: Sequence[Part], positions: chex.Array, *, window: Any = None, sequences: chex.Array | None = None
) -> Attention:
    """Returns attention over `parts` of a context and, causally, over the tokens themselves; it returns their keys and values.

    Args:
        config: of which the scale and the cap of scores are read.
        parts: every token attends to, where their masks and the window allow it; Bs divides the batch B.
        positions: [B, T] int32, of the tokens, counted from the start of the sequence as those of the parts are.
        window: int32 scalar, tokens that one attends to, itself included; None = all.
        sequences: [B, T] int32, the sequence that each token belongs to, where a row holds several; None: one a row.
    """

    def near(where: chex.Array) -> chex.Array:
        return positions[:, :, None] - _to_rows(where, len(positions))[:, None, :] < window

    def attention(query, keys, values):
        own, context = jnp.tril(jnp.ones((query.shape[1],) * 2, bool))[None], [part[:3] for part in parts]
        if sequences is not None:
            own = own & (sequences[:, :, None] == sequences[:, None, :])
        if window is not None:
            own = own & near(positions)
            context = [(k, v, _to_rows(mask, len(positions)) & near(where)) for k, v, mask, where in parts]
        return attend(query, [*context, (keys, values, own)], **constants(config)), (keys, values)

    return attention


def constants(config: ModelConfig) -> dict[str, float]:
    """Returns the `scale` and the `soft_cap` of `attend` for a model."""
    return {"scale": (config.query_scalar or config.head_dim) ** -0.5, "soft_cap": config.score_soft_cap}


def _to_rows(x: chex.Array, batch: int) -> chex.Array:
    """[Bs, ...] -> [B, ...], each row as often as rows of the batch share it."""
    return jnp.repeat(x, batch // len(x), axis=0)


def capped(x: chex.Array, soft_cap: float) -> chex.Array:
    """Returns c·tanh(x / c), between -c and c; x itself where c is 0."""
    return x if not soft_cap else jnp.tanh(x / jnp.asarray(soft_cap, x.dtype)) * jnp.asarray(soft_cap, x.dtype)
