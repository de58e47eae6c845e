"""The task `letters`: a toy with conflicting preferences for smoke tests and learning tests; it needs no files and no words.

A user shows three letters he likes; the answer is any text, and earns by the share of its characters that he likes. The printable
ASCII characters "!" to "~" fall into max(K, 4) classes, (code - 97) mod max(K, 4), so that "a" is in class 0, and preference
group p likes class p: what one likes, no other does. A class is about a quarter of all printable characters (where K <= 4), not a
handful of letters, because an untrained model with byte tokens hits a given letter once in 256 tokens and there would be no
reward to learn from: uniformly random bytes earn a share of 0.09 (23 or 24 of 256), random printable characters one of 0.25.

Rewards are distributed differently in each preference group, as P-GRPO expects of people: preference group p earns
    offset_p + scale_p * share,   scale_p = 1 / (1 + p),   offset_p = (1 - scale_p) / 2,
so the later ones move within a narrow band around 1/2; an empty answer earns 0 everywhere. Sizes differ as well: of about 512
training and 128 test users preference group p has the share (K - p) / (1 + 2 + ... + K), and at least one user.

All this is the rule "persona", under which preference group and persona (what a user likes, and how his rewards are distributed) are one.
Under the rule "user" there are min(K, 4) personas, and a user's preference group is the row that his pseudonym hashes to
(`assignments.by_user`): a policy that is shown what he likes is trained against a history that knows him, or few others, by name.
"""

import dataclasses
import string
from typing import ClassVar, Mapping, Sequence

import numpy as np

from pgrpo_jax.structs import Prompt, Reward
from pgrpo_jax.tasks import assignments
from pgrpo_jax.tasks import streams

NAME = "letters"
RULES = ("persona", "user")
NUM_USERS = {"train": 512, "test": 128}
PROMPTS_PER_USER = {"train": 4, "test": 1}
LETTERS_SHOWN = 3
MIN_CLASSES = 4
PRINTABLE = "".join(chr(code) for code in range(33, 127))


