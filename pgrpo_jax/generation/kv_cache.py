"""Keys and values of tokens, layer by layer, as decoding keeps them: made, moved between prompts and slots, widened, and cut.

What is shared lies once: the beginning that all prompts have in common in one row, prompts in one row for the slots of a block. Each slot's own
tokens lie in a ring (decoding.py).
"""

import functools
from typing import Any, Callable

import chex
import jax
import jax.numpy as jnp

from pgrpo_jax.models import quantised
from pgrpo_jax.models.quantised import Stored
from pgrpo_jax.models.transformer import Transformer

Caches = tuple[tuple[Stored, Stored], ...]  # of each layer: keys [*, Hkv, Dh, S], values [*, Hkv, S, Dh]; scales, where there are, [*, Hkv, S]


def keep(keys: chex.Array, values: chex.Array, storage: str) -> tuple[Stored, Stored]:
    """Returns keys [*, Hkv, Dh, S] and values [*, Hkv, S, Dh] as caches hold them; with int8 each token's vector has a scale."""
    return quantised.store(keys, storage, axis=2), quantised.store(values, storage, axis=3)


def extent(caches: Caches) -> tuple[int, int]:
    """Returns the (rows, columns) of caches; (1, 0) of none."""
    if not caches:
        return 1, 0
    keys = jax.tree.leaves(caches)[0]
    return keys.shape[0], keys.shape[-1]


def by_column(fn: Callable[..., chex.Array], *caches: Caches) -> Caches:
    """Applies a function to every array of one or more caches; it is told at which axis the columns lie."""
    keys = jax.tree.map(lambda first, *rest: fn(first, *rest, axis=first.ndim - 1), *[[keys for keys, _ in each] for each in caches])
    values = jax.tree.map(functools.partial(fn, axis=2), *[[values for _, values in each] for each in caches])
    return tuple(zip(keys, values, strict=True))


@jax.jit
def gather_prompts(prefilled: Caches, table: chex.Array) -> Caches:
    """Lays the prompts that each block holds next to each other.

    Args:
        prefilled: of P prompts of Tp tokens.
        table: [blocks, places] int32, the prompt at each place.

    Returns:
        Caches of `blocks` rows and places * Tp tokens.
    """

    def gathered(x: chex.Array, axis: int) -> chex.Array:
        x = jnp.moveaxis(jnp.take(x, table, axis=0), 1, axis)  # the places just before their columns
        return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

    return by_column(gathered, prefilled)


@functools.partial(jax.jit, donate_argnums=0)
def put_prompt(prefix: Caches, prefilled: Caches, block: chex.Array, place: chex.Array, prompt: chex.Array) -> Caches:
    """Returns `prefix`, of `gather_prompts`, with another prompt at a block's place; the three are int32 scalars."""

    def put(held: chex.Array, kept: chex.Array, axis: int) -> chex.Array:
        start = [block] + [0] * (held.ndim - 1)
        start[axis] = place * kept.shape[axis]
        return jax.lax.dynamic_update_slice(held, jax.lax.dynamic_slice_in_dim(kept, prompt, 1, axis=0), start)

    return by_column(put, prefix, prefilled)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def empty(model: Transformer, storage: str, rows: int, width: int) -> Caches:
    """Returns room for `width` tokens of each of `rows` slots."""
    c = model.config
    keys, values = [(rows, c.num_kv_heads, *shape) for shape in ((c.head_dim, width), (width, c.head_dim))]
    return tuple(keep(jnp.zeros(keys, model.dtype), jnp.zeros(values, model.dtype), storage) for _ in range(c.num_layers))


@functools.partial(jax.jit, static_argnums=1)
def resize(caches: Caches, width: int, first: chex.Array) -> Caches:
    """Returns a ring of `width` columns that begins with column `first`, int32 scalar, of the old one and goes on as that did."""

    def turned(x: chex.Array, axis: int) -> chex.Array:
        x = jnp.roll(x, -first, axis=axis)
        if width <= x.shape[axis]:
            return jax.lax.slice_in_dim(x, 0, width, axis=axis)
        return jnp.pad(x, [(0, width - size if place == axis else 0) for place, size in enumerate(x.shape)])

    return by_column(turned, caches)


@jax.jit
def take_rows(tree: Any, rows: chex.Array) -> Any:
    """Returns some rows of arrays [B, ...]: those of `rows` int32, in that order."""
    return jax.tree.map(lambda x: jnp.take(x, rows, axis=0), tree)
