"""How the kernels of attention go through blocks of queries and of keys: which block of each array is in the core at which place of a grid."""

import dataclasses
from typing import Any

import chex
import jax.numpy as jnp
from jax.experimental import pallas as pl

LANES = 128  # of a TPU's vectors
_BLOCKS = (512, 256, 128)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of one part, and the blocks they are cut into.

    Attributes:
        rows: B, of queries.
        heads: H.
        length: T, queries of a row.
        head_dim: Dh.
        key_rows: Bs.
        key_heads: Hkv.
        keys: S, of a row.
    """

    rows: int
    heads: int
    length: int
    head_dim: int
    key_rows: int
    key_heads: int
    keys: int

    @classmethod
    def of(cls, query: chex.Array, keys: chex.Array) -> "Sizes":
        """Returns the sizes of queries [B, H, T, Dh] and keys [Bs, Hkv, Dh, S]."""
        rows, heads, length, head_dim = query.shape
        return cls(rows, heads, length, head_dim, keys.shape[0], keys.shape[1], keys.shape[3])

    @property
    def block(self) -> int:
        """Queries of a block."""
        return next(size for size in _BLOCKS if self.length % size == 0)

    @property
    def key_block(self) -> int:
        """Keys of a block."""
        return next(size for size in _BLOCKS if self.keys % size == 0)

    @property
    def shared(self) -> int:
        """Rows that read the same keys."""
        return self.rows // self.key_rows

    @property
    def per_key_head(self) -> int:
        """Query heads that read the same key head."""
        return self.heads // self.key_heads


def filled(length: int) -> int:
    """Returns the length that one is filled up to, so that blocks are large: a multiple of the lanes, above one block of twice as many."""
    unit = LANES if length <= _BLOCKS[0] else 2 * LANES
    return -(-length // unit) * unit


def by_query(sizes: Sizes, causal: bool) -> tuple[tuple[int, ...], dict[str, pl.BlockSpec]]:
    """(grid, blocks) of a kernel that takes one block of queries and goes through their keys; of a causal part queries and keys are cut alike."""
    s, bq, bk = sizes, sizes.block, sizes.key_block

    def key(i: Any, j: Any) -> Any:  # a block that no query sees is not fetched: the one before stays
        return jnp.minimum(i, j) if causal else j

    blocks = {
        "query": pl.BlockSpec((None, None, bq, s.head_dim), lambda b, h, i, j: (b, h, i, 0)),
        "row": pl.BlockSpec((None, None, 1, bq), lambda b, h, i, j: (b, h, 0, i)),
        "query_marks": pl.BlockSpec((None, 2, bq), lambda b, h, i, j: (b, 0, i)),
        "keys": pl.BlockSpec((None, None, s.head_dim, bk), lambda b, h, i, j: (b // s.shared, h // s.per_key_head, 0, key(i, j))),
        "values": pl.BlockSpec((None, None, bk, s.head_dim), lambda b, h, i, j: (b // s.shared, h // s.per_key_head, key(i, j), 0)),
        "key_marks": pl.BlockSpec((None, 2, bk), lambda b, h, i, j: (b // s.shared, 0, key(i, j))),
    }
    return (s.rows, s.heads, s.length // bq, s.keys // bk), blocks


def by_key(sizes: Sizes, causal: bool) -> tuple[tuple[int, ...], dict[str, pl.BlockSpec]]:
    """(grid, blocks) of a kernel that takes one block of keys and goes through the queries of all rows and query heads that read them."""
    s, bq, bk = sizes, sizes.block, sizes.key_block
    blocks = s.length // bq

    def at(b: Any, h: Any, j: Any, n: Any) -> tuple[Any, Any, Any]:
        row, head, i = n // (s.per_key_head * blocks), n // blocks % s.per_key_head, n % blocks
        return b * s.shared + row, h * s.per_key_head + head, jnp.maximum(i, j) if causal else i

    def query_marks(b: Any, h: Any, j: Any, n: Any) -> tuple[Any, int, Any]:
        row, _, i = at(b, h, j, n)
        return row, 0, i

    def row(b: Any, h: Any, j: Any, n: Any) -> tuple[Any, ...]:
        of_row, head, i = at(b, h, j, n)
        return of_row, head, 0, i

    specs = {
        "query": pl.BlockSpec((None, None, bq, s.head_dim), lambda *place: (*at(*place), 0)),
        "row": pl.BlockSpec((None, None, 1, bq), row),
        "query_marks": pl.BlockSpec((None, 2, bq), query_marks),
        "keys": pl.BlockSpec((None, None, s.head_dim, bk), lambda b, h, j, n: (b, h, 0, j)),
        "values": pl.BlockSpec((None, None, bk, s.head_dim), lambda b, h, j, n: (b, h, j, 0)),
        "key_marks": pl.BlockSpec((None, 2, bk), lambda b, h, j, n: (b, 0, j)),
    }
    return (s.key_rows, s.key_heads, s.keys // bk, s.shared * s.per_key_head * blocks), specs
