"""Scoring: log-probs of given completions in the learner's layout, each prompt computed once for all its completions."""

from typing import Any

import chex
import jax.numpy as jnp

from pgrpo_jax.generation import chunked, sampler
from pgrpo_jax.models import transformer
from pgrpo_jax.models.transformer import KeyValues, Segment, Transformer
from pgrpo_jax.structs import TrainBatch


def score(model: Transformer, params: Any, batch: TrainBatch, support: sampler.Support) -> tuple[chex.Array, chex.Array]:
    """Log-probs of every completion token under the sampling distribution; gradients are exact, prompts included.

    Logits are computed on completion tokens only: token t is predicted from the inputs (last prompt token, completion
    tokens before t), which attend to the rest of the prompt as context.

    Args:
        model: the transformer.
        params: its parameters.
        batch: prompts and completions; rewards and preference groups are not read.
        support: the distribution the completions were sampled from.

    Returns:
        (log-probs [N, Tc], entropies [N, Tc] in nats); values on padding are finite and meaningless.
    """
    prefix = transformer.prefill(model, params, batch.prompts, batch.prompt_lengths)
    rows = batch.prompt_index
    context = Segment(
        key_values=KeyValues(
            keys=jnp.take(prefix.key_values.keys, rows, axis=1), values=jnp.take(prefix.key_values.values, rows, axis=1)
        ),
        mask=jnp.take(prefix.mask, rows, axis=0),
    )
    first = jnp.take(transformer.last_tokens(batch.prompts, batch.prompt_lengths), rows)
    inputs = jnp.concatenate([first[:, None], batch.completions[:, :-1]], axis=1)
    start = jnp.take(batch.prompt_lengths, rows)[:, None] - 1
    positions = start + jnp.arange(inputs.shape[1], dtype=jnp.int32)[None, :]
    hidden, _ = transformer.forward(model, params, inputs, positions, (context,))
    return chunked.log_probs(params, hidden, batch.completions, support)
