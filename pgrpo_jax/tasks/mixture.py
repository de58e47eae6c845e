"""Mixtures: several tasks as one, in fixed proportions. `task.name` = "movielens:3 letters:1" asks three films to one set of letters.

Position p of the training stream belongs to one task, at one place of that task's own stream, and both are functions of p alone: the order
repeats every W = sum of the weights positions, so every W positions in a row, wherever they begin, hold each task exactly as often as its
weight says, and within them the tasks are spread evenly. So a mixture's progress is the position of the next prompt, which the training
state holds already; nothing else has to be saved. The test stream deals out all tasks' held-out prompts in the same way, with their
numbers for weights: each comes once before one comes again.

Each task keeps its own K preference groups: those of the first task come first. Prompts and components of rewards carry their task's name,
"movielens/…"; "answered" belongs to all. Users' pseudonyms differ between tasks as they are.
"""

import dataclasses
from fractions import Fraction
import functools
import itertools
from typing import Any, Mapping, Sequence

import numpy as np

from pgrpo_jax.structs import Prompt, Reward
from pgrpo_jax.tasks import JUDGES, RULES, TASKS, Task, assignments, streams

MAX_WEIGHT = 1000


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Several tasks as one; see `pgrpo_jax.tasks.Task` for the methods.

    Attributes:
        tasks: name -> task, in the order of their preference groups.
        weights: name -> prompts of the task among W = sum of the weights training prompts.
    """

    tasks: Mapping[str, Task]
    weights: Mapping[str, int]

    @property
    def parts(self) -> tuple[Task, ...]:
        """The tasks it is made of."""
        return tuple(self.tasks.values())

    @property
    def num_preference_groups(self) -> int:
        """K: the tasks' own added up."""
        return sum(task.num_preference_groups for task in self.tasks.values())

    @property
    def preference_group_names(self) -> tuple[str, ...]:
        """K descriptions such as "letters: likes aeimquy"."""
        return tuple(f"{name}: {described}" for name, task in self.tasks.items() for described in task.preference_group_names)

    @property
    def reward_components(self) -> tuple[str, ...]:
        """The names "answered" and, for the components of each task's rewards, "task/component"."""
        own = [f"{name}/{part}" for name, task in self.tasks.items() for part in task.reward_components if part != "answered"]
        return ("answered", *own)

    def num_prompts(self, split: str) -> int:
        """Returns the number of different prompts of a split, "train" or "test", over all tasks."""
        return sum(task.num_prompts(split) for task in self.tasks.values())

    def prompts(self, split: str, batch_index: int, batch_size: int) -> tuple[Prompt, ...]:
        """Returns prompts `batch_index * batch_size` onwards of the split's endless stream.

        Args:
            split: "train", mixed by weight, or "test", all held-out prompts of all tasks.
            batch_index: at least 0.
            batch_size: at least 1.

        Raises:
            ValueError: an argument is outside its range.
        """
        streams.check_split(split, ("train", "test"))
        names = tuple(self.tasks)
        counts = tuple(self.weights[name] if split == "train" else self.tasks[name].num_prompts(split) for name in names)
        found = [(names[task], place) for task, place in (locate(p, counts) for p in streams.batch_range(batch_index, batch_size))]
        return tuple(self._mixed(name, self.tasks[name].prompts(split, place, 1)[0]) for name, place in found)

    def own_prompts(self, name: str) -> tuple[Prompt, ...]:
        """Returns the different training prompts of one task, as the mixture names them."""
        task = self.tasks[name]
        return tuple(self._mixed(name, prompt) for prompt in task.prompts("train", 0, task.num_prompts("train")))

    def reward(self, prompt: Prompt, answer: str) -> Reward:
        """Judges an answer by its prompt's own task; the components of other tasks' rewards are 0."""
        name, own = self._own(prompt)
        reward = self.tasks[name].reward(own, answer)
        parts = {part if part == "answered" else f"{name}/{part}": value for part, value in reward.components.items()}
        return Reward(total=reward.total, components=dict.fromkeys(self.reward_components, 0.0) | parts)

    def choice(self, prompt: Prompt, answer: str) -> int | None:
        """Returns the index of the candidate that an answer names, as the prompt's own task sees it."""
        name, own = self._own(prompt)
        return self.tasks[name].choice(own, answer)

    def baselines(self, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        """Returns what the answers without a policy earn, each prompt by its own task: "random" and "popular", [P] float64."""
        merged = {kind: np.zeros(len(prompts), np.float64) for kind in ("random", "popular")}
        owned = [self._own(prompt) for prompt in prompts]
        for name, task in self.tasks.items():
            rows = [row for row, (owner, _) in enumerate(owned) if owner == name]
            for kind, values in task.baselines([owned[row][1] for row in rows]).items():
                merged[kind][rows] = values
        return merged

    def _first_ids(self) -> dict[str, int]:
        """name -> the mixture's number of the task's first preference group."""
        sizes = [task.num_preference_groups for task in self.tasks.values()]
        return dict(zip(self.tasks, itertools.accumulate(sizes, initial=0)))

    def _mixed(self, name: str, prompt: Prompt) -> Prompt:
        return _shifted(prompt, f"{name}/{prompt.prompt_id}", self._first_ids()[name])

    def _own(self, prompt: Prompt) -> tuple[str, Prompt]:
        """The name of a prompt's task, and the prompt as that task made it."""
        name, _, prompt_id = prompt.prompt_id.partition("/")
        if name not in self.tasks:
            known = ", ".join(self.tasks)
            raise ValueError(f"prompt {prompt.prompt_id!r} is of none of the tasks {known}: use prompts of the same mixture")
        return name, _shifted(prompt, prompt_id, -self._first_ids()[name])


def _shifted(prompt: Prompt, prompt_id: str, by: int) -> Prompt:
    """The prompt under another name, its preference group and its row of the history `by` rows further on."""
    history_id = None if prompt.history_id is None else prompt.history_id + by
    return dataclasses.replace(prompt, prompt_id=prompt_id, preference_id=prompt.preference_id + by, history_id=history_id)


def locate(position: int, counts: tuple[int, ...]) -> tuple[int, int]:
    """Returns which task a position of the mixed stream belongs to, and where it is in that task's own stream.

    Args:
        position: at least 0.
        counts: how often each task occurs in sum(counts) positions.

    Returns:
        (index of the task, position in its stream).
    """
    cycle, step = divmod(position, sum(counts))
    task, place = _cycle(counts)[step]
    return task, cycle * counts[task] + place


@functools.lru_cache
def _cycle(counts: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """One cycle as (task, how many of it came before): a task's i-th of n prompts falls at (i + 1/2) / n of the way, ties in order."""
    places = [(Fraction(2 * place + 1, 2 * count), task, place) for task, count in enumerate(counts) for place in range(count)]
    return tuple((task, place) for _, task, place in sorted(places))


def parse(name: str) -> dict[str, int]:
    """Reads `task.name`: one task ("letters") or a mixture ("movielens:3 letters:1").

    Returns:
        name -> weight, in the order given; the weight of a task alone is 1.

    Raises:
        ValueError: a task is unknown or named twice, a weight is missing or out of range, or a mixture has one task.
    """
    known = ", ".join(TASKS)
    if name in TASKS:
        return {name: 1}
    if not name.strip() or not set(name) & set(": \t\n"):
        raise ValueError(f"task.name = {name!r} is unknown: use one of {known}")
    weights: dict[str, int] = {}
    for part in name.split():
        task, _, weight = part.partition(":")
        if task not in TASKS:
            raise ValueError(f"task.name = {name!r} mixes the unknown task {task!r}: use {known}")
        if task in weights:
            raise ValueError(f"task.name = {name!r} names {task} twice: add its weights up")
        if not (weight.isascii() and weight.isdigit() and 1 <= int(weight) <= MAX_WEIGHT):
            raise ValueError(
                f"task.name = {name!r} gives {task} the weight {weight!r}, which is no whole number from 1 to {MAX_WEIGHT}: write {task}:1"
            )
        weights[task] = int(weight)
    if len(weights) == 1:
        raise ValueError(f"task.name = {name!r} mixes one task: write {next(iter(weights))}")
    return weights


def check_preference_groups(name: str, rule: str) -> None:
    """Refuses a rule that one of the tasks does not offer.

    Args:
        name: as `parse` reads it.
        rule: how users are assigned to preference groups, one rule for all tasks; "" leaves each task its own default.

    Raises:
        ValueError: the name can not be read, or a task does not offer the rule.
    """
    for task in parse(name):
        assignments.check_rule(rule, task=task, offered=RULES[task])


def load(name: str, data_dir: str, *, seed: int, num_preference_groups: int, preference_groups: str = "") -> Task:
    """Loads a task or a mixture.

    Args:
        name: as `parse` reads it.
        data_dir: directory of the source files of all its tasks.
        seed: of the run.
        num_preference_groups: K of each task.
        preference_groups: how users are assigned to them, a rule that each of the tasks offers (`tasks.RULES`); "" is a task's default.

    Raises:
        ValueError: the name, the seed, K or the rule is outside its range, or a task's data are.
        FileNotFoundError: a source file is missing.
    """
    options = {"seed": seed, "num_preference_groups": num_preference_groups, "preference_groups": preference_groups}
    return _load(TASKS, name, data_dir, options)


def load_judge(name: str, data_dir: str, *, seed: int, num_preference_groups: int, preference_groups: str = "") -> Task:
    """Loads only what `reward`, `choice` and `baselines` need of a task or a mixture; arguments as for `load`."""
    options = {"seed": seed, "num_preference_groups": num_preference_groups, "preference_groups": preference_groups}
    return _load(JUDGES, name, data_dir, options)


def _load(loaders: Mapping[str, Any], name: str, data_dir: str, options: Mapping[str, Any]) -> Task:
    weights = parse(name)
    check_preference_groups(name, options["preference_groups"])
    tasks = {task: loaders[task](data_dir, **options) for task in weights}
    return Mixture(tasks=tasks, weights=weights) if len(tasks) > 1 else tasks[name]


def parts(task: Task) -> tuple[Task, ...]:
    """Returns the tasks that a task names as its `parts` (a mixture, curated or not); of another task, itself."""
    return getattr(task, "parts", (task,))


def training_prompts(task: Task) -> list[tuple[int, tuple[Prompt, ...]]]:
    """Returns every different training prompt once, as the stream of `task` has it: (weight, prompts) for each task of a mixture.

    Args:
        task: a mixture, or a task whose first epoch of training prompts holds each once; the weight of a task alone is 1.
    """
    if not isinstance(task, Mixture):
        return [(1, task.prompts("train", 0, task.num_prompts("train")))]
    return [(task.weights[name], task.own_prompts(name)) for name in task.tasks]
