"""Storage in less room: against loops in NumPy, through matmuls and attention, degenerate vectors, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgrpo_jax.models import attention, layers, quantised, transformer

RNG = np.random.default_rng(0)


def by_loop(x, axis):
    """(integers, scales) of vectors along `axis`, one at a time."""
    moved = np.moveaxis(x, axis, -1)
    flat = moved.reshape(-1, moved.shape[-1]).astype(np.float64)
    scales = np.array([max(abs(vector)) / 127 if vector.any() else 1 / 127 for vector in flat])
    integers = np.array([np.rint(vector / scale) for vector, scale in zip(flat, scales)])
    return np.moveaxis(integers.reshape(moved.shape), -1, axis), scales.reshape(moved.shape[:-1])


def restored(stored, dtype, *, axis):
    """The values of what `store(…, axis=axis)` made."""
    array, scales = quantised.read(stored, dtype)
    return array if scales is None else array * jnp.expand_dims(scales, axis)


@pytest.mark.parametrize("shape, axis", [((5,), 0), ((4, 6), 0), ((4, 6), 1), ((3, 2, 8, 5), 2), ((3, 2, 5, 8), 3), ((1, 1), 0)])
def test_integers_and_scales_equal_a_loop(shape, axis):
    x = RNG.normal(0, 10, shape).astype(np.float32)
    stored = quantised.store(x, "int8", axis=axis)
    integers, scales = by_loop(x, axis)
    assert stored.integers.dtype == jnp.int8 and stored.scales.dtype == jnp.float32
    assert np.abs(np.asarray(stored.integers, np.float64) - integers).max() <= 1 and np.mean(np.asarray(stored.integers) == integers) > 0.99
    np.testing.assert_allclose(stored.scales, scales, rtol=1e-6)
    back = restored(stored, jnp.float32, axis=axis)
    assert np.abs(back - x).max() <= scales.max() * 0.501


def test_half_precision_reaches_127_and_no_further():
    x = jnp.asarray(RNG.normal(0, 10, (500, 7)), jnp.bfloat16)
    stored = quantised.store(x, "int8", axis=1)
    integers, scales = by_loop(np.asarray(x, np.float64), 1)
    np.testing.assert_array_equal(np.abs(np.asarray(stored.integers, int)).max(axis=1), 127)
    assert np.abs(np.asarray(stored.integers, int) - integers).max() <= 1 and stored.scales.dtype == jnp.float32
    np.testing.assert_allclose(stored.scales, scales, rtol=1e-6)


def test_degenerate_vectors():
    x = np.array([[0, 0, 0], [5, 5, 5], [-1e30, 0, 1e-30], [1e-35, -1e-35, 0]], np.float32)
    back = restored(quantised.store(x, "int8", axis=1), jnp.float32, axis=1)
    np.testing.assert_allclose(back, [[0, 0, 0], [5, 5, 5], [-1e30, 0, 0], [1e-35, -1e-35, 0]], rtol=1e-5)


def test_bfloat16_and_model():
    x = RNG.normal(size=(3, 4)).astype(np.float32)
    assert quantised.store(x, "model", axis=0) is x
    np.testing.assert_array_equal(restored(quantised.store(x, "bfloat16", axis=0), jnp.float32, axis=0), x.astype(jnp.bfloat16).astype(np.float32))
    with pytest.raises(ValueError, match="^storage 'int4' is unknown: use one of model, bfloat16, int8$"):
        quantised.store(x, "int4", axis=0)


@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_what_is_computed_of_stored_arrays_is_what_is_computed_of_their_values(storage):
    """Matmul, attention over two parts, table and logits, of a float64 model, where rounding hides nothing."""
    with jax.enable_x64(True):
        x, weight = RNG.normal(size=(2, 3, 6)), RNG.normal(size=(6, 2, 5)) * [[[1, 10, 100, 1000, 0]]]
        stored = quantised.store(jnp.asarray(weight), storage, axis=0)
        np.testing.assert_allclose(layers.linear(x, stored), np.tensordot(x, restored(stored, x.dtype, axis=0), 1), rtol=1e-12)

        query = RNG.normal(size=(4, 3, 4, 8))
        parts, values = [], []
        for rows, size in ((2, 5), (4, 3)):
            keys, kept = RNG.normal(size=(rows, 2, 8, size)) * np.arange(1, size + 1), RNG.normal(size=(rows, 2, size, 8)) * np.arange(1, size + 1)[:, None]
            mask = RNG.random((rows, 1, size)) < 0.8
            pair = quantised.store(jnp.asarray(keys), storage, axis=2), quantised.store(jnp.asarray(kept), storage, axis=3)
            parts.append((*pair, mask))
            values.append((restored(pair[0], query.dtype, axis=2), restored(pair[1], query.dtype, axis=3), mask))
        np.testing.assert_allclose(attention.attend(query, parts), attention.attend(query, values), rtol=1e-9)

        table, hidden, ids = RNG.normal(size=(7, 6)) * np.arange(1, 8)[:, None], RNG.normal(size=(2, 3, 6)), np.array([[6, 0], [3, 3]])
        stored = quantised.store(jnp.asarray(table), storage, axis=1)
        back = np.asarray(restored(stored, hidden.dtype, axis=1))
        np.testing.assert_allclose(quantised.take(stored, ids, hidden.dtype), back[ids], rtol=1e-12)
        np.testing.assert_allclose(transformer.logits({"embedding": stored}, hidden), hidden @ back.T, rtol=1e-9)
        head = quantised.store(jnp.asarray(table.T), storage, axis=0)
        np.testing.assert_allclose(transformer.logits({"embedding": None, "head": head}, hidden), hidden @ back.T, rtol=1e-9)
