"""Generation: each prompt is computed once for all its completions, and the whole decode loop runs on the device."""

import dataclasses
import functools
from typing import Any, Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np

from pgrpo_jax.generation import sampler
from pgrpo_jax.models import transformer
from pgrpo_jax.models.transformer import KeyValues, Segment, Transformer


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """What is generated.

    Attributes:
        max_new_tokens: Tc, tokens, stop token included.
        support: the sampling distribution.
        stop_ids: token ids that end a completion.
        pad_id: fills what lies behind the end.
        prompt_buckets: ascending padded prompt lengths, tokens; one compilation each.
    """

    max_new_tokens: int
    support: sampler.Support
    stop_ids: tuple[int, ...]
    pad_id: int
    prompt_buckets: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Completions:
    """N = P * G completions, the G of a prompt next to each other; arrays as in `structs.Rollouts`.

    Attributes:
        tokens: [N, Tc] int32.
        lengths: [N] int32, tokens, stop token included.
        log_probs: [N, Tc] float32 of the sampled tokens; 0 on padding.
        truncated: [N] bool, True where no stop token was drawn.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    log_probs: np.ndarray
    truncated: np.ndarray


def bucket_length(longest: int, buckets: Sequence[int]) -> int:
    """Returns the smallest bucket that holds a prompt of `longest` tokens.

    Raises:
        ValueError: no bucket is long enough.
    """
    for bucket in buckets:
        if longest <= bucket:
            return bucket
    raise ValueError(
        f"prompt of {longest} tokens is longer than the largest bucket of {max(buckets)}: shorten it or extend generation.prompt_buckets"
    )


def pad_prompts(prompts: Sequence[Sequence[int]], *, buckets: Sequence[int], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Pads token lists on the right to one bucket.

    Returns:
        (prompts [P, Tp] int32, lengths [P] int32).

    Raises:
        ValueError: a prompt is empty or longer than the largest bucket.
    """
    lengths = np.array([len(p) for p in prompts], np.int32)
    if lengths.min(initial=1) < 1:
        raise ValueError(f"prompt {int(lengths.argmin())} has 0 tokens, at least 1 is needed to predict a next one: leave the prompt out")
    padded = np.full((len(prompts), bucket_length(int(lengths.max(initial=1)), buckets)), pad_id, np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    return padded, lengths


def generate(
    model: Transformer,
    params: Any,
    prompts: np.ndarray,
    lengths: np.ndarray,
    key: chex.PRNGKey,
    *,
    completions_per_prompt: int,
    settings: GenerationSettings,
) -> Completions:
    """Samples completions. A pure function of its arguments: same key, same completions, to the bit.

    Args:
        model: the transformer.
        params: its parameters.
        prompts: [P, Tp] int32, padded on the right to a bucket.
        lengths: [P] int32, tokens.
        key: names the random stream; completion n draws from fold_in(key, n).
        completions_per_prompt: G.
        settings: what is generated.

    Returns:
        Completions on the host.

    Raises:
        FloatingPointError: a log-prob is not finite, so the parameters are not.
    """
    chex.assert_rank([prompts, lengths], [2, 1])
    out = _generate(model, params, prompts, lengths, key, completions_per_prompt, settings)
    tokens, log_probs, stops = jax.device_get(out)
    if (bad := np.flatnonzero(~np.isfinite(log_probs).all(axis=1))).size:
        raise FloatingPointError(f"log-probs of completion {bad[0]} are not finite: the weights are damaged, go back to a good checkpoint")
    truncated = stops < 0
    lengths = np.where(truncated, settings.max_new_tokens, stops + 1).astype(np.int32)
    return Completions(tokens=tokens, lengths=lengths, log_probs=log_probs, truncated=truncated)


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def _generate(model, params, prompts, lengths, key, completions_per_prompt, settings):
    """Returns (tokens [N, Tc], log-probs [N, Tc], index of the stop token [N] or -1)."""
    c, size = model.config, settings.max_new_tokens
    rows = prompts.shape[0] * completions_per_prompt
    prefix = transformer.prefill(model, params, prompts, lengths)
    first = jnp.repeat(transformer.last_tokens(prompts, lengths), completions_per_prompt)
    start = jnp.repeat(lengths - 1, completions_per_prompt)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows, dtype=jnp.uint32))
    empty = jnp.zeros((c.num_layers, rows, size, c.num_kv_heads, c.head_dim), model.dtype)
    columns = jnp.arange(size, dtype=jnp.int32)[None, :]

    def step(carry):
        t, token, stopped, cache, tokens, log_probs = carry
        context = (prefix, Segment(key_values=cache, mask=columns < t))
        hidden, new = transformer.forward(model, params, token[:, None], (start + t)[:, None], context)
        logits = transformer.logits(params, hidden)[:, 0, :]
        uniforms = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, t), dtype=logits.dtype))(keys)
        token, log_prob = sampler.sample(logits, uniforms, settings.support)
        running = stopped < 0
        token = jnp.where(running, token, settings.pad_id)
        log_prob = jnp.where(running, log_prob, 0.0)
        is_stop = functools.reduce(jnp.logical_or, [token == s for s in settings.stop_ids], jnp.zeros_like(running))
        stopped = jnp.where(running & is_stop, t, stopped)
        cache = jax.tree.map(lambda buffer, x: jax.lax.dynamic_update_slice_in_dim(buffer, x, t, axis=2), cache, new)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], t, axis=1)
        log_probs = jax.lax.dynamic_update_slice_in_dim(log_probs, log_prob.astype(jnp.float32)[:, None], t, axis=1)
        return t + 1, token, stopped, cache, tokens, log_probs

    def unfinished(carry):
        t, _, stopped, *_ = carry
        return (t < size) & jnp.any(stopped < 0)

    initial = (
        jnp.int32(0),
        first,
        jnp.full((rows,), -1, jnp.int32),
        KeyValues(keys=empty, values=empty),
        jnp.full((rows, size), settings.pad_id, jnp.int32),
        jnp.zeros((rows, size), jnp.float32),
    )
    _, _, stopped, _, tokens, log_probs = jax.lax.while_loop(unfinished, step, initial)
    return tokens, log_probs, stopped
