"""Floor 5: what is recorded of a step beside the learner's metrics, from its rollouts."""

from typing import Any, Sequence

import numpy as np

from pgrpo_jax.structs import Rollouts


def generation_metrics(rollouts: Sequence[Rollouts], *, num_preference_groups: int) -> dict[str, float]:
    """Returns the metrics that only the rollouts know.

    Args:
        rollouts: of one step.
        num_preference_groups: K.
    """
    secs = sum(r.generation_secs for r in rollouts)
    tokens = sum(int(r.completion_lengths.sum()) for r in rollouts)
    preference_ids = [np.array([r.prompt_records[i].preference_id for i in r.prompt_index], np.int32) for r in rollouts]
    by_preference = [_mean([r.truncated[ids == p] for r, ids in zip(rollouts, preference_ids)]) for p in range(num_preference_groups)]
    return {
        "answered": _mean([r.reward_components["answered"] for r in rollouts]),
        "truncated": _mean([r.truncated for r in rollouts]),
        "generation_secs": secs,
        "tokens_per_sec": tokens / secs if secs > 0 else float("nan"),
    } | {f"preference_group/{p}/truncated": share for p, share in enumerate(by_preference)}


def samples_of(rollouts: Sequence[Rollouts], advantages: np.ndarray, *, step: int) -> list[dict[str, Any]]:
    """Returns one record for each completion of a step, for samples.jsonl.

    Args:
        rollouts: of one step, in canonical order.
        advantages: [N], in the same order.
        step: updates done.
    """
    rows = [(r, i) for r in rollouts for i in range(len(r.texts))]
    return [
        {
            "step": step,
            "prompt_id": r.prompt_records[r.prompt_index[i]].prompt_id,
            "preference_id": r.prompt_records[r.prompt_index[i]].preference_id,
            "prompt": r.prompt_records[r.prompt_index[i]].text,
            "answer": r.texts[i],
            "reward": float(r.rewards[i]),
            "advantage": float(advantage),
            "truncated": bool(r.truncated[i]),
        }
        for (r, i), advantage in zip(rows, advantages, strict=True)
    ]


def _mean(parts: Sequence[np.ndarray]) -> float:
    """NaN where there is nothing: every completion of a step may have been dropped."""
    joined = np.concatenate(parts)
    return float(joined.mean()) if joined.size else float("nan")
