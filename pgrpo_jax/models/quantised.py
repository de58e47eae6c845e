"""Numbers kept in less room than they are computed in: bfloat16, or 8-bit integers with a scale for each vector (symmetric, absolute maximum)."""

from typing import Any

import chex
import jax.numpy as jnp

STORAGE = ("model", "bfloat16", "int8")  # "model" = in the dtype that they are computed in
_GREATEST = 127


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Quantised:
    """Vectors of integers with a scale each; value = integer * scale.

    Attributes:
        integers: int8, any shape.
        scales: float32 or wider, the shape without the axis along which the vectors lie.
    """

    integers: chex.Array
    scales: chex.Array


Stored = chex.Array | Quantised


def store(x: chex.Array, storage: str, *, axis: int) -> Stored:
    """Returns an array as it is kept.

    Args:
        x: floats.
        storage: one of `STORAGE`.
        axis: along which the vectors lie that share a scale; a matmul over that axis multiplies by the scales afterwards.

    Raises:
        ValueError: an unknown storage.
    """
    if storage == "model":
        return x
    if storage == "bfloat16":
        return x.astype(jnp.bfloat16)
    if storage != "int8":
        raise ValueError(f"storage {storage!r} is unknown: use one of {', '.join(STORAGE)}")
    x = x.astype(wide(x.dtype))  # in half precision the greatest would round to 128
    greatest = jnp.max(jnp.abs(x), axis=axis, keepdims=True)
    scales = jnp.where(greatest > 0, greatest, jnp.ones_like(greatest)) / jnp.asarray(_GREATEST, x.dtype)
    return Quantised(integers=jnp.round(x / scales).astype(jnp.int8), scales=jnp.squeeze(scales, axis))


def read(stored: Stored, dtype: Any) -> tuple[chex.Array, chex.Array | None]:
    """Returns (array in `dtype`, the scales that what is computed of it is to be multiplied by; None = 1)."""
    if isinstance(stored, Quantised):
        return stored.integers.astype(dtype), stored.scales.astype(dtype)
    return stored.astype(dtype), None


def plain(stored: Stored, dtype: Any, *, axis: int) -> chex.Array:
    """Returns the values in `dtype`; `axis` is that along which the vectors lie."""
    found, scales = read(stored, dtype)
    return found if scales is None else found * jnp.expand_dims(scales, axis)


def take(table: Stored, rows: chex.Array, dtype: Any) -> chex.Array:
    """Returns rows [*, D] of a table [V, D] stored with a scale for each row."""
    if isinstance(table, Quantised):
        scales = jnp.take(table.scales, rows, axis=0).astype(dtype)
        return jnp.take(table.integers, rows, axis=0).astype(dtype) * jnp.expand_dims(scales, -1)
    return jnp.take(table, rows, axis=0).astype(dtype)


def wide(dtype: Any) -> Any:
    """Returns what sums and scores are kept in: float32 for half-precision types, the type itself otherwise."""
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype
