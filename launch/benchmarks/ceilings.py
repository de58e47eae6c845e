"""What the machine could do: the model's bare matmuls, and the reads of its cache, with nothing around them.

Weights lie as each matmul likes them best. No norm, no rotation, no softmax, no sampling beyond an argmax: whoever is timed against
this has to do those on top.
"""

import functools
from typing import Any, Callable

import jax
import jax.numpy as jnp

from launch.peers.job import Job
from pgrpo_jax.models.config import ModelConfig


def _weights(config: ModelConfig) -> dict[str, Any]:
    c, keys = config, jax.random.split(jax.random.key(0), 5)
    inner, kv = c.num_heads * c.head_dim, 2 * c.num_kv_heads * c.head_dim
    shapes = ((c.width, inner + kv), (inner, c.width), (c.width, 2 * c.mlp_width), (c.mlp_width, c.width))
    layers = [[jax.random.normal(key, shape) * 0.02 for key, shape in zip(jax.random.split(keys[layer % 4], 4), shapes)] for layer in range(c.num_layers)]
    return {"layers": layers, "embedding": jax.random.normal(keys[4], (c.vocab_size, c.width)) * 0.02}


def _layer(config: ModelConfig, x: Any, layer: Any, attend: Callable[[Any], Any]) -> Any:
    """The matmuls of a layer on [N, D]: four with weights, and those of `attend`, from queries, keys and values to what is attended to."""
    qkv, output, gate_up, down = layer
    x = x + attend(x @ qkv) @ output
    gate = x @ gate_up
    return x + (jax.nn.silu(gate[:, : config.mlp_width]) * gate[:, config.mlp_width :]) @ down


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode(config: ModelConfig, job: Job, weights: Any, prompt_cache: Any, cache: Any, tokens: Any) -> Any:
    """Decodes job.new_tokens tokens a row; at every step each layer's whole cache is read once, in place of attention."""
    queries = config.num_heads * config.head_dim

    def step(_: Any, carry: Any) -> Any:
        tokens, read = carry
        x = weights["embedding"][tokens]
        for layer, own, shared in zip(weights["layers"], cache, prompt_cache, strict=True):
            x = _layer(config, x, layer, lambda qkv: qkv[:, :queries])
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


def _attention(config: ModelConfig, qkv: Any, rows: int, length: int, keys: Any, values: Any) -> Any:
    """The two matmuls of attention: [rows · length, …] queries with keys and values [rows, Hkv, S, Dh]; no mask, no softmax."""
    c = config
    query = qkv[:, : c.num_heads * c.head_dim].reshape(rows, length, c.num_kv_heads, -1, c.head_dim).transpose(0, 2, 3, 1, 4)
    out = (query.reshape(rows, c.num_kv_heads, -1, c.head_dim) @ keys.swapaxes(2, 3)) @ values
    return out.reshape(rows, c.num_kv_heads, -1, length, c.head_dim).transpose(0, 3, 1, 2, 4).reshape(rows * length, -1)


def _attend(config: ModelConfig, prompts: int, job: Job, qkv: Any) -> Any:
    """Attention of some prompts and, behind them, their completions: to the whole prompt, and to half of their own tokens, as causality leaves on average."""
    c, split, completions = config, prompts * job.prompt_tokens, prompts * job.completions_per_prompt

    def kept(part: Any, rows: int, length: int, used: int) -> tuple[Any, Any]:
        pairs = part[:, c.num_heads * c.head_dim :].reshape(rows, length, 2, c.num_kv_heads, c.head_dim)[:, :used].transpose(2, 0, 3, 1, 4)
        return pairs[0], pairs[1]

    prompt, completion = qkv[:split], qkv[split:]
    own = _attention(c, completion, completions, job.new_tokens, *kept(completion, completions, job.new_tokens, -(-job.new_tokens // 2)))
    shared = _attention(c, completion, prompts, job.completions_per_prompt * job.new_tokens, *kept(prompt, prompts, job.prompt_tokens, job.prompt_tokens))
    of_prompts = _attention(c, prompt, prompts, job.prompt_tokens, *kept(prompt, prompts, job.prompt_tokens, -(-job.prompt_tokens // 2)))
    return jnp.concatenate([of_prompts, own + shared])


def _logits(config: ModelConfig, prompts: int, job: Job, weights: Any, x: Any) -> Any:
    """The whole model on the tokens of some prompts and their completions; logits of the completions."""
    for layer in weights["layers"]:
        x = _layer(config, x, layer, functools.partial(_attend, config, prompts, job))
    return x[prompts * job.prompt_tokens :] @ weights["embedding"].T


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _gradient(config: ModelConfig, prompts: int, job: Job, weights: Any, x: Any) -> Any:
    return jax.grad(lambda weights: jnp.sum(_logits(config, prompts, job, weights, x) ** 2))(weights)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _forward(config: ModelConfig, prompts: int, job: Job, weights: Any, x: Any) -> Any:
    return jnp.sum(_logits(config, prompts, job, weights, x))


def learn(config: ModelConfig, job: Job, *, slices: int) -> Callable[[], None]:
    """Returns a call that does the matmuls of an update with a reference at the ceiling.

    Forward and backward of every token that prefix sharing leaves (each prompt once, each completion), the two matmuls of attention included, the
    head on completion tokens only, and one forward more for the reference. Nothing is computed twice. In `slices` parts, whose gradients are not
    even added up.
    """
    weights, prompts = _weights(config), job.num_prompts // slices
    x = jax.random.normal(jax.random.key(1), (prompts * (job.prompt_tokens + job.completions_per_prompt * job.new_tokens), config.width)) * 0.02

    def call() -> None:
        for _ in range(slices):
            jax.block_until_ready((_gradient(config, prompts, job, weights, x), _forward(config, prompts, job, weights, x)))

    return call
