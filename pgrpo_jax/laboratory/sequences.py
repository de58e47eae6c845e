"""Floor 1: answers of several tokens in a world small enough for exact numbers: every token depends on the one before it.

    policy   log π(c | x) = Σ_t log softmax(L[x, t, c_{t-1}])[c_t]          c_{-1} = 0
    reward   R(x, c) = 1/T · Σ_t u[x, t, c_{t-1}, c_t]                      u uniform in [0, 1]

So what token t is worth depends on what comes after it, as in text, and expectation and optimum over all A^T answers are sums and maxima
from token to token.

Letters: X contexts (prompts there are), A tokens, T tokens of an answer (all are of this length), N completions.
"""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np


def every_completion(length: int, num_tokens: int) -> np.ndarray:
    """Returns all answers, [A^T, T] int32."""
    return np.array(list(itertools.product(range(num_tokens), repeat=length)), np.int32)


def token_log_probs(logits: chex.Array, contexts: chex.Array, completions: chex.Array) -> chex.Array:
    """Log-probs of the tokens of completions.

    Args:
        logits: [X, T, A, A] float, of every next token (last axis) after every token.
        contexts: [N] int.
        completions: [N, T] int.

    Returns:
        [N, T] float, nats.
    """
    return _along(jax.nn.log_softmax(logits, axis=-1), contexts, completions)


def rewards(utilities: chex.Array, contexts: chex.Array, completions: chex.Array) -> chex.Array:
    """Returns R of completions, [N] float, from the utilities u, [X, T, A, A]."""
    return jnp.mean(_along(utilities, contexts, completions), axis=1)


def _along(table: chex.Array, contexts: chex.Array, completions: chex.Array) -> chex.Array:
    """What a table [X, T, A, A] holds at each token of the completions, [N, T]."""
    before = jnp.pad(completions[:, :-1], ((0, 0), (1, 0)))
    return table[contexts[:, None], jnp.arange(completions.shape[1])[None, :], before, completions]


def draw(logits: chex.Array, contexts: chex.Array, uniform: chex.Array) -> chex.Array:
    """Samples completions by inverse cumulative distribution, so that one uniform number is one draw under every policy.

    Args:
        logits: [X, T, A, A] float.
        contexts: [N] int.
        uniform: [N, T] float in [0, 1).

    Returns:
        [N, T] int32.
    """
    below = jnp.cumsum(jax.nn.softmax(logits, axis=-1), axis=-1)

    def one(before: chex.Array, position: tuple[chex.Array, chex.Array]) -> tuple[chex.Array, chex.Array]:
        table, number = position  # [X, A, A], [N]
        token = jnp.sum(table[contexts, before] <= number[:, None], axis=-1, dtype=jnp.int32)
        token = jnp.minimum(token, logits.shape[-1] - 1)
        return token, token

    _, tokens = jax.lax.scan(one, jnp.zeros_like(contexts), (jnp.moveaxis(below, 1, 0), uniform.T))
    return tokens.T


def normalised_reward(logits: chex.Array, utilities: chex.Array) -> chex.Array:
    """True expected reward of a policy: 0 for the uniform policy, 1 for the best answer to every prompt.

    Args:
        logits: [X, T, A, A] float.
        utilities: [X, T, A, A] float; contexts are equally frequent.

    Returns:
        Scalar.
    """
    expected, random = [_total(table, utilities) for table in (logits, jnp.zeros_like(logits))]
    best = jnp.mean(_backwards(utilities, lambda worth, t: jnp.max(worth, axis=-1)))
    return (expected - random) / (best - random)


def _total(logits: chex.Array, utilities: chex.Array) -> chex.Array:
    probabilities = jax.nn.softmax(logits, axis=-1)
    return jnp.mean(_backwards(utilities, lambda worth, t: jnp.sum(probabilities[:, t] * worth, axis=-1)))


def _backwards(utilities: chex.Array, over_tokens) -> chex.Array:
    """Dynamic programming from the last token to the first: the sum of utilities, [X], where each token is averaged or chosen."""
    worth = jnp.zeros_like(utilities[:, 0, :, 0])  # [X, A] of what follows a token
    for t in reversed(range(utilities.shape[1])):
        worth = over_tokens(utilities[:, t] + worth[:, None, :], t)
    return worth[:, 0]
