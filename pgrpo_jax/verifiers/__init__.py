"""Floor 1: what an answer is worth, judged off the critical path: in processes that may hang or die without taking the run along.

`rewards` keeps the processes and decides what becomes of failures, `fork_server` is its hold on the one process that is forked
from, `reward_process` is what runs in there.
"""

from typing import Protocol, Sequence

from pgrpo_jax.structs import Prompt, Reward, RewardFailure


class Judge(Protocol):
    """What an actor asks of the thing that judges its answers: `pgrpo_jax.verifiers.rewards.RewardPool`."""

    def judge(
        self, prompts: Sequence[Prompt], answers: Sequence[str], failed: Sequence[RewardFailure] = ()
    ) -> tuple[list[Reward | None], tuple[RewardFailure, ...]]:
        """Returns the verdict on each answer, None where it is to be left out, and the failures among them."""
