"""Floor 0: how much each token of a batch weighs in the objective: the part Agg of J (RLAX, arXiv:2512.06392, §4).

    J = Σ weights·(…) / count

Weights and count are sums over the rows given, so micro-batches of whole prompts add up to exactly the whole batch, and nothing
depends on how the prompts lie in it. An empty completion weighs nothing and still counts as a completion: it was sampled, and
dropping it would let the others push harder.

Letters: N completions, T tokens of a padded completion, P prompts, G completions of a prompt, L_max the longest completion allowed.
"""

from typing import Callable

import chex
import jax.numpy as jnp

from pgrpo_jax.algorithms.reward_history import rows, segment_sum

Weights = tuple[chex.Array, chex.Array]


def _over_completions(per_token: chex.Array, counted: chex.Array, valid: chex.Array, dtype: jnp.dtype) -> Weights:
    return jnp.where(counted, per_token, 0).astype(dtype), jnp.sum(valid, dtype=dtype)


def _completion(counted, valid, prompt_index, num_prompts, max_length, dtype) -> Weights:
    lengths = jnp.sum(counted, axis=1, dtype=dtype)
    return _over_completions(jnp.broadcast_to((1 / jnp.maximum(lengths, 1))[:, None], counted.shape), counted, valid, dtype)


def _prompt_tokens(counted, valid, prompt_index, num_prompts, max_length, dtype) -> Weights:
    lengths = jnp.sum(counted, axis=1, dtype=dtype)
    share = 1 / jnp.maximum(segment_sum(lengths, prompt_index, valid, num_prompts), 1)
    present = segment_sum(valid.astype(dtype), prompt_index, valid, num_prompts) > 0
    per_token = jnp.broadcast_to(rows(share, prompt_index, valid)[:, None], counted.shape)
    return jnp.where(counted, per_token, 0), jnp.sum(present, dtype=dtype)


def _batch_tokens(counted, valid, prompt_index, num_prompts, max_length, dtype) -> Weights:
    return counted.astype(dtype), jnp.sum(counted, dtype=dtype)


def _max_length(counted, valid, prompt_index, num_prompts, max_length, dtype) -> Weights:
    if max_length < 1:
        raise ValueError(f"max_length = {max_length} is below 1, and aggregation 'max_length' divides by it: set objective.max_length")
    return _over_completions(jnp.asarray(1 / max_length, dtype), counted, valid, dtype)


def _sum(counted, valid, prompt_index, num_prompts, max_length, dtype) -> Weights:
    return _over_completions(jnp.asarray(1, dtype), counted, valid, dtype)


# Name → (counted [N, T], valid [N], prompt_index [N], P, L_max, dtype) → (weights [N, T], count).
AGGREGATIONS: dict[str, Callable[..., Weights]] = {
    "completion": _completion,  # 1/(G·len): every completion weighs the same (GRPO, arXiv:2402.03300, eq. 3)
    "prompt_tokens": _prompt_tokens,  # 1/Σlen of the prompt, mean over prompts (DAPO, arXiv:2503.14476, eq. 8; CISPO, 2506.13585, eq. 4)
    "batch_tokens": _batch_tokens,  # 1/Σlen of the batch: every token weighs the same (what DAPO's code does)
    "max_length": _max_length,  # 1/(G·L_max): a constant (Dr. GRPO, arXiv:2503.20783, §3.2)
    "sum": _sum,  # 1/G: the log-prob of a completion is the sum over its tokens (REINFORCE, RLOO)
}


def token_weights(
    aggregation: str, mask: chex.Array, valid: chex.Array, prompt_index: chex.Array,
    *, num_prompts: int, max_length: int = 0, dtype: jnp.dtype = jnp.float32,
) -> Weights:
    """Returns the weight of every token, and what the weighted sum is divided by at the end.

    Args:
        aggregation: key of `AGGREGATIONS`.
        mask: [N, T] bool, True on sampled tokens.
        valid: [N] bool, False on rows that only pad the batch.
        prompt_index: [N] int, the prompt of each completion, in [0, P); read by "prompt_tokens" alone, where a wrong one gives NaN.
        num_prompts: P. The completions of a prompt must all be here, hence micro-batches of whole prompts.
        max_length: L_max, tokens; read by "max_length" alone.
        dtype: floating dtype of the results.

    Returns:
        ([N, T] weights, 0 on tokens that do not count; scalar count: valid completions; for "prompt_tokens" the prompts with a
        valid completion; for "batch_tokens" the tokens that count).

    Raises:
        ValueError: unknown aggregation, or "max_length" without a length.
    """
    chex.assert_rank([mask, valid, prompt_index], [2, 1, 1])
    chex.assert_equal_shape_prefix([mask, valid, prompt_index], 1)
    chex.assert_type([mask, valid, prompt_index], [bool, bool, int])
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation is {aggregation!r}, must be one of {', '.join(AGGREGATIONS)}: set objective.aggregation")
    return AGGREGATIONS[aggregation](mask & valid[:, None], valid, prompt_index, num_prompts, max_length, dtype)
