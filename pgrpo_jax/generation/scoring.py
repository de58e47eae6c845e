"""Scoring: log-probs of given completions in the learner's layout, each prompt computed once for all its completions."""

import math
from typing import Any

import chex
import jax
import jax.numpy as jnp

from pgrpo_jax.generation import chunked, sampler
from pgrpo_jax.models import transformer
from pgrpo_jax.models.transformer import Transformer
from pgrpo_jax.structs import TrainBatch


def score(model: Transformer, params: Any, batch: TrainBatch, support: sampler.Support) -> tuple[chex.Array, chex.Array]:
    """Log-probs of every completion token under the sampling distribution; gradients are exact, prompts included.

    Logits are computed on completion tokens only: token t is predicted from the inputs (last prompt token, completion
    tokens before t), which attend to the rest of the prompt as context.

    Args:
        model: the transformer.
        params: its parameters.
        batch: prompts and completions, those of a prompt together and equally many for each; rewards are not read, preference groups name the adapters
            of a model that has several.
            With a `packing` the model computes its rows in place of the completions'; gradients stay exact, values move by rounding.
        support: the distribution the completions were sampled from.

    Returns:
        (log-probs [N, Tc], entropies [N, Tc] in nats); values on padding are finite and meaningless.
    """
    prefix = transformer.prefill(model, params, batch.prompts, batch.prompt_lengths, batch.preference_ids)
    per_prompt = len(batch.completions) // len(batch.prompts)
    last = transformer.last_tokens(batch.prompts, batch.prompt_lengths)
    first, start = [jnp.repeat(x, per_prompt)[:, None] for x in (last, batch.prompt_lengths - 1)]
    inputs = jnp.concatenate([first, batch.completions[:, :-1]], axis=1)
    positions = start + jnp.arange(inputs.shape[1], dtype=jnp.int32)[None, :]
    tokens, sequences = batch.completions, None
    if batch.packing is not None:
        inputs, positions, tokens = [_packed(x, batch.packing) for x in (inputs, positions, tokens)]
        sequences = (batch.packing // batch.completions.shape[1]).reshape(tokens.shape)
    adapters = jnp.repeat(batch.preference_ids, len(inputs) // len(batch.prompts))
    hidden, _ = transformer.forward(model, params, inputs, positions, (prefix,), sequences, adapters)
    scores = chunked.log_probs(params, hidden, tokens, support, model.config.logit_soft_cap)
    return scores if batch.packing is None else tuple(_unpacked(x, batch.packing, batch.completions.shape) for x in scores)


def _packed(x: chex.Array, packing: chex.Array) -> chex.Array:
    """[N, Tc] -> [P * R, C]; what lies at places without a token is some value of x. By prompt, so that no device needs another's rows."""
    num_prompts, rows, size = packing.shape
    places = jnp.maximum(packing.reshape(num_prompts, -1), 0)
    return jnp.take_along_axis(x.reshape(num_prompts, -1), places, axis=1).reshape(num_prompts * rows, size)


def _unpacked(x: chex.Array, packing: chex.Array, shape: tuple[int, int]) -> chex.Array:
    """[P * R, C] -> [N, Tc], the inverse of `_packed`; 0 on padding."""
    num_prompts, size = len(packing), math.prod(shape) // len(packing)
    places = jnp.where(packing < 0, size, packing).reshape(num_prompts, -1)  # behind the end, where nothing is written
    spread = jax.vmap(lambda at, values: jnp.zeros(size, x.dtype).at[at].set(values, mode="drop"))
    return spread(places, x.reshape(num_prompts, -1)).reshape(shape)
