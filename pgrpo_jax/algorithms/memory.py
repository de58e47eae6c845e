"""Floor 0: how long a reward history remembers. P-GRPO's own (arXiv:2603.10009) is cumulative and never forgets.

    cumulative  every reward weighs the same for ever; the mean lags a rising reward by half the rise
    ema         weights halve after `length` rewards of the same preference group: a rare one forgets as slowly as it is seen
    discounted  weights halve after `length` updates, also of a preference group that is absent
    window      the last `length` batches in which the preference group had rewards, all alike; older ones are gone

Letters: K preference groups, W slots of a window, C reward components.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp

from pgrpo_jax.algorithms import reward_history
from pgrpo_jax.structs import RewardHistory

KINDS = ("cumulative", "ema", "window", "discounted")


@dataclasses.dataclass(frozen=True)
class Memory:
    """What a history remembers.

    Attributes:
        kind: one of KINDS.
        length: "ema": half-life, rewards; "discounted": half-life, updates; "window": batches, a whole number.

    Raises:
        ValueError: the kind is unknown or needs another length.
    """

    kind: str = "cumulative"
    length: float = 0.0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"memory is {self.kind!r}, must be one of {', '.join(KINDS)}: set algorithm.memory")
        if self.kind != "cumulative" and not self.length > 0:
            raise ValueError(f"memory {self.kind!r} has length {self.length}, must be above 0: set algorithm.memory_length")
        if self.kind == "window" and self.length != int(self.length):
            raise ValueError(f"memory 'window' has length {self.length}, must be a whole number of batches: round algorithm.memory_length")


def init(memory: Memory, num_preference_groups: int, dtype: jnp.dtype = jnp.float32, *, num_components: int | None = None) -> RewardHistory:
    """Returns the history of a run that has seen no reward.

    Args:
        memory: what is remembered.
        num_preference_groups: K, at least 1.
        dtype: of the rewards.
        num_components: C where the components of the reward are kept apart; None = one total.

    Returns:
        `RewardHistory` of leaves [K], [W, K] for a window, with [C] before them for components.
    """
    empty = reward_history.init(num_preference_groups, dtype)
    axes = (() if num_components is None else (num_components,)) + ((int(memory.length),) if memory.kind == "window" else ())
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (*axes, *x.shape)), empty)


def read(memory: Memory, history: RewardHistory) -> RewardHistory:
    """Returns the moments [K] that a history of one component stands for."""
    if memory.kind != "window":
        return history
    return reward_history.joined(jax.tree.map(lambda x: x[::-1], history))  # oldest first


def absorb(memory: Memory, history: RewardHistory, batch: RewardHistory) -> RewardHistory:
    """Returns a history of one component with the moments of a batch in it.

    Args:
        memory: what is remembered.
        history: of `init`.
        batch: moments with K rows, of one update; rows without rewards change nothing but what "discounted" forgets.
    """
    if memory.kind == "cumulative":
        return reward_history.merge(history, batch)
    if memory.kind == "window":
        shifted = jax.tree.map(lambda old, new: jnp.concatenate([new[None], old[:-1]]), history, batch)
        present = (batch.count > 0)[None, :]
        return jax.tree.map(lambda new, old: jnp.where(present, new, old), shifted, history)
    passed = reward_history.effective_count(batch) if memory.kind == "ema" else jnp.ones_like(batch.mean)
    return reward_history.merge(_faded(history, jnp.exp2(-passed / memory.length)), batch)


def _faded(history: RewardHistory, factor: chex.Array) -> RewardHistory:
    """Every reward weighs `factor` [K] of what it did; mean and deviation stay. An empty row stays as it is."""
    some = history.count > 0
    return history.replace(weight=jnp.where(some, history.weight * factor, history.weight), m2=history.m2 * factor)
