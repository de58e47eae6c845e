"""The kernel for TPUs, interpreted: outputs and gradients against `attend` with the masks written out; compiled for TPUs in test_tpu_kernels.py."""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pgrpo_jax.models import attention, quantised, transformer
from pgrpo_jax.models.config import ModelConfig
from pgrpo_jax.models.flash_attention import flash_attention

TINY = ModelConfig(
    num_layers=2, width=16, mlp_width=24, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=23, context_length=1024, rope_theta=100.0,
    norm_epsilon=1e-5, tied_embeddings=True,
)  # fmt: skip
HEADS, KEY_HEADS, HEAD_DIM = 4, 2, 16


def inputs(*, prompts=2, per_prompt=3, length=150, prompt_length=140, sequences=1, seed=0):
    """Random queries, keys and values of completions and of their prompts, which are of uneven lengths; rows hold several sequences where asked for."""
    rng, rows = np.random.default_rng(seed), prompts * per_prompt
    lengths = np.linspace(prompt_length, 0, prompts).astype(np.int32)

    def drawn(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    owner = np.sort(rng.integers(-1, sequences, (rows, length)) if sequences > 1 else np.zeros((rows, length)), axis=1).astype(np.int32)
    places = np.array([[np.sum(row[:t] == row[t]) for t in range(length)] for row in owner], np.int32)
    arrays = {
        "query": drawn(rows, length, HEADS, HEAD_DIM), "keys": drawn(rows, KEY_HEADS, HEAD_DIM, length), "values": drawn(rows, KEY_HEADS, length, HEAD_DIM),
        "prompt_keys": drawn(prompts, KEY_HEADS, HEAD_DIM, prompt_length), "prompt_values": drawn(prompts, KEY_HEADS, prompt_length, HEAD_DIM),
    }  # fmt: skip
    at = np.arange(prompt_length, dtype=np.int32)
    fixed = {
        "mask": jnp.asarray(at[None, None] < lengths[:, None, None]), "at": jnp.asarray(np.broadcast_to(at, (prompts, prompt_length))),
        "positions": jnp.asarray(places + np.repeat(lengths, per_prompt)[:, None]), "sequences": jnp.asarray(owner) if sequences > 1 else None,
    }  # fmt: skip
    return arrays, fixed


def plain(arrays, fixed, *, window=None, **constants):
    """`attend` with every mask written out."""
    per_prompt, length = len(arrays["query"]) // len(arrays["prompt_keys"]), arrays["query"].shape[1]
    positions, own = fixed["positions"], np.tril(np.ones((1, length, length), bool))
    context = jnp.repeat(fixed["mask"], per_prompt, axis=0)
    if fixed["sequences"] is not None:
        own = own & (fixed["sequences"][:, :, None] == fixed["sequences"][:, None, :])
    if window is not None:
        own = own & (positions[:, :, None] - positions[:, None, :] < window)
        context = context & (positions[:, :, None] - jnp.repeat(fixed["at"], per_prompt, axis=0)[:, None, :] < window)
    parts = [(arrays["prompt_keys"], arrays["prompt_values"], context), (arrays["keys"], arrays["values"], own)]
    return attention.attend(arrays["query"], parts, **constants)


def kernel(arrays, fixed, **settings):
    parts = [(arrays["prompt_keys"], arrays["prompt_values"], fixed["mask"], fixed["at"])]
    rest = {"sequences": fixed["sequences"], "interpret": True} | settings
    return flash_attention(arrays["query"], arrays["keys"], arrays["values"], parts, fixed["positions"], **rest)


def compare(arrays, fixed, *, mesh=None, atol=3e-6, **settings):
    """Values and gradients of everything, each within `atol`, of its greatest where that is above 1."""
    weights = jnp.asarray(np.random.default_rng(9).standard_normal(arrays["query"].shape), arrays["query"].dtype)

    def valued(fn, **more):
        def weighted(arrays):
            out = fn(arrays, fixed, **settings, **more)
            return jnp.sum((out * weights).astype(jnp.float32)), out

        (_, out), gradient = jax.jit(jax.value_and_grad(weighted, has_aux=True))(arrays)
        return gradient | {"out": out}

    expected, found = valued(plain), valued(kernel, mesh=mesh)
    for name, value in expected.items():
        value, ours = np.asarray(value, np.float32), np.asarray(found[name], np.float32)
        assert np.all(np.isfinite(ours)), name
        np.testing.assert_allclose(ours, value, rtol=0, atol=atol * max(1.0, np.abs(value).max()), err_msg=name)


@pytest.mark.parametrize("window, soft_cap, sequences", [(None, 0.0, 1), (40, 0.0, 4), (200, 2.0, 4)])
def test_values_and_gradients_equal_those_of_masks_written_out(window, soft_cap, sequences):
    """Prompts of 140 tokens and of none, lengths that are no multiple of a block, one sequence a row or several and padding."""
    compare(*inputs(sequences=sequences), window=window, scale=0.3, soft_cap=soft_cap)


@pytest.mark.parametrize("length, prompt_length", [(1, 1), (600, 300), (300, 900)])
def test_lengths_of_one_block_and_of_several(length, prompt_length):
    """Blocks of 128, 256 and 512 tokens, of queries and keys unlike: those that causality leaves out and those it cuts."""
    compare(*inputs(prompts=1, per_prompt=2, length=length, prompt_length=prompt_length), scale=HEAD_DIM**-0.5)


def test_scores_that_exponentials_would_overflow_on():
    arrays, fixed = inputs()
    compare(arrays | {"query": arrays["query"] * 300}, fixed, scale=1.0, atol=1e-3)  # scores of thousands: float32 has four digits behind them


def test_half_precision():
    arrays, fixed = inputs()
    compare(jax.tree.map(lambda x: x.astype(jnp.bfloat16), arrays), fixed, scale=0.25, atol=2e-2)


def test_what_is_hidden_changes_no_bit():
    arrays, fixed = inputs()
    hidden = ~fixed["mask"][:, :, None, :]
    moved = arrays | {"prompt_keys": jnp.where(hidden, 1e4, arrays["prompt_keys"])}
    np.testing.assert_array_equal(kernel(moved, fixed, scale=0.25), kernel(arrays, fixed, scale=0.25))


def test_caches_of_eight_bits():
    arrays, fixed = inputs()
    stored = quantised.store(arrays["prompt_keys"], "int8", axis=2), quantised.store(arrays["prompt_values"], "int8", axis=3)
    read = [quantised.plain(x, jnp.float32, axis=axis) for x, axis in zip(stored, (2, 3))]
    parts = [(*stored, fixed["mask"], fixed["at"])]
    found = flash_attention(arrays["query"], arrays["keys"], arrays["values"], parts, fixed["positions"], scale=0.25, interpret=True)
    expected = plain(arrays | dict(zip(("prompt_keys", "prompt_values"), read)), fixed, scale=0.25)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("prompts, per_prompt", [(4, 2), (6, 2), (1, 8), (1, 3)])
def test_on_a_mesh_each_device_takes_its_rows_and_heads(prompts, per_prompt):
    """Eight devices, rows over four: prompts that divide, that do not, one for all, and rows that do not divide."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 1, 2), ("data", "fsdp", "expert", "tp"))
    arrays, fixed = inputs(prompts=prompts, per_prompt=per_prompt, length=20, prompt_length=10)
    everywhere = NamedSharding(mesh, PartitionSpec())
    compare(*jax.device_put((arrays, fixed), everywhere), mesh=mesh, scale=0.25)


def test_an_actor_s_devices_split_heads_alone():
    mesh = Mesh(np.array(jax.devices()[:2]), ("tp",))
    arrays, fixed = inputs(length=20, prompt_length=10)
    compare(*jax.device_put((arrays, fixed), NamedSharding(mesh, PartitionSpec())), mesh=mesh, scale=0.25)


def lowered(fn, *arguments):
    """The program that a TPU would be given, as text."""
    kind = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", platform="tpu", num_cores=1)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("data",), abstract_device=kind)):
        return jax.jit(fn).trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()


def test_a_model_on_a_tpu_never_holds_scores(monkeypatch):
    """Of a forward pass over prompts and completions and its gradient: the kernel's passes are there, and no array with an axis of queries and one of keys."""
    model = transformer.Transformer(TINY, remat="keep_nothing")
    params = transformer.initialise(model, jax.random.key(0))
    prompts, lengths, tokens = np.zeros((2, 384), np.int32), np.array([384, 5], np.int32), np.zeros((4, 256), np.int32)

    def loss(params):
        prefix = transformer.prefill(model, params, prompts, lengths)
        return jnp.sum(transformer.forward(model, params, tokens, tokens, (prefix,))[0])

    def scores(text):
        return [shape for shape in re.findall(r"tensor<([0-9x]+)xf32>", text) if {"384", "256"} <= set(shape.split("x")) or shape.split("x").count("256") > 1]

    assert scores(lowered(jax.grad(loss), params))
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(platform="tpu")])
    text = lowered(jax.grad(loss), params)
    # Prompts have one part, completions two; of each a forward pass, again on the way back, and two that give gradients. The scan holds one layer.
    assert text.count("tpu_custom_call") == 3 * (1 + 1 + 2) and not scores(text)
