"""Units of work as an actor records them, from rewards alone: no model, one token a completion."""

import numpy as np

from pgrpo_jax.structs import Prompt, Rollouts, Work


def unit(index, users, rewards, rows, *, step=None, version=None, history_rows=None, lengths=None):
    """One unit: a prompt for each user, with as many completions as its list of rewards has.

    Args:
        index: of the unit; its step and version unless given.
        users: user ids, "" for nobody.
        rewards: a list of rewards for each prompt; may be empty.
        rows: preference id of each prompt.
        history_rows: rows of the history; None = the preference ids.
        lengths: tokens of each completion; None = 1.
    """
    named = history_rows or [None] * len(users)
    prompts = tuple(
        Prompt(f"{index}-{i}", f"question {index}-{i}", row, {}, user_id=user, history_id=named[i]) for i, (user, row) in enumerate(zip(users, rows))
    )
    flat = np.array([r for mine in rewards for r in mine], np.float32)
    n = len(flat)
    lengths = np.ones(n, np.int32) if lengths is None else np.array(lengths, np.int32)
    width = int(lengths.max(initial=1))
    step = index if step is None else step
    return Rollouts(
        work=Work(index, step, step if version is None else version), prompt_records=prompts, prompts=np.zeros((len(users), 2), np.int32),
        prompt_lengths=np.ones(len(users), np.int32), completions=np.zeros((n, width), np.int32), completion_lengths=lengths,
        prompt_index=np.repeat(np.arange(len(users), dtype=np.int32), [len(mine) for mine in rewards]),
        behaviour_log_probs=np.zeros((n, width), np.float32), truncated=np.zeros(n, bool),
        texts=tuple(f"answer {index}-{i}" for i in range(n)), rewards=flat,
        reward_components={"rating": flat, "answered": (flat > 0).astype(np.float32)},
    )  # fmt: skip
