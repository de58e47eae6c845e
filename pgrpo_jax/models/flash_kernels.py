"""The three passes of attention over one part of a context, as kernels for TPUs: forward, and the gradients of queries and of keys and values.

Each goes through blocks of queries and of keys and holds one block of scores at a time. A prompt's keys are read where they lie, by every row and every
query head that attends to them; their gradients are summed over all of these in the core.
"""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pgrpo_jax.models.flash_blocks import by_key, by_query, LANES, Sizes

ANYONE, NOBODY = -2, -3  # in the place of a key's sequence: all see it, none does
_FEWEST = -1e30  # a score that counts for nothing
_NT = (((1,), (1,)), ((), ()))  # x · yᵀ

Pair = tuple[chex.Array, chex.Array]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What the kernels are compiled for.

    Attributes:
        scale: that scores are multiplied by.
        soft_cap: c of c·tanh(score / c); 0 = none.
        causal: of each part, whether query i sees its keys 0 to i only.
        windowed: whether the distance in positions is limited.
        interpret: to run anywhere, slowly.
    """

    scale: float
    soft_cap: float
    causal: tuple[bool, ...]
    windowed: bool
    interpret: bool = False


def _call(kernel: Kernel, body: Any, grid: tuple[int, ...], in_specs: Any, out_specs: Any, out_shape: Any, scratch: Any, *arguments: Any) -> Any:
    """Runs a kernel over a grid whose last axis adds up: it goes in order, the others in any."""
    semantics = ("parallel",) * (len(grid) - 1) + ("arbitrary",)
    return pl.pallas_call(
        body, grid=grid, in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), *in_specs], out_specs=out_specs, out_shape=out_shape, scratch_shapes=scratch,
        interpret=kernel.interpret, compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
    )(*arguments)  # fmt: skip


def _spread(row: chex.Array) -> chex.Array:
    """[1, n] -> [n, lanes], a column beside itself, by way of a transpose that the core has."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def _columns(spread: Any) -> Pair:
    """Marks (sequences, positions), each [n, 1], of a place that holds [2, n, lanes]."""
    return spread[0, :, :1], spread[1, :, :1]


def _rows(marks: Any) -> Pair:
    """Marks (sequences, positions), each [1, n], of a place that holds [2, n]."""
    return marks[:1], marks[1:]


def _spread_marks(spread: Any, marks: Any) -> None:
    spread[0], spread[1] = _spread(marks[:1]), _spread(marks[1:])


def _seen(kernel: Kernel, causal: bool, query: Pair, key: Pair, first: tuple[Any, Any], axis: int, window: Any) -> chex.Array:
    """Which scores of a block count; queries lie along `axis`, each side is (sequences, positions), `first` the index of its first query and key."""
    (sequences, positions), (key_sequences, key_positions) = query, key
    seen = (key_sequences == ANYONE) | (key_sequences == sequences)
    if kernel.windowed:
        seen &= positions - key_positions < window
    if causal:
        ahead = jax.lax.broadcasted_iota(jnp.int32, seen.shape, axis) - jax.lax.broadcasted_iota(jnp.int32, seen.shape, 1 - axis)
        seen &= ahead >= first[1] - first[0]
    return seen


def _capped(kernel: Kernel, scores: chex.Array) -> chex.Array:
    scores = scores * kernel.scale
    return scores if not kernel.soft_cap else jnp.tanh(scores / kernel.soft_cap) * kernel.soft_cap


def _d_scores(kernel: Kernel, weights: chex.Array, d_weights: chex.Array, mean: chex.Array, scores: chex.Array) -> chex.Array:
    """The gradient of the product of queries and keys: through the softmax, the cap and the scale."""
    d_scores = weights * (d_weights - mean) * kernel.scale
    return d_scores if not kernel.soft_cap else d_scores * (1 - jnp.square(scores / kernel.soft_cap))


