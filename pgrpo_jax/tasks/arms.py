"""Arms of an experiment: the same task with other rows of the reward history, to tell what preference groups do from what histories do.

    preference   every prompt's rewards go to the history of its preference group: P-GRPO as it is meant
    pooled       all go to one history (K = 1 without touching anything else): is it the history, or whose history it is?
    placebo      users keep their company's sizes but not their company: the training users' preference ids, permuted at random

Only `history_id` changes. Prompts, their order, rewards and `preference_id`, by which results are reported, are the same in all three.
"""

import dataclasses
from typing import Callable, Sequence

import numpy as np

from pgrpo_jax.structs import Prompt, Reward
from pgrpo_jax.tasks import Task, mixture
from pgrpo_jax.tasks.streams import check_seed, named_stream

ARMS = ("preference", "pooled", "placebo")


@dataclasses.dataclass(frozen=True)
class Arm:
    """A task whose prompts name another row of the history; see `pgrpo_jax.tasks.Task` for the methods, which are the task's own.

    Attributes:
        task: the task.
        row: prompt -> its `history_id`.
    """

    task: Task
    row: Callable[[Prompt], int]

    @property
    def num_preference_groups(self) -> int:
        """K of the task."""
        return self.task.num_preference_groups

    @property
    def preference_group_names(self) -> tuple[str, ...]:
        """The task's K descriptions."""
        return self.task.preference_group_names

    @property
    def reward_components(self) -> tuple[str, ...]:
        """The task's names."""
        return self.task.reward_components

    def num_prompts(self, split: str) -> int:
        """Returns the number of different prompts of a split, "train" or "test"."""
        return self.task.num_prompts(split)

    def prompts(self, split: str, batch_index: int, batch_size: int) -> tuple[Prompt, ...]:
        """Returns the task's prompts, each with its row of the history in this arm; arguments and errors are the task's."""
        found = self.task.prompts(split, batch_index, batch_size)
        return tuple(dataclasses.replace(prompt, history_id=self.row(prompt)) for prompt in found)

    def reward(self, prompt: Prompt, answer: str) -> Reward:
        """Judges an answer as the task does."""
        return self.task.reward(prompt, answer)

    def choice(self, prompt: Prompt, answer: str) -> int | None:
        """Returns the index of the candidate that an answer names, as the task sees it."""
        return self.task.choice(prompt, answer)

    def baselines(self, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        """Returns what answers without a policy earn: "random" and "popular", [P] float64."""
        return self.task.baselines(prompts)


def with_arm(task: Task, arm: str, seed: int) -> Task:
    """Returns a task in one arm of an experiment. Curate afterwards (`curated`), so that an arm does not depend on what is left out.

    Args:
        task: a task or a mixture; in a mixture each task is an experiment of its own: pooled is one history for each task, and a placebo
            permutes within a task.
        arm: one of ARMS.
        seed: of the run; it decides the placebo.

    Returns:
        The task itself in the arm "preference".

    Raises:
        ValueError: the arm is unknown, the seed outside its range, or a placebo meets a task that does not tell its users apart.
    """
    check_seed(seed)
    if arm not in ARMS:
        raise ValueError(f"arm = {arm!r} is unknown: use one of {', '.join(ARMS)}")
    if arm == "preference":
        return task
    if isinstance(task, mixture.Mixture):
        return dataclasses.replace(task, tasks={name: _in_arm(part, arm, seed, name) for name, part in task.tasks.items()})
    return _in_arm(task, arm, seed, "")


def _in_arm(task: Task, arm: str, seed: int, name: str) -> Arm:
    return Arm(task, _first if arm == "pooled" else Placebo.of(task, seed, name))


def _first(prompt: Prompt) -> int:
    del prompt
    return 0


@dataclasses.dataclass(frozen=True)
class Placebo:
    """The rows of the placebo arm: a function of the user alone.

    Attributes:
        seed: of the run.
        rows: user_id -> row, the training users in ascending order of their pseudonyms.
    """

    seed: int
    rows: dict[str, int]

    @classmethod
    def of(cls, task: Task, seed: int, name: str) -> "Placebo":
        """Permutes the preference ids of a task's training users.

        Args:
            task: the task.
            seed: of the run.
            name: of the task in its mixture; "" for a task alone.

        Raises:
            ValueError: a prompt has no user_id.
        """
        own: dict[str, int] = {}
        for prompt in task.prompts("train", 0, task.num_prompts("train")):
            own[_user(prompt)] = prompt.preference_id
        users = sorted(own)
        permuted = named_stream(seed, f"placebo {name}").permutation([own[user] for user in users])
        return cls(seed, dict(zip(users, permuted.tolist())))

    def __call__(self, prompt: Prompt) -> int:
        """Returns a training user's permuted row; for anyone else that of a training user drawn by his own stream: so the shares are the same."""
        user = _user(prompt)
        if user in self.rows:
            return self.rows[user]
        drawn = named_stream(self.seed, f"placebo of user {user}").integers(len(self.rows))
        return list(self.rows.values())[drawn]


def _user(prompt: Prompt) -> str:
    if not prompt.user_id:
        raise ValueError(f"prompt {prompt.prompt_id} has no user_id, and a placebo permutes users: use the arm preference or pooled")
    return prompt.user_id
