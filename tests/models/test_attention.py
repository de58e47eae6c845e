"""Which kernel a platform is given, and cuDNN's call against `attend`; by JAX's own implementation of the call, as no GPU is needed for that.

What attention computes: test_transformer.py. The kernel for TPUs: test_flash_attention.py, test_tpu_compilation.py.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from pgrpo_jax.models import attention, quantised
from pgrpo_jax.models.config import ModelConfig

CONFIG = ModelConfig(
    num_layers=1, width=32, mlp_width=24, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=23, context_length=64, rope_theta=100.0,
    norm_epsilon=1e-5, tied_embeddings=True, query_scalar=5.0,
)  # fmt: skip


def inputs(dtype=jnp.float32, *, rows=6, prompts=2, length=10, prompt_length=6):
    """(queries, keys, values; keys, values, masks and positions of a context; positions), random; prompts have 6 and 3 tokens."""
    rng, (heads, key_heads, size) = np.random.default_rng(0), (CONFIG.num_heads, CONFIG.num_kv_heads, CONFIG.head_dim)
    shapes = (
        (rows, length, heads, size), (rows, key_heads, size, length), (rows, key_heads, length, size), (prompts, key_heads, size, prompt_length),
        (prompts, key_heads, prompt_length, size),
    )  # fmt: skip
    at = jnp.broadcast_to(jnp.arange(prompt_length, dtype=jnp.int32), (prompts, prompt_length))
    positions = jnp.repeat(jnp.asarray([6, 3, 6, 3], jnp.int32)[:prompts], rows // prompts)[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes], (at < jnp.asarray([6, 3, 6, 3], jnp.int32)[:prompts, None])[:, None], at, positions


def device(**changes):
    """What is asked of a GPU."""
    return types.SimpleNamespace(**({"platform": "gpu", "client": types.SimpleNamespace(platform_version="cuda 12090"), "compute_capability": "9.0"} | changes))


@pytest.fixture
def on_gpu(monkeypatch, lenient):
    """A platform that says it is a GPU, whose cuDNN is JAX's own implementation: implementations that were asked for."""
    asked, run = [], jax.nn.dot_product_attention

    def call(*arrays, implementation, **rest):
        asked.append(implementation)
        return run(*arrays, implementation="xla", **rest)

    monkeypatch.setattr(jax, "devices", lambda: [device()])
    monkeypatch.setattr(jax.nn, "dot_product_attention", call)
    return asked


def attended(arrays, mask, at, positions, **settings):
    query, keys, values, *context = arrays
    return attention.attention_over(CONFIG, [(*context, mask, at)], positions, **settings)(query, keys, values)[0]


@pytest.mark.parametrize("window, sequences", [(None, None), (4, None), (4, [0] * 4 + [1] * 4 + [-1] * 2)])
def test_cudnn_is_asked_for_what_attend_computes(window, sequences, on_gpu, monkeypatch):
    """Values and gradients, a prompt's keys shared by three rows, masks, windows and several sequences in a row."""
    arrays, *fixed = inputs(jnp.bfloat16)
    settings = {"window": window, "sequences": None if sequences is None else jnp.asarray([sequences] * 6, jnp.int32)}
    weights = jnp.asarray(np.random.default_rng(1).standard_normal(arrays[0].shape), jnp.bfloat16)

    def weighted(arrays, dtype):
        out = attended(jax.tree.map(lambda x: x.astype(dtype), arrays), *fixed, **settings)
        return jnp.sum(out.astype(jnp.float32) * weights.astype(jnp.float32)), out

    (_, out), gradient = jax.value_and_grad(weighted, has_aux=True)(arrays, jnp.bfloat16)
    assert on_gpu == ["cudnn"]
    monkeypatch.undo()
    (_, expected), expected_gradient = jax.value_and_grad(weighted, has_aux=True)(arrays, jnp.float32)
    for ours, theirs in zip([out, *gradient], [expected, *expected_gradient], strict=True):
        ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-2 * np.abs(theirs).max())


def test_cudnn_reads_caches_of_eight_bits(on_gpu):
    arrays, mask, at, positions = inputs(jnp.bfloat16)
    stored = [quantised.store(x, "int8", axis=axis) for x, axis in zip(arrays[3:], (2, 3))]
    plain = [quantised.plain(x, jnp.bfloat16, axis=axis) for x, axis in zip(stored, (2, 3))]
    found, expected = [attended([*arrays[:3], *context], mask, at, positions) for context in (stored, plain)]
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(expected, np.float32))
    assert on_gpu == ["cudnn"] * 2


@pytest.mark.parametrize(
    "changes, dtype, sizes",
    [({}, jnp.float32, {}), ({"score_soft_cap": 5.0}, jnp.bfloat16, {}), ({}, jnp.bfloat16, {"length": 9}), ({"head_dim": 12}, jnp.bfloat16, {})],
)
def test_what_cudnn_does_not_take_is_left_to_the_compiler(changes, dtype, sizes, on_gpu, monkeypatch):
    """Single precision, a cap, an odd number of tokens, heads that are no multiple of 8."""
    monkeypatch.setitem(globals(), "CONFIG", ModelConfig(**{**vars(CONFIG), **changes}))
    arrays, *fixed = inputs(dtype, **sizes)
    found = attended(arrays, *fixed)
    assert on_gpu == []
    monkeypatch.undo()
    monkeypatch.setitem(globals(), "CONFIG", ModelConfig(**{**vars(CONFIG), **changes}))
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(attended(arrays, *fixed), np.float32))


@pytest.mark.parametrize("changes", [{"platform": "cpu"}, {"client": types.SimpleNamespace(platform_version="rocm 6")}, {"compute_capability": "7.5"}])
def test_gpus_that_have_no_such_kernel(changes):
    query, *_ = inputs(jnp.bfloat16)[0]
    parts = [(None, None, np.ones((1, 1, 6), bool))]
    assert attention.cudnn_takes(device(), query, parts, 0.0) and not attention.cudnn_takes(device(**changes), query, parts, 0.0)


@pytest.mark.parametrize("rows, prompts", [(8, 4), (8, 2), (3, 1)])
def test_on_a_mesh_each_device_calls_cudnn_for_its_rows_and_heads(rows, prompts):
    (query, keys, values, *context), mask, _, _ = inputs(rows=rows, prompts=prompts)
    own = jnp.tril(jnp.ones((1, 10, 10), bool))
    parts = [(*context, mask[:prompts]), (keys, values, own)]
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "tp"))
    found = jax.jit(lambda query: attention.attend_by_cudnn(query, parts, scale=0.3, mesh=mesh, implementation="xla"))(query)
    np.testing.assert_allclose(found, attention.attend(query, parts, scale=0.3), atol=1e-5)
