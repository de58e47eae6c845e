"""Log-probs of tokens straight from hidden states: logits exist for a few positions at a time, in the forward pass and in the backward pass.

The logits of a whole batch, [N, T, V], would be its largest array by far. Here they are made chunk by chunk along T, reduced to a log-prob and
an entropy a token, and made once more on the way back, where the gradient follows in closed form.
"""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp

from pgrpo_jax.generation import sampler
from pgrpo_jax.generation.sampler import Support
from pgrpo_jax.models import transformer

MOST_LOGITS = 2**25  # numbers in one chunk


def chunk_length(rows: int, length: int, vocab: int) -> int:
    """Returns how many of `length` positions of `rows` rows go into one chunk: equal ones, with no more than `MOST_LOGITS` logits, at least one position."""
    most = max(1, MOST_LOGITS // (rows * vocab))
    return -(-length // -(-length // most))


def log_probs(params: Any, hidden: chex.Array, tokens: chex.Array, support: Support, soft_cap: float = 0.0) -> tuple[chex.Array, chex.Array]:
    """Scores tokens under the sampling distribution, as `sampler.log_probs` of `transformer.logits` does, in less memory.

    Args:
        params: of which "head", or the tied "embedding", makes logits.
        hidden: [N, T, D] after the final norm.
        tokens: [N, T] int32.
        support: the sampling distribution.
        soft_cap: of the logits, as `transformer.logits`.

    Returns:
        (log-probs [N, T], entropies [N, T] in nats), float32 or wider.
    """
    chex.assert_rank([hidden, tokens], [3, 2])
    name = "head" if "head" in params else "embedding"
    (rows, length), vocab = tokens.shape, params[name].shape[1 if name == "head" else 0]
    size = chunk_length(rows, length, vocab)
    filling = ((0, 0), (0, -length % size))
    chunks = (_cut(jnp.pad(hidden, (*filling, (0, 0))), size), _cut(jnp.pad(tokens, filling), size))
    scores = _log_probs(support, soft_cap, name, params[name], *chunks)
    return tuple(jnp.moveaxis(x, 0, 1).reshape(rows, -1)[:, :length] for x in scores)


def _cut(x: chex.Array, size: int) -> chex.Array:
    """[N, T, ...] -> [T / size, N, size, ...]: along T, because a mesh splits N."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _log_probs(support, soft_cap, name, head, hidden, tokens):
    """`log_probs` of chunks: hidden [C, N, size, D], tokens [C, N, size]; each result [C, N, size]."""
    return _forward(support, soft_cap, name, head, hidden, tokens)[0]


def _forward(support, soft_cap, name, head, hidden, tokens):
    def one(chunk):
        hidden, tokens = chunk
        logits = transformer.logits({name: head}, hidden, soft_cap)
        largest = jnp.max(logits, axis=-1) / jnp.asarray(support.temperature, logits.dtype)
        kept = sampler.restrict(logits, support, keep=tokens)
        weights = jnp.exp(kept)
        total = _sum(weights)
        mean = _sum(jnp.where(weights > 0, weights * kept, 0)) / total
        normaliser = jnp.log(total)
        log_probs = jnp.take_along_axis(kept, tokens[..., None], axis=-1)[..., 0] - normaliser
        return log_probs, normaliser - mean, largest + normaliser

    log_probs, entropies, normalisers = jax.lax.map(one, (hidden, tokens))
    return (log_probs, entropies), (head, hidden, tokens, log_probs, entropies, normalisers)


def _sum(x: chex.Array) -> chex.Array:
    """Sums the last axis as a product with ones: fused into a sum, a CPU would take the exponentials one by one."""
    return jnp.matmul(x, jnp.ones((x.shape[-1], 1), x.dtype), precision="highest")[..., 0]


def _backward(support, soft_cap, name, kept, cotangents):
    """d log p_y / d z_i = (1[i = y] − p_i) / temperature; d H / d z_i = −p_i (log p_i + H) / temperature; tokens outside the support have p = 0.

    Of capped logits z = c·tanh(x / c), d z_i / d x_i = 1 − (z_i / c)². The 1[i = y] is a lookup in the head, and its gradient a scatter, as an embedding's: no need to write it into the logits.
    """
    head, hidden, tokens, log_probs, entropies, normalisers = kept
    inverse = jnp.asarray(1 / support.temperature, normalisers.dtype)
    by_vocab = (lambda x: x) if name == "embedding" else jnp.transpose  # [V, D] as the embedding is

    def one(total, chunk):
        hidden, tokens, entropies, normalisers, to_log_probs, to_entropies = chunk
        logits = transformer.logits({name: head}, hidden, soft_cap)
        scores = logits * inverse - normalisers[..., None]
        if not support.whole:
            scores = jnp.where(jnp.isneginf(sampler.restrict(logits, support, keep=tokens)), -jnp.inf, scores)
        probabilities = jnp.exp(scores)
        spread = jnp.where(probabilities > 0, scores, 0) + entropies[..., None]
        gradient = -inverse * probabilities * (to_log_probs[..., None] + to_entropies[..., None] * spread)
        gradient = (gradient * _slope(logits, soft_cap)).astype(hidden.dtype)
        axes = (gradient, hidden) if name == "embedding" else (hidden, gradient)
        to_hidden = jnp.einsum("ntv,vd->ntd" if name == "embedding" else "ntv,dv->ntd", gradient, head.astype(hidden.dtype))
        return total + jnp.tensordot(*axes, ((0, 1), (0, 1))).astype(total.dtype), to_hidden

    to_head, to_hidden = jax.lax.scan(one, jnp.zeros_like(head), (hidden, tokens, entropies, normalisers, *cotangents))
    chosen = (cotangents[0] * inverse * _slope((log_probs + normalisers) / inverse, soft_cap))[..., None]
    to_hidden = to_hidden + (chosen * jnp.take(by_vocab(head), tokens, axis=0).astype(chosen.dtype)).astype(hidden.dtype)
    lookups = by_vocab(to_head).at[tokens].add((chosen * hidden.astype(chosen.dtype)).astype(head.dtype))
    return by_vocab(lookups), to_hidden, None


def _slope(capped, soft_cap):
    """The derivative of `attention.capped` where it gave this; 1 without a cap."""
    return 1 if not soft_cap else 1 - jnp.square(capped / jnp.asarray(soft_cap, capped.dtype))


_log_probs.defvjp(_forward, _backward)
