"""The sampling distribution: one definition for the sampler that draws from it and the learner that scores under it.

Log-probs are those of the distribution that is really sampled: after temperature, top-k and top-p, renormalised on the kept
tokens. A learner that scored on the full vocabulary would see a probability ratio different from 1 on policy.
"""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Support:
    """Which tokens may be sampled, and how sharply. Hashable: a static argument of compiled programs.

    Attributes:
        temperature: > 0; logits are divided by it.
        top_k: keep the k most probable tokens; 0 = off.
        top_p: keep the smallest set of most probable tokens whose mass reaches top_p; 1 = off. After top_k.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    @property
    def whole(self) -> bool:
        """Whether every token may be sampled."""
        return self.top_k == 0 and self.top_p >= 1.0


def restrict(logits: chex.Array, support: Support, *, keep: chex.Array | None = None) -> chex.Array:
    """Applies temperature, top-k and top-p. Tokens tied with the last one kept are kept too, whoever computes it.

    Args:
        logits: [..., V].
        support: the sampling distribution.
        keep: [...] int32 or None; a token that stays in the support whatever its rank (the one that was sampled: rounding
            in another layout must not turn its log-prob into -inf).

    Returns:
        [..., V] logits / temperature, shifted so that the largest is 0; -inf outside the support.
    """
    # Log-probs and entropies are differences of these numbers: shifted they are small, and so is the rounding.
    largest, temperature = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)), jnp.asarray(support.temperature, logits.dtype)
    kept = scaled = (logits - largest) / temperature
    vocab = logits.shape[-1]
    # Logits are compared, not what becomes of them: a compiler may compute that once for each use, each in another rounding, and then nothing need
    # reach the threshold.
    if 0 < support.top_k < vocab:
        kept = jnp.where(logits >= jax.lax.top_k(logits, support.top_k)[0][..., -1:], scaled, -jnp.inf)
    if support.top_p < 1.0:
        ranked = -jnp.sort(-jnp.where(jnp.isneginf(kept), -jnp.inf, logits), axis=-1)
        mass = jnp.cumsum(jax.nn.softmax((ranked - largest) / temperature, axis=-1), axis=-1)
        # A token is kept while the mass before it is short of top_p: the first one always is.
        needed = jnp.concatenate([jnp.zeros_like(mass[..., :1]), mass[..., :-1]], axis=-1) < support.top_p
        threshold = jnp.min(jnp.where(needed, ranked, jnp.inf), axis=-1, keepdims=True)
        kept = jnp.where(logits >= threshold, kept, -jnp.inf)
    if keep is not None and kept is not scaled:
        kept = jnp.where(jax.nn.one_hot(keep, vocab, dtype=bool), scaled, kept)
    return kept


def log_probs(logits: chex.Array, tokens: chex.Array, support: Support) -> tuple[chex.Array, chex.Array]:
    """Scores tokens under the sampling distribution.

    Args:
        logits: [N, T, V] float32 or wider.
        tokens: [N, T] int32.
        support: the sampling distribution.

    Returns:
        (log-probs [N, T], entropies [N, T] in nats), both of the restricted, renormalised distribution.
    """
    chex.assert_rank([logits, tokens], [3, 2])
    kept = restrict(logits, support, keep=tokens)
    normaliser = jax.nn.logsumexp(kept, axis=-1)
    chosen = jnp.take_along_axis(kept, tokens[..., None], axis=-1)[..., 0]
    finite = jnp.where(jnp.isneginf(kept), jnp.zeros_like(kept), kept)
    probabilities = jnp.exp(kept - normaliser[..., None])
    return chosen - normaliser, normaliser - jnp.sum(probabilities * finite, axis=-1)


def sample(logits: chex.Array, uniforms: chex.Array, support: Support) -> tuple[chex.Array, chex.Array]:
    """Draws one token a row by inverting the cumulative distribution in two levels: no sort, one random number a row.

    A row's token depends on its own logits and its own random number only, so a completion does not change with its
    neighbours in the batch.

    Args:
        logits: [N, V] float32 or wider.
        uniforms: [N] in [0, 1).
        support: the sampling distribution.

    Returns:
        (tokens [N] int32, their log-probs [N]).
    """
    chex.assert_rank([logits, uniforms], [2, 1])
    rows, vocab = logits.shape
    kept = restrict(logits, support)  # the largest is 0: the sum of the weights is at least 1, and at most V
    weights = jnp.exp(kept)
    width = _block_width(vocab)
    blocks = jnp.pad(weights, ((0, 0), (0, -vocab % width))).reshape(rows, -1, width)
    masses = blocks.sum(axis=-1)
    total = masses.sum(axis=-1)
    block, rest = _first_above(masses, uniforms * total)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0, :]
    column, _ = _first_above(inside, rest)
    tokens = block * width + column
    return tokens, jnp.take_along_axis(kept, tokens[:, None], axis=-1)[:, 0] - jnp.log(total)


def _block_width(vocab: int) -> int:
    """About the square root of the vocabulary, a divisor of it where there is one near: then nothing is padded."""
    root = math.isqrt(vocab)
    return next((width for width in range(root, 2 * root) if vocab % width == 0), root)


def _first_above(weights: chex.Array, targets: chex.Array) -> tuple[chex.Array, chex.Array]:
    """First index whose cumulative weight exceeds the target, never one of weight 0; and what of the target is left there."""
    cumulative = jnp.cumsum(weights, axis=-1)
    positive = weights > 0
    last = weights.shape[-1] - 1 - jnp.argmax(positive[:, ::-1], axis=-1).astype(jnp.int32)
    above = (cumulative > targets[:, None]) & positive
    index = jnp.where(jnp.any(above, axis=-1), jnp.argmax(above, axis=-1).astype(jnp.int32), last)
    before = jnp.take_along_axis(cumulative - weights, index[:, None], axis=-1)[:, 0]
    return index, jnp.maximum(targets - before, jnp.zeros_like(targets))
