"""A matmul whose rows lie in runs, each with a matrix of its own: of the experts of a layer.

On TPUs the kernel is megablox (Gale et al. 2022, arXiv:2211.15841, as JAX ships it). Elsewhere it is a loop over blocks of rows, here: `jax.lax.ragged_dot`
is lowered there to a matmul of all rows with all matrices.
"""

import functools

import chex
import jax
import jax.numpy as jnp

from pgrpo_jax.models.quantised import wide

_BLOCKS = (8, 512)  # the fewest and the most rows that the loop multiplies at once
_TILES = (128, 512, 512)  # of rows, inputs and outputs; with float32 and two buffers they take a quarter of a core's 16 MB


def grouped_matmul(rows: chex.Array, matrices: chex.Array, sizes: chex.Array, *, platform: str) -> chex.Array:
    """Multiplies each run of rows by its matrix.

    Args:
        rows: [M, K] float, the run of matrix 0 first.
        matrices: [E, K, ...], float, or integers (then without a gradient).
        sizes: [E] int32, rows of each run; together at most M.
        platform: of the devices it runs on.

    Returns:
        [M, ...] in the dtype of rows; rows behind the last run hold anything, and what their gradient holds is not looked at.
    """
    flat = matrices.reshape(*matrices.shape[:2], -1)
    out = megablocks(rows, flat, sizes) if platform == "tpu" else _by_blocks(rows, flat, sizes)
    return out.reshape(-1, *matrices.shape[2:])


def megablocks(rows: chex.Array, matrices: chex.Array, sizes: chex.Array, *, interpret: bool = False) -> chex.Array:
    """`grouped_matmul` of matrices [E, K, N] by the kernel for TPUs; with `interpret` anywhere, slowly."""
    from jax.experimental.pallas.ops.tpu import megablox  # here: half a second of start-up that other platforms do without

    padded = jnp.pad(rows, ((0, -len(rows) % _TILES[0]), (0, 0)))
    tiles = (_TILES[0], min(_TILES[1], rows.shape[1]), min(_TILES[2], matrices.shape[2]))
    return megablox.gmm(padded, matrices.astype(rows.dtype), sizes, rows.dtype, tiles, interpret=interpret)[: len(rows)]


@jax.custom_vjp
def _by_blocks(rows: chex.Array, matrices: chex.Array, sizes: chex.Array) -> chex.Array:
    """`grouped_matmul` of matrices [E, K, N], block after block: the arithmetic of what is there, and only matrices with rows are read."""
    return _blocks_times(rows, matrices, sizes, transposed=False)


def _forward(rows: chex.Array, matrices: chex.Array, sizes: chex.Array) -> tuple[chex.Array, tuple[chex.Array, ...]]:
    return _by_blocks(rows, matrices, sizes), (rows, matrices, sizes)


def _backward(kept: tuple[chex.Array, ...], dy: chex.Array) -> tuple[chex.Array, chex.Array, None]:
    rows, matrices, sizes = kept
    return _blocks_times(dy, matrices, sizes, transposed=True), _outer(rows, dy, sizes).astype(matrices.dtype), None


_by_blocks.defvjp(_forward, _backward)


def _blocks(count: int, sizes: chex.Array) -> tuple[int, chex.Array, tuple[chex.Array, ...]]:
    """Cuts the runs into blocks.

    Returns:
        (rows of a block, no more than a run has where all are alike; how many blocks there are; of each block its matrix, its first row and the end of its run).
    """
    fewest, most = _BLOCKS
    block = min(most, max(fewest, 1 << max(1, count // len(sizes)).bit_length() - 1))
    of_run, ends = -(-sizes // block), jnp.cumsum(sizes, dtype=jnp.int32)
    last = jnp.cumsum(of_run, dtype=jnp.int32)
    index = jnp.arange(count // block + len(sizes), dtype=jnp.int32)
    matrix = jnp.minimum(jnp.searchsorted(last, index, side="right"), len(sizes) - 1).astype(jnp.int32)
    first = (ends - sizes)[matrix] + (index - (last - of_run)[matrix]) * block
    return block, last[-1], (matrix, first, ends[matrix])


@functools.partial(jax.jit, static_argnames="transposed")
def _blocks_times(rows: chex.Array, matrices: chex.Array, sizes: chex.Array, *, transposed: bool) -> chex.Array:
    """Rows times their matrices [E, K, N], or with `transposed` [M, N] times their transposes."""
    block, number, (matrix, first, _) = _blocks(len(rows), sizes)
    padded = jnp.pad(rows, ((0, block), (0, 0)))
    inputs, outputs = (2, 1) if transposed else (1, 2)

    def multiply(n: chex.Array, out: chex.Array) -> chex.Array:
        part = jax.lax.dynamic_slice_in_dim(padded, first[n], block)
        own = jax.lax.dynamic_index_in_dim(matrices, matrix[n], keepdims=False).astype(rows.dtype)
        # Rows behind the end of the run are those of the next one, whose block is written next.
        return jax.lax.dynamic_update_slice_in_dim(out, jax.lax.dot_general(part, own, (((1,), (inputs - 1,)), ((), ()))), first[n], axis=0)

    start = jnp.zeros((len(padded), matrices.shape[outputs]), rows.dtype)
    return jax.lax.fori_loop(0, number, multiply, start)[: len(rows)]


@jax.jit
def _outer(rows: chex.Array, dy: chex.Array, sizes: chex.Array) -> chex.Array:
    """Of each run rowsᵀ·dy, [E, K, N]; 0 where a run is empty. Summed in float32 or wider."""
    block, number, (matrix, first, end) = _blocks(len(rows), sizes)
    exact = wide(rows.dtype)
    rows, dy = (jnp.pad(x, ((0, block), (0, 0))) for x in (rows, dy))
    within = jnp.arange(block, dtype=jnp.int32)[:, None]

    def add(n: chex.Array, sums: chex.Array) -> chex.Array:
        part, of_dy = (jax.lax.dynamic_slice_in_dim(x, first[n], block) for x in (rows, dy))
        # Both: behind the last run there may be NaN, and 0 times NaN is NaN.
        part, of_dy = (jnp.where(first[n] + within < end[n], x, jnp.zeros((), x.dtype)) for x in (part, of_dy))
        more = jax.lax.dot_general(part, of_dy, (((0,), (0,)), ((), ())), preferred_element_type=exact)
        before = jax.lax.dynamic_index_in_dim(sums, matrix[n], keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(sums, before + more, matrix[n], axis=0)

    return jax.lax.fori_loop(0, number, add, jnp.zeros((len(sizes), rows.shape[1], dy.shape[1]), exact))
