"""Floor 1: ragged completions laid next to each other, so that the learner computes few rows that are nearly full, and not one for each.

Only the passes through the model know of it (`generation.scoring`): what they find is spread out again, one row a completion, before the loss.
"""

import numpy as np

from pgrpo_jax.buckets import packed_rows

COMPLETIONS_IN_A_ROW = 2  # of the longest: two of any length fit, and short ones fill what long ones leave


def pack(lengths: np.ndarray, width: int) -> np.ndarray | None:
    """Lays the completions of each prompt into as few rows as it can: longest first, each into the first row that has room.

    A row answers one prompt, so that its tokens see that prompt as context; every prompt has equally many rows, so that micro-batches and
    devices split them evenly.

    Args:
        lengths: [P, G] int, tokens of each completion, at most `width`.
        width: Tc, tokens.

    Returns:
        `TrainBatch.packing`, [P, R, C] int32, C = `COMPLETIONS_IN_A_ROW` * Tc, R one of `buckets.packed_rows`; None where that saves nothing.
    """
    num_prompts, per_prompt = lengths.shape
    size, choices = COMPLETIONS_IN_A_ROW * width, packed_rows(-(-per_prompt // COMPLETIONS_IN_A_ROW))
    prompts, columns = np.arange(num_prompts), np.arange(size)[None, :]
    filled = np.zeros((num_prompts, choices[-1]), np.int64)
    packing = np.full((num_prompts, choices[-1], size), -1, np.int32)
    for completion in np.argsort(-lengths, axis=1, kind="stable").T:
        length = lengths[prompts, completion]
        row = np.argmax(filled + length[:, None] <= size, axis=1)
        time = columns - filled[prompts, row][:, None]
        own = (time >= 0) & (time < length[:, None])
        packing[prompts, row] = np.where(own, completion[:, None] * width + time, packing[prompts, row])
        filled[prompts, row] += length
    most = int((filled > 0).sum(axis=1).max())
    rows = next(count for count in choices if count >= most)
    return packing[:, :rows] if rows * size < per_prompt * width else None
