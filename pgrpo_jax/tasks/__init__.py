"""Tasks: where prompts come from, and what an answer is worth.

`TASKS[name](data_dir, seed=…, num_preference_groups=…, preference_groups=…)` loads one. `JUDGES[name]`, called alike, loads only what
`reward` needs: reward processes hold no prompts. `RULES[name]` are the rules by which the task can assign users to preference groups, its
default first.
"""

from typing import Callable, Mapping, Protocol, Sequence

import numpy as np

from pgrpo_jax.structs import Prompt, Reward
from pgrpo_jax.tasks import letters
from pgrpo_jax.tasks import movielens


class Task(Protocol):
    """What the loop asks of a task. Everything here is deterministic: same arguments, same answer, in any process.

    Attributes:
        num_preference_groups: K.
        preference_group_names: K short descriptions for people.
        reward_components: names of the components of every reward, "answered" among them.
    """

    num_preference_groups: int
    preference_group_names: tuple[str, ...]
    reward_components: tuple[str, ...]

    def num_prompts(self, split: str) -> int:
        """Returns the number of different prompts of a split, "train" or "test"."""

    def prompts(self, split: str, batch_index: int, batch_size: int) -> tuple[Prompt, ...]:
        """Returns prompts `batch_index * batch_size` onwards of an endless stream, by random access.

        Args:
            split: "train": all prompts, shuffled anew in each epoch; "test": one prompt for each test user, in a fixed order,
                from the start again when they are used up.
            batch_index: at least 0.
            batch_size: at least 1.

        Raises:
            ValueError: an argument is outside its range.
        """

    def reward(self, prompt: Prompt, answer: str) -> Reward:
        """Judges an answer; `components` holds "answered" (1.0 or 0.0) and what else explains the total."""

    def choice(self, prompt: Prompt, answer: str) -> int | None:
        """Returns the index of the one candidate that the answer names; None where it names none or several, or none were given."""

    def baselines(self, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        """Returns what answers without a policy earn: {"random": [P] float64, expected, "popular": [P] float64}."""


TASKS: Mapping[str, Callable[..., Task]] = {"movielens": movielens.load, "letters": letters.load}
JUDGES: Mapping[str, Callable[..., Task]] = {"movielens": movielens.load_judge, "letters": letters.load}
RULES: Mapping[str, tuple[str, ...]] = {"movielens": movielens.RULES, "letters": letters.RULES}