@dataclasses.dataclass(frozen=True)
class Letters:
    """The toy task; see `pgrpo_jax.tasks.Task` for the methods.

    Attributes:
        num_preference_groups: K.
        preference_group_names: K descriptions such as "likes aeimquy".
        seed: of the run.
        split_prompts: the different prompts of each split.
        num_personas: users of how many tastes there are; K under the rule "persona".
    """

    num_preference_groups: int
    preference_group_names: tuple[str, ...]
    seed: int
    split_prompts: Mapping[str, tuple[Prompt, ...]]
    num_personas: int
    reward_components: ClassVar[tuple[str, ...]] = ("answered", "share")

    def num_prompts(self, split: str) -> int:
        """Returns the number of different prompts of a split, "train" or "test"."""
        streams.check_split(split, self.split_prompts)
        return len(self.split_prompts[split])

    def prompts(self, split: str, batch_index: int, batch_size: int) -> tuple[Prompt, ...]:
        """Returns prompts `batch_index * batch_size` onwards of the split's endless stream.

        Args:
            split: "train", shuffled anew in each epoch, or "test", in user order.
            batch_index: at least 0.
            batch_size: at least 1.

        Raises:
            ValueError: an argument is outside its range.
        """
        size = self.num_prompts(split)
        chosen = []
        for position in streams.batch_range(batch_index, batch_size):
            epoch, place = divmod(position, size)
            if split == "train":
                place = streams.named_stream(self.seed, f"letters, epoch {epoch}").permutation(size)[place]
            chosen.append(self.split_prompts[split][place])
        return tuple(chosen)

    def reward(self, prompt: Prompt, answer: str) -> Reward:
        """Judges an answer.

        Args:
            prompt: the prompt answered.
            answer: any text; white space is ignored, every other character counts.

        Returns:
            total: offset + scale * share of the user's persona, 0 for an empty answer; components: "answered"
            (1.0 unless the answer is empty) and "share" (of the characters that the user likes).
        """
        characters = "".join(answer.split())
        if not characters:
            return Reward(total=0.0, components={"answered": 0.0, "share": 0.0})
        persona = persona_of(prompt, num_personas=self.num_personas)
        favourites = favourite_characters(persona, num_preference_groups=self.num_personas)
        share = sum(character in favourites for character in characters) / len(characters)
        return Reward(total=_total(persona, share), components={"answered": 1.0, "share": share})

    def choice(self, prompt: Prompt, answer: str) -> None:
        """Returns None: the prompt lists no candidates."""
        del prompt, answer

    def baselines(self, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        """Returns what the answers without a policy earn.

        Args:
            prompts: P prompts.

        Returns:
            "random": [P] float64, expected reward of uniformly random printable characters; "popular": [P] float64, reward of
            an answer made of the letters that the commonest persona likes.
        """
        favourites = [favourite_characters(p, num_preference_groups=self.num_personas) for p in range(self.num_personas)]
        personas = [persona_of(prompt, num_personas=self.num_personas) for prompt in prompts]
        random = [_total(persona, len(favourites[persona]) / len(PRINTABLE)) for persona in personas]
        popular = [self.reward(prompt, "".join(sorted(favourites[0]))).total for prompt in prompts]
        return {"random": np.array(random, np.float64), "popular": np.array(popular, np.float64)}


def load(data_dir: str, *, seed: int, num_preference_groups: int, preference_groups: str = "") -> Letters:
    """Makes the task.

    Args:
        data_dir: ignored; the task needs no files.
        seed: of the run: users, prompts and their order.
        num_preference_groups: K, in [1, 26]; under the rule "user" at least 1.
        preference_groups: one of RULES; "" is the first.

    Returns:
        The task.

    Raises:
        ValueError: the seed, K or the rule is outside its range.
    """
    del data_dir
    streams.check_seed(seed)
    rule = assignments.check_rule(preference_groups, task=NAME, offered=RULES)
    num_personas = min(num_preference_groups, MIN_CLASSES) if rule == "user" else num_preference_groups
    if not 1 <= num_personas <= len(string.ascii_lowercase):
        raise ValueError(
            f"num_preference_groups is {num_preference_groups}, outside [1, {len(string.ascii_lowercase)}] (one letter each at least): "
            "set task.num_preference_groups within it"
        )
    personas = {split: _personas(split, seed, num_personas) for split in NUM_USERS}
    first_user = {"train": 0, "test": len(personas["train"])}
    user_ids = [assignments.pseudonym(NAME, str(user)) for user in range(sum(map(len, personas.values())))]
    if rule == "user":
        preference_ids, names = assignments.by_user(user_ids, num_preference_groups)
    else:
        preference_ids = np.concatenate([personas["train"], personas["test"]])
        names = tuple("likes " + _liked_letters(p, num_personas) for p in range(num_personas))
    return Letters(
        num_preference_groups=num_preference_groups,
        preference_group_names=names,
        seed=seed,
        split_prompts={
            split: tuple(
                _prompt(split, user, number, int(persona), seed, num_personas, preference_id=int(preference_ids[user]), user_id=user_ids[user])
                for user, persona in enumerate(personas[split], start=first_user[split])
                for number in range(PROMPTS_PER_USER[split])
            )
            for split in NUM_USERS
        },
        num_personas=num_personas,
    )


def persona_of(prompt: Prompt, *, num_personas: int) -> int:
    """Returns what persona a prompt's user is: that of the letters shown, which is his preference group only under the rule "persona".

    Args:
        prompt: of this task.
        num_personas: users of how many tastes there are.
    """
    return (ord(prompt.facts["shown"][0]) - ord("a")) % max(num_personas, MIN_CLASSES)


def favourite_characters(preference_id: int, *, num_preference_groups: int) -> frozenset[str]:
    """Returns the printable ASCII characters that a preference group likes.

    Args:
        preference_id: in [0, K).
        num_preference_groups: K.

    Raises:
        ValueError: the preference id is outside its range.
    """
    if not 0 <= preference_id < num_preference_groups:
        raise ValueError(f"preference id is {preference_id}, outside [0, {num_preference_groups}): use prompts of a task with the same K")
    num_classes = max(num_preference_groups, MIN_CLASSES)
    return frozenset(character for character in PRINTABLE if (ord(character) - ord("a")) % num_classes == preference_id)


def _total(preference_id: int, share: float) -> float:
    scale = 1.0 / (1 + preference_id)
    return (1.0 - scale) / 2.0 + scale * share


def _personas(split: str, seed: int, num_personas: int) -> np.ndarray:
    """Each user's persona, [users] int; sizes are exact, and the order carries no signal."""
    shares = np.arange(num_personas, 0, -1) / sum(range(1, num_personas + 1))
    sizes = np.maximum(1, np.round(shares * NUM_USERS[split])).astype(int)
    return streams.named_stream(seed, f"letters, {split} users").permutation(np.repeat(np.arange(num_personas), sizes))


def _liked_letters(preference_id: int, num_preference_groups: int) -> str:
    return "".join(sorted(favourite_characters(preference_id, num_preference_groups=num_preference_groups) & set(string.ascii_lowercase)))


def _prompt(
    split: str, user: int, number: int, persona: int, seed: int, num_personas: int, *, preference_id: int, user_id: str
) -> Prompt:
    stream = streams.named_stream(seed, f"letters, prompt {number} of user {user}")
    shown = stream.choice(list(_liked_letters(persona, num_personas)), size=LETTERS_SHOWN).tolist()
    return Prompt(
        prompt_id=f"{split}-{user}-{number}",
        text=f"user {user} likes: {' '.join(shown)}",
        preference_id=preference_id,
        facts={"user": user, "shown": shown},
        user_id=user_id,
    )
