"""The task `movielens`: a user shows films he liked and four candidates he has rated; the answer names the one he would like best.

The reward is his own rating of the film named, in fifths; an answer that names none or several of the candidates earns 0. So
one star is still better than no answer.

Who belongs to which preference group is one of RULES: by taste ("kmeans", see `preference_groups`), or as `movielens_users` finds it.
"""

import dataclasses
import json
import pathlib
from typing import Any, ClassVar, Mapping, Sequence

import numpy as np

from pgrpo_jax.structs import Prompt, Reward
from pgrpo_jax.tasks import assignments
from pgrpo_jax.tasks import streams
from pgrpo_jax.tasks import title_matching

MAX_STARS = 5
NAME = "movielens"
RULES = ("kmeans", "rating", "user", "column:gender", "column:age", "column:occupation")
# Under another rule than k-means K may be one row for each user; films that divide opinion are still found by no more tastes than these.
MAX_TASTES = 5


@dataclasses.dataclass(frozen=True)
class MovieLens:
    """The task over a built data set; see `pgrpo_jax.tasks.Task` for the methods.

    Attributes:
        num_preference_groups: K.
        preference_group_names: K descriptions such as "+Action +Sci-Fi -Drama".
        split_sizes: prompts in each split.
        streams: split -> random access to its endless stream of records.
        preference_ids: user -> preference group, where another rule than k-means assigns them; None: as the records say.
    """

    num_preference_groups: int
    preference_group_names: tuple[str, ...]
    split_sizes: Mapping[str, int]
    streams: Mapping[str, Any]
    preference_ids: Mapping[str, int] | None = None
    reward_components: ClassVar[tuple[str, ...]] = ("answered", "rating")

    def num_prompts(self, split: str) -> int:
        """Returns the number of different prompts of a split, "train" or "test"."""
        streams.check_split(split, self.split_sizes)
        return self.split_sizes[split]

    def prompts(self, split: str, batch_index: int, batch_size: int) -> tuple[Prompt, ...]:
        """Returns prompts `batch_index * batch_size` onwards of the split's endless stream.

        Args:
            split: "train" or "test".
            batch_index: at least 0.
            batch_size: at least 1.

        Raises:
            ValueError: an argument is outside its range, or the data set was built for more preference groups.
        """
        streams.check_split(split, self.split_sizes)
        return tuple(self._prompt(self.streams[split][i]) for i in streams.batch_range(batch_index, batch_size))

    def reward(self, prompt: Prompt, answer: str) -> Reward:
        """Judges an answer.

        Args:
            prompt: the prompt answered.
            answer: any text.

        Returns:
            total: stars / 5 of the one candidate named, else 0; components: "answered" (1.0 where exactly one candidate is
            named, else 0.0) and "rating" (the same as total).
        """
        index = self.choice(prompt, answer)
        rating = 0.0 if index is None else prompt.facts["ratings"][index] / MAX_STARS
        return Reward(total=rating, components={"answered": float(index is not None), "rating": rating})

    def choice(self, prompt: Prompt, answer: str) -> int | None:
        """Returns the index of the one candidate that an answer names, None where it names none or several.

        Args:
            prompt: the prompt answered.
            answer: any text.
        """
        names = [joined.split("|") for joined in prompt.facts["names"]]
        named = title_matching.named_candidates(answer, names, decoys=prompt.facts["decoys"])
        return next(iter(named)) if len(named) == 1 else None

    def baselines(self, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        """Returns what the answers without a policy earn.

        Args:
            prompts: P prompts.

        Returns:
            "random": [P] float64, the mean reward over the candidates; "popular": [P] float64, the reward of the candidate
            with the highest mean rating (a Bayesian average over training users' history parts).
        """
        random = [np.mean(prompt.facts["ratings"]) / MAX_STARS for prompt in prompts]
        popular = [prompt.facts["ratings"][prompt.facts["popular"]] / MAX_STARS for prompt in prompts]
        return {"random": np.array(random, np.float64), "popular": np.array(popular, np.float64)}

    def _prompt(self, record: Mapping[str, bytes]) -> Prompt:
        facts = json.loads(record["prompt"])
        built_for = facts.pop("preference_id")
        preference_id = built_for if self.preference_ids is None else self.preference_ids[facts["user"]]
        if not 0 <= preference_id < self.num_preference_groups:
            raise ValueError(
                f"prompt {facts['prompt_id']}: preference id {preference_id} is outside [0, {self.num_preference_groups}): "
                "delete the built data set beside task.data_dir so that it is built again"
            )
        user_id = assignments.pseudonym(NAME, facts["user"])
        return Prompt(facts.pop("prompt_id"), facts.pop("text"), preference_id, facts=facts, user_id=user_id)


def load(data_dir: str, *, seed: int, num_preference_groups: int, preference_groups: str = "") -> MovieLens:
    """Loads the task; the first call for a seed and K builds its data set in `tfds` beside `data_dir` (some seconds).

    The data set is built for k-means with K preference groups; another rule takes the one for min(K, MAX_TASTES) and assigns users anew.

    Args:
        data_dir: directory of `ml-100k.inter`, `ml-100k.item` and `ml-100k.user`.
        seed: of the run: held-out users, prompts and their order.
        num_preference_groups: K.
        preference_groups: one of RULES; "" is the first.

    Returns:
        The task.

    Raises:
        FileNotFoundError: a source file is missing.
        ValueError: a line is malformed, the seed, K or the rule is outside its range, or a split comes out empty.
    """
    rule = assignments.check_rule(preference_groups, task=NAME, offered=RULES)
    # TFDS, grain and scikit-learn take seconds to import: runs of other tasks do not pay for them.
    import grain
    import tensorflow_datasets as tfds

    from pgrpo_jax.tasks import movielens_dataset
    from pgrpo_jax.tasks import movielens_users

    cache_dir = str(pathlib.Path(data_dir).resolve().parent / "tfds")
    tastes = num_preference_groups if rule == "kmeans" else min(num_preference_groups, MAX_TASTES)
    built = movielens_dataset.prepared_dir(data_dir, cache_dir=cache_dir, seed=seed, num_preference_groups=tastes)
    builder = tfds.builder_from_directory(built)
    preference_ids, names = None, tuple(builder.info.metadata["preference_group_names"])
    if rule != "kmeans":
        preference_ids, names = movielens_users.assign(
            data_dir, seed=seed, num_preference_groups=num_preference_groups, rule=rule, task=NAME
        )
    train, test = (grain.MapDataset.source(builder.as_data_source(split=split)) for split in ("train", "test"))
    return MovieLens(
        num_preference_groups=num_preference_groups,
        preference_group_names=names,
        split_sizes={"train": len(train), "test": len(test)},
        streams={"train": train.seed(seed).shuffle().repeat(), "test": test.repeat()},
        preference_ids=preference_ids,
    )


def load_judge(data_dir: str, *, seed: int, num_preference_groups: int, preference_groups: str = "") -> MovieLens:
    """Makes the task without its prompts, at no cost: a prompt's facts hold all that `reward` needs.

    Args:
        data_dir: ignored.
        seed: ignored.
        num_preference_groups: K.
        preference_groups: one of RULES; "" is the first.

    Returns:
        The task; of its methods only `reward`, `choice` and `baselines` work.
    """
    del data_dir, seed
    assignments.check_rule(preference_groups, task=NAME, offered=RULES)
    return MovieLens(num_preference_groups=num_preference_groups, preference_group_names=(), split_sizes={}, streams={})
