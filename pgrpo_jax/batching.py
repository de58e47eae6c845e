"""Rollouts → fixed-shape `TrainBatch`, and its slices for gradient accumulation."""

from typing import Sequence

import jax
import numpy as np

from pgrpo_jax.structs import Rollouts, TrainBatch


def check(rollouts: Sequence[Rollouts], *, num_preference_groups: int) -> None:
    """Refuses rollouts that must not reach the learner, before any device time is spent on them.

    Raises:
        ValueError: a reward is NaN or infinite, or a preference id is outside [0, K); names the prompt.
    """
    for r in rollouts:
        for prompt in r.prompt_records:
            if not 0 <= prompt.preference_id < num_preference_groups:
                raise ValueError(
                    f"prompt {prompt.prompt_id} has preference id {prompt.preference_id}, outside [0, {num_preference_groups}): "
                    "fix the task or set task.num_preference_groups"
                )
        for row in np.flatnonzero(~np.isfinite(r.rewards)):
            prompt = r.prompt_records[r.prompt_index[row]]
            raise ValueError(
                f"reward {r.rewards[row]} of prompt {prompt.prompt_id}, answer {r.texts[row]!r}, is not finite: "
                "rewards must be numbers; fix the task's reward"
            )


def to_train_batch(rollouts: Sequence[Rollouts], *, completions_per_prompt: int, pad_id: int) -> TrainBatch:
    """Joins rollouts into one batch with `completions_per_prompt` rows for every prompt, padded where there are fewer.

    Args:
        rollouts: in canonical order.
        completions_per_prompt: G, rows each prompt gets.
        pad_id: token id of padding.

    Returns:
        TrainBatch of NumPy arrays; row `p * G + g` answers prompt p.

    Raises:
        ValueError: a prompt has more than G completions.
    """
    width = max(r.prompts.shape[1] for r in rollouts)
    prompts = np.concatenate([np.pad(r.prompts, ((0, 0), (0, width - r.prompts.shape[1])), constant_values=pad_id) for r in rollouts])
    num_prompts, size = len(prompts), rollouts[0].completions.shape[1]
    rows = num_prompts * completions_per_prompt
    completions = np.full((rows, size), pad_id, np.int32)
    mask = np.zeros((rows, size), bool)
    log_probs = np.zeros((rows, size), np.float32)
    rewards = np.zeros((rows,), np.float32)
    valid = np.zeros((rows,), bool)
    filled = np.zeros((num_prompts,), np.int32)
    first = 0
    for r in rollouts:
        for source, prompt in enumerate(first + r.prompt_index):
            if filled[prompt] == completions_per_prompt:
                raise ValueError(f"prompt {prompt} of the batch has more than {completions_per_prompt} completions: raise completions_per_prompt")
            row = prompt * completions_per_prompt + filled[prompt]
            filled[prompt] += 1
            completions[row], log_probs[row] = r.completions[source], r.behaviour_log_probs[source]
            mask[row] = np.arange(size) < r.completion_lengths[source]
            rewards[row], valid[row] = r.rewards[source], True
        first += len(r.prompts)
    return TrainBatch(
        prompts=prompts,
        prompt_lengths=np.concatenate([r.prompt_lengths for r in rollouts]),
        preference_ids=np.array([p.preference_id for r in rollouts for p in r.prompt_records], np.int32),
        completions=completions,
        completion_mask=mask,
        prompt_index=np.repeat(np.arange(num_prompts, dtype=np.int32), completions_per_prompt),
        behaviour_log_probs=log_probs,
        rewards=rewards,
        valid=valid,
    )


def micro_batches(batch: TrainBatch, count: int) -> TrainBatch:
    """Cuts a batch into slices of whole prompts.

    Args:
        batch: of `to_train_batch`: the rows of a prompt lie together, equally many for each.
        count: slices; divides P.

    Returns:
        TrainBatch with a leading axis [count]; `prompt_index` counts within its slice.

    Raises:
        ValueError: P is not divisible by count.
    """
    num_prompts = batch.prompts.shape[0]
    if num_prompts % count:
        raise ValueError(f"{num_prompts} prompts do not divide into {count} micro-batches: set learner.micro_batches to a divisor")
    sliced = jax.tree.map(lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), batch)
    offsets = (np.arange(count, dtype=np.int32) * (num_prompts // count))[:, None]
    return sliced.replace(prompt_index=sliced.prompt_index - offsets)
