"""What the machine could do: the model's bare matmuls, and the reads of its cache, with nothing around them.

Weights lie as each matmul likes them best. No norm, no rotation, no softmax, no sampling beyond an argmax: whoever is timed against
this has to do those on top.
"""

import functools
from typing import Any, Callable

import jax
import jax.numpy as jnp

from launch.peers.job import Job
from pgrpo_jax.models.families import ModelConfig


def _weights(config: ModelConfig) -> dict[str, Any]:
    c, keys = config, jax.random.split(jax.random.key(0), 5)
    inner, kv = c.num_heads * c.head_dim, 2 * c.num_kv_heads * c.head_dim
    shapes = ((c.width, inner + kv), (inner, c.width), (c.width, 2 * c.mlp_width), (c.mlp_width, c.width))
    layers = [[jax.random.normal(key, shape) * 0.02 for key, shape in zip(jax.random.split(keys[layer % 4], 4), shapes)] for layer in range(c.num_layers)]
    return {"layers": layers, "embedding": jax.random.normal(keys[4], (c.vocab_size, c.width)) * 0.02}


def _layer(config: ModelConfig, x: Any, layer: Any) -> Any:
    """The four matmuls of a layer on [N, D]."""
    qkv, output, gate_up, down = layer
    x = x + (x @ qkv)[:, : output.shape[0]] @ output
    gate = x @ gate_up
    return x + (jax.nn.silu(gate[:, : config.mlp_width]) * gate[:, config.mlp_width :]) @ down


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode(config: ModelConfig, job: Job, weights: Any, prompt_cache: Any, cache: Any, tokens: Any) -> Any:
    """Decodes job.new_tokens tokens a row; at every step each layer's whole cache is read once."""

    def step(_: Any, carry: Any) -> Any:
        tokens, read = carry
        x = weights["embedding"][tokens]
        for layer, own, shared in zip(weights["layers"], cache, prompt_cache, strict=True):
            x = _layer(config, x, layer)
            read = read + jnp.sum(own + x[0, 0]) + jnp.sum(shared + x[0, 0])
        return jnp.argmax(x @ weights["embedding"].T, axis=-1).astype(jnp.int32), read

    return jax.lax.fori_loop(0, job.new_tokens, step, (tokens, jnp.zeros(())))


def decode(config: ModelConfig, job: Job) -> Callable[[], None]:
    """Returns a call that decodes the job's tokens at the ceiling: all rows at once, the caches half full, as they are on average."""
    weights = _weights(config)
    size = 2 * config.num_kv_heads * config.head_dim
    own = [jnp.ones((job.num_sequences, job.new_tokens // 2, size)) + layer for layer in range(config.num_layers)]
    shared = [jnp.ones((job.num_prompts, job.prompt_tokens, size)) + layer for layer in range(config.num_layers)]
    tokens = jnp.arange(job.num_sequences, dtype=jnp.int32)
    return lambda: jax.block_until_ready(_decode(config, job, weights, shared, own, tokens))


@functools.partial(jax.jit, static_argnums=0)
def _gradient(config: ModelConfig, weights: Any, x: Any, completions: Any) -> Any:
    def loss(weights: Any) -> Any:
        h = x
        for layer in weights["layers"]:
            h = _layer(config, h, layer)
        return jnp.sum((h[completions] @ weights["embedding"].T) ** 2)

    return jax.grad(loss)(weights)


@functools.partial(jax.jit, static_argnums=0)
def _forward(config: ModelConfig, weights: Any, x: Any, completions: Any) -> Any:
    for layer in weights["layers"]:
        x = _layer(config, x, layer)
    return jnp.sum(x[completions] @ weights["embedding"].T)


def learn(config: ModelConfig, job: Job, *, slices: int) -> Callable[[], None]:
    """Returns a call that does the matmuls of an update with a reference at the ceiling.

    Forward and backward of every token that prefix sharing leaves (each prompt once, each completion), the head on completion tokens only, and
    one forward more for the reference. Nothing is computed twice. In `slices` parts, whose gradients are not even added up.
    """
    weights = _weights(config)
    prompt, completion = job.num_prompts * job.prompt_tokens // slices, job.num_sequences * job.new_tokens // slices
    x = jax.random.normal(jax.random.key(1), (prompt + completion, config.width))
    rows = jnp.arange(prompt, prompt + completion)

    def call() -> None:
        for _ in range(slices):
            jax.block_until_ready((_gradient(config, weights, x, rows), _forward(config, weights, x, rows)))

    return call
