"""Attention as one kernel for TPUs, scores never leaving the core (Dao et al. 2022, arXiv:2205.14135), over parts of a context.

A part is what lies together: a prompt's keys, which all its completions read from one copy, or the tokens' own. Each part has a kernel's pass of its own;
their outputs are joined by their sums of exponentials, and so is the gradient, which needs no more of a part than the joined sum. JAX ships kernels
of this kind; theirs know one context a row, and a mask that is not known when the program is compiled must be an array [T, S].

Who sees whom is two integers a token (`marks`): the sequence it belongs to and its position there. No mask [T, S] is ever made.
"""

import functools
from typing import Any, Sequence

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pgrpo_jax.models import flash_kernels
from pgrpo_jax.models.attention import on_mesh, Part
from pgrpo_jax.models.flash_blocks import filled
from pgrpo_jax.models.flash_kernels import ANYONE, Kernel, NOBODY, Pair
from pgrpo_jax.models.quantised import plain

_NO_SEQUENCE = -4  # in the place of a query's sequence: it sees only what anyone sees


def flash_attention(
    query: chex.Array, keys: chex.Array, values: chex.Array, parts: Sequence[Part], positions: chex.Array, *, scale: float, soft_cap: float = 0.0,
    window: Any = None, sequences: chex.Array | None = None, mesh: Mesh | None = None, interpret: bool = False,
) -> chex.Array:  # fmt: skip
    """Grouped-query attention over parts of a context and, causally, over the tokens themselves; differentiable in queries, keys and values.

    Args:
        query: [B, T, H, Dh].
        keys, values: [B, Hkv, Dh, T] and [B, Hkv, T, Dh], of the tokens themselves.
        parts: of a context: keys [Bs, Hkv, Dh, S], values [Bs, Hkv, S, Dh], mask [Bs, 1, S], positions [Bs, S]. Bs divides B; rows b with the same
            b // (B / Bs) share one.
        positions: [B, T] int32, of the tokens.
        scale: that scores are multiplied by.
        soft_cap: c of c·tanh(score / c); 0 = none.
        window: int32 scalar, positions that a token attends to, its own included; None = all.
        sequences: [B, T] int32 from -1, where a row holds several; a token sees its own sequence and all parts. None: one a row.
        mesh: what the arrays lie on, rows and heads split; None = one device: a kernel is nothing that the compiler could split.
        interpret: to run anywhere, slowly.

    Returns:
        [B, T, H, Dh], the dtype of query; scores and sums in float32.
    """
    own = jnp.stack([jnp.zeros_like(positions) if sequences is None else sequences, positions], axis=1)
    marks = [jnp.stack([jnp.where(mask[:, 0], jnp.int32(ANYONE), jnp.int32(NOBODY)), at], axis=1) for *_, mask, at in parts]
    pairs = [(plain(k, query.dtype, axis=2), plain(v, query.dtype, axis=3)) for k, v, *_ in parts]
    causal = (*[False] * len(parts), True)
    kernel = Kernel(scale=scale, soft_cap=soft_cap, causal=causal, windowed=window is not None, interpret=interpret)
    limit = jnp.asarray(0 if window is None else window, jnp.int32).reshape(1)
    return on_mesh(mesh, functools.partial(_on_device, kernel), query, (*pairs, (keys, values)), (own, (*marks, own)), limit)


def _on_device(kernel: Kernel, query: chex.Array, pairs: Sequence[Pair], marks: tuple[chex.Array, Sequence[chex.Array]], window: chex.Array) -> chex.Array:
    """`flash_attention` of one device, given its queries' marks and each part's, all lengths filled up."""
    (own, marks), length = marks, query.shape[1]
    query = _padded(query.transpose(0, 2, 3, 1), 0).swapaxes(2, 3)
    pairs = tuple((_padded(keys, 0), _padded(values.swapaxes(2, 3), 0).swapaxes(2, 3)) for keys, values in pairs)
    out = _attention(kernel, query, pairs, _padded(own, _NO_SEQUENCE), tuple(_padded(x, NOBODY) for x in marks), window)
    return out[:, :, :length].swapaxes(1, 2)


def _padded(x: chex.Array, value: int) -> chex.Array:
    """Fills the last axis up."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, filled(x.shape[-1]) - x.shape[-1])], constant_values=value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(kernel, query, pairs, query_marks, key_marks, window):
    """`flash_attention` of queries [B, H, T, Dh], of parts (keys, values) and marks of the queries and of each part's keys."""
    return _attention_forward(kernel, query, pairs, query_marks, key_marks, window)[0]


def _attention_forward(kernel, query, pairs, query_marks, key_marks, window):
    parts = [
        flash_kernels.forward(kernel, causal, query, *pair, query_marks, marks, window)
        for causal, pair, marks in zip(kernel.causal, pairs, key_marks, strict=True)
    ]
    log_sum = functools.reduce(jnp.logaddexp, [log_sum for _, log_sum in parts])
    out = sum(out * jnp.exp(of_part - log_sum)[..., None] for out, of_part in parts).astype(query.dtype)
    return out, (query, pairs, query_marks, key_marks, window, out, log_sum)


def _attention_backward(kernel, kept, d_out):
    query, pairs, query_marks, key_marks, window, out, log_sum = kept
    mean = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)  # of each query, what its weights' gradients are centred by
    fixed = (query, d_out, log_sum[:, :, None], mean[:, :, None], query_marks, window)
    d_query, d_pairs = 0.0, []
    for causal, (keys, values), marks in zip(kernel.causal, pairs, key_marks, strict=True):
        d_query += flash_kernels.backward_query(kernel, causal, keys, values, marks, *fixed)
        d_keys, d_values = flash_kernels.backward_keys(kernel, causal, keys, values, marks, *fixed)
        d_pairs.append((d_keys.swapaxes(2, 3).astype(keys.dtype), d_values.astype(values.dtype)))
    return d_query.astype(query.dtype), tuple(d_pairs), None, None, None


_attention.defvjp(_attention_forward, _attention_backward)