def _dot(x: chex.Array, y: chex.Array, dimensions: Any = (((1,), (0,)), ((), ()))) -> chex.Array:
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)


def forward(kernel: Kernel, causal: bool, query, keys, values, query_marks, key_marks, window) -> tuple[chex.Array, chex.Array]:
    """Attention over one part.

    Args:
        kernel: what is compiled.
        causal: whether query i sees keys 0 to i only.
        query: [B, H, T, Dh].
        keys, values: [Bs, Hkv, Dh, S] and [Bs, Hkv, S, Dh].
        query_marks, key_marks: [B, 2, T] and [Bs, 2, S] int32.
        window: [1] int32.

    Returns:
        (attended [B, H, T, Dh] float32, log of the sum of exponentials [B, H, T] float32).
    """
    sizes = Sizes.of(query, keys)
    grid, at = by_query(sizes, causal)
    names = ("query_marks", "key_marks", "query", "keys", "values")
    out, log_sum = _call(
        kernel, functools.partial(_forward_body, kernel, causal), grid, [at[name] for name in names], [at["query"], at["row"]],
        [jax.ShapeDtypeStruct(query.shape, jnp.float32), jax.ShapeDtypeStruct((*query.shape[:2], 1, sizes.length), jnp.float32)],
        [pltpu.VMEM((2, sizes.block, LANES), jnp.int32), *[pltpu.VMEM((sizes.block, LANES), jnp.float32)] * 2],
        window, query_marks, key_marks, query, keys, values,
    )  # fmt: skip
    return out, log_sum[:, :, 0]


def _forward_body(kernel, causal, window, query_marks, key_marks, query, keys, values, out, log_sum, columns, most, total):
    i, j, last = pl.program_id(2), pl.program_id(3), pl.num_programs(3) - 1
    bq, bk = query.shape[0], keys.shape[1]

    @pl.when(j == 0)
    def _():
        _spread_marks(columns, query_marks)
        out[...], total[...] = jnp.zeros_like(out), jnp.zeros_like(total)
        most[...] = jnp.full_like(most, _FEWEST)

    @pl.when(j <= i if causal else True)
    def _():
        scores = _capped(kernel, _dot(query[...], keys[...]))
        seen = _seen(kernel, causal, _columns(columns), _rows(key_marks), (i * bq, j * bk), 0, window[0])
        before = most[:, :1]
        now = jnp.maximum(before, jnp.max(jnp.where(seen, scores, _FEWEST), axis=1, keepdims=True))
        weights, shrunk = jnp.where(seen, jnp.exp(scores - now), 0.0), jnp.exp(before - now)
        out[...] = out[...] * shrunk + _dot(weights.astype(values.dtype), values[...])
        total[...] = jnp.broadcast_to(total[:, :1] * shrunk + jnp.sum(weights, axis=1, keepdims=True), total.shape)
        most[...] = jnp.broadcast_to(now, most.shape)

    @pl.when(j == last)
    def _():
        nothing = total[...] == 0.0
        found = jnp.where(nothing, 1.0, total[...])
        out[...] = out[...] / found[:, :1]
        log_sum[...] = jnp.where(nothing, _FEWEST, most[...] + jnp.log(found)).T[:1]


def backward_query(kernel: Kernel, causal: bool, keys, values, key_marks, query, d_out, log_sum, mean, query_marks, window) -> chex.Array:
    """The gradient of the queries, as far as it comes from one part.

    Args:
        kernel, causal, keys, values, key_marks, query, query_marks, window: as of `forward`.
        d_out: [B, H, T, Dh], the gradient of what all parts gave together.
        log_sum: [B, H, 1, T] float32, over all parts.
        mean: [B, H, 1, T] float32, the product of d_out and what all parts gave.

    Returns:
        [B, H, T, Dh] float32.
    """
    sizes = Sizes.of(query, keys)
    grid, at = by_query(sizes, causal)
    names = ("query_marks", "key_marks", "query", "keys", "values", "query", "row", "row")
    return _call(
        kernel, functools.partial(_backward_query_body, kernel, causal), grid, [at[name] for name in names], at["query"],
        jax.ShapeDtypeStruct(query.shape, jnp.float32),
        [pltpu.VMEM((2, sizes.block, LANES), jnp.int32), pltpu.VMEM((2, sizes.block, LANES), jnp.float32)],
        window, query_marks, key_marks, query, keys, values, d_out, log_sum, mean,
    )  # fmt: skip


def _backward_query_body(kernel, causal, window, query_marks, key_marks, query, keys, values, d_out, log_sum, mean, d_query, columns, sums):
    i, j = pl.program_id(2), pl.program_id(3)
    bq, bk = query.shape[0], keys.shape[1]

    @pl.when(j == 0)
    def _():
        _spread_marks(columns, query_marks)
        sums[0], sums[1] = _spread(log_sum[...]), _spread(mean[...])
        d_query[...] = jnp.zeros_like(d_query)

    @pl.when(j <= i if causal else True)
    def _():
        scores = _capped(kernel, _dot(query[...], keys[...]))
        seen = _seen(kernel, causal, _columns(columns), _rows(key_marks), (i * bq, j * bk), 0, window[0])
        weights = jnp.where(seen, jnp.exp(scores - sums[0, :, :1]), 0.0)
        d_scores = _d_scores(kernel, weights, _dot(d_out[...], values[...], _NT), sums[1, :, :1], scores)
        d_query[...] += _dot(d_scores.astype(keys.dtype), keys[...], _NT)


def backward_keys(kernel: Kernel, causal: bool, keys, values, key_marks, query, d_out, log_sum, mean, query_marks, window) -> Pair:
    """The gradients of the keys and the values of one part.

    Args:
        kernel, causal, keys, values, key_marks, query, d_out, log_sum, mean, query_marks, window: as of `backward_query`.

    Returns:
        Two of [Bs, Hkv, S, Dh] float32.
    """
    sizes = Sizes.of(query, keys)
    grid, at = by_key(sizes, causal)
    names = ("query_marks", "key_marks", "query", "keys", "values", "query", "row", "row")
    return _call(
        kernel, functools.partial(_backward_keys_body, kernel, causal, sizes.length // sizes.block), grid, [at[name] for name in names],
        [at["values"]] * 2, [jax.ShapeDtypeStruct(values.shape, jnp.float32)] * 2,
        [pltpu.VMEM((2, sizes.key_block, LANES), jnp.int32), pltpu.VMEM((sizes.key_block, sizes.head_dim), keys.dtype)],
        window, query_marks, key_marks, query, keys, values, d_out, log_sum, mean,
    )  # fmt: skip


def _backward_keys_body(kernel, causal, blocks, window, query_marks, key_marks, query, keys, values, d_out, log_sum, mean, d_keys, d_values, columns, turned):
    j, n = pl.program_id(2), pl.program_id(3)
    i, bq, bk = n % blocks, query.shape[0], keys.shape[1]

    @pl.when(n == 0)
    def _():
        _spread_marks(columns, key_marks)
        turned[...] = keys[...].T
        d_keys[...], d_values[...] = jnp.zeros_like(d_keys), jnp.zeros_like(d_values)

    @pl.when(j <= i if causal else True)
    def _():
        scores = _capped(kernel, _dot(turned[...], query[...], _NT))
        seen = _seen(kernel, causal, _rows(query_marks), _columns(columns), (i * bq, j * bk), 1, window[0])
        weights = jnp.where(seen, jnp.exp(scores - log_sum[...]), 0.0)
        d_scores = _d_scores(kernel, weights, _dot(values[...], d_out[...], _NT), mean[...], scores)
        d_values[...] += _dot(weights.astype(d_out.dtype), d_out[...])
        d_keys[...] += _dot(d_scores.astype(query.dtype), query[...])
