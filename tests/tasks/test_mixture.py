"""Mixtures: exact proportions in every window, every prompt in its turn, whatever the size of a batch; and each task judges its own."""

import collections
import dataclasses
import math

import numpy as np
import pytest
import small_config
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pgrpo_jax import assembly, settings
from pgrpo_jax.structs import Prompt, Reward
from pgrpo_jax.tasks import letters, mixture
from pgrpo_jax.tasks.mixture import Mixture, locate

weights_of_tasks = st.lists(st.integers(1, 9), min_size=2, max_size=4).map(tuple)


def brute_force(counts, length):
    """The stream by its definition, from its beginning: sort each cycle's prompts by where they ideally fall, one cycle after the other."""
    stream, taken = [], [0] * len(counts)
    while len(stream) < length:
        ideal = sorted(((2 * i + 1) * math.prod(counts) // n, task) for task, n in enumerate(counts) for i in range(n))
        for _, task in ideal:
            stream.append((task, taken[task]))
            taken[task] += 1
    return stream[:length]


@given(weights_of_tasks)
@hypothesis_settings(max_examples=60, deadline=None)
def test_positions_follow_the_definition(counts):
    assert [locate(p, counts) for p in range(3 * sum(counts))] == brute_force(counts, 3 * sum(counts))


@given(weights_of_tasks, st.integers(0, 10**12))
@hypothesis_settings(max_examples=60, deadline=None)
def test_every_window_is_exact_and_every_task_goes_on_without_a_gap(counts, start):
    window = [locate(p, counts) for p in range(start, start + sum(counts))]
    for task, count in enumerate(counts):
        places = [place for owner, place in window if owner == task]
        assert places == list(range(places[0], places[0] + count))


@given(weights_of_tasks)
@hypothesis_settings(max_examples=60, deadline=None)
def test_prefixes_are_spread_evenly(counts):
    """After any number of prompts a task is less than one prompt and the number of tasks away from its share."""
    seen = collections.Counter()
    for p in range(2 * sum(counts)):
        seen[locate(p, counts)[0]] += 1
        for task, count in enumerate(counts):
            assert abs(seen[task] - (p + 1) * count / sum(counts)) < len(counts)
    assert seen == {task: 2 * count for task, count in enumerate(counts)}


def test_a_known_order():
    assert [locate(p, (3, 1))[0] for p in range(8)] == [0, 0, 1, 0] * 2
    assert [locate(p, (1, 1))[0] for p in range(4)] == [0, 1, 0, 1]
    assert [locate(p, (2, 0, 1))[0] for p in range(3)] == [0, 2, 0]  # a task without prompts has no turn


@dataclasses.dataclass(frozen=True)
class Numbers:
    """A task whose prompts say which they are: a stream that counts, three test prompts, two preference groups."""

    name: str
    tests: int = 3
    num_preference_groups: int = 2
    preference_group_names: tuple[str, ...] = ("low", "high")
    reward_components: tuple[str, ...] = ("answered", "length")

    def num_prompts(self, split):
        return {"train": 10, "test": self.tests}[split]

    def prompts(self, split, batch_index, batch_size):
        size = self.num_prompts(split)
        found = range(batch_index * batch_size, (batch_index + 1) * batch_size)
        return tuple(Prompt(f"{split}-{i % size}", f"{self.name} {i}", i % 2, {"place": i}) for i in found)

    def reward(self, prompt, answer):
        assert prompt == self.prompts(prompt.prompt_id.split("-")[0], prompt.facts["place"], 1)[0]  # as this task made it
        return Reward(total=float(len(answer) + prompt.preference_id), components={"length": float(len(answer)), "answered": 1.0})

    def choice(self, prompt, answer):
        return None if self.name == "plain" else prompt.preference_id

    def baselines(self, prompts):
        places = np.array([prompt.facts["place"] for prompt in prompts], np.float64)
        return {"random": places / 10, "popular": places + (0 if self.name == "plain" else 100)}


OTHER = Numbers("other", tests=5, num_preference_groups=3)
MIXED = Mixture(tasks={"plain": Numbers("plain"), "other": OTHER}, weights={"plain": 2, "other": 3})


def test_prompts_carry_their_task():
    assert MIXED.num_preference_groups == 5
    assert MIXED.preference_group_names == ("plain: low", "plain: high", "other: low", "other: high")
    assert (MIXED.num_prompts("train"), MIXED.num_prompts("test")) == (20, 8)
    assert MIXED.reward_components == ("answered", "plain/length", "other/length")
    found = MIXED.prompts("train", 0, 10)
    assert [p.text for p in found] == [f"{('plain', 'other')[task]} {place}" for task, place in brute_force((2, 3), 10)]
    assert [p.prompt_id for p in found if p.text.startswith("plain")] == [f"plain/train-{i}" for i in range(4)]
    assert [p.preference_id for p in found if p.text.startswith("plain")] == [0, 1, 0, 1]
    assert [p.preference_id for p in found if p.text.startswith("other")] == [2, 3, 2, 3, 2, 3]


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("size", [1, 2, 4, 7, 40])
def test_the_stream_does_not_depend_on_the_size_of_a_batch(split, size):
    whole = MIXED.prompts(split, 0, 280)
    assert sum((MIXED.prompts(split, index, size) for index in range(280 // size)), ()) == whole


def test_held_out_prompts_come_once_each_interleaved_and_then_again():
    found = MIXED.prompts("test", 0, 16)
    assert sorted(p.prompt_id for p in found[:8]) == sorted([f"plain/test-{i}" for i in range(3)] + [f"other/test-{i}" for i in range(5)])
    assert [p.prompt_id for p in found[8:]] == [p.prompt_id for p in found[:8]]
    assert {p.prompt_id.split("/")[0] for p in found[:3]} == {"plain", "other"}


def test_every_answer_is_judged_by_its_own_task():
    found = MIXED.prompts("train", 3, 5)
    for prompt in found:
        name, reward = prompt.prompt_id.split("/")[0], MIXED.reward(prompt, "abc")
        own = prompt.preference_id - (0 if name == "plain" else 2)
        other = "other" if name == "plain" else "plain"
        assert reward.total == 3 + own
        assert reward.components == {"answered": 1.0, f"{name}/length": 3.0, f"{other}/length": 0.0}
        assert list(reward.components) == list(MIXED.reward_components)
        assert MIXED.choice(prompt, "abc") == (None if name == "plain" else own)
    baselines = MIXED.baselines(found)
    assert {name: values.dtype for name, values in baselines.items()} == {"random": np.float64, "popular": np.float64}
    np.testing.assert_array_equal(baselines["random"], [p.facts["place"] / 10 for p in found])
    np.testing.assert_array_equal(baselines["popular"], [p.facts["place"] + 100 * p.text.startswith("other") for p in found])
    only = [p for p in found if p.text.startswith("other")]
    np.testing.assert_array_equal(MIXED.baselines(only)["popular"], [p.facts["place"] + 100 for p in only])


def test_what_is_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"^prompt 'letters/7' is of none of the tasks plain, other: "):
        MIXED.reward(Prompt("letters/7", "", 0, {}), "")
    with pytest.raises(ValueError, match="split is 'dev', none of"):
        MIXED.prompts("dev", 0, 1)
    for index, size in ((-1, 1), (0, 0)):
        with pytest.raises(ValueError, match="ask within the bounds"):
            MIXED.prompts("train", index, size)


def test_names_are_read_in_their_order():
    assert mixture.parse("letters") == {"letters": 1}
    assert list(mixture.parse(" letters:4   movielens:1 ").items()) == [("letters", 4), ("movielens", 1)]


@pytest.mark.parametrize(
    "name, message",
    [
        ("chess", "task.name = 'chess' is unknown: use one of movielens, letters"),
        ("", "task.name = '' is unknown: use one of movielens, letters"),
        (" ", "task.name = ' ' is unknown: use one of movielens, letters"),
        ("movielens:3 chess:1", "task.name = 'movielens:3 chess:1' mixes the unknown task 'chess': use movielens, letters"),
        ("letters:1 letters:2", "task.name = 'letters:1 letters:2' names letters twice: add its weights up"),
        ("letters:1", "task.name = 'letters:1' mixes one task: write letters"),
        *[
            (f"movielens:3 letters{given}", f"task.name = 'movielens:3 letters{given}' gives letters the weight {given[1:]!r}, "
             "which is no whole number from 1 to 1000: write letters:1")
            for given in ("", ":", ":0", ":-1", ":1.5", ":1001", ":x", ":²", ":1:2")
        ],
    ],
)  # fmt: skip
def test_a_name_that_can_not_be_read_says_why(name, message):
    with pytest.raises(ValueError) as raised:
        mixture.parse(name)
    assert str(raised.value) == message
    with pytest.raises(settings.ConfigError) as refused:
        settings.check(small_config.config(task__name=name))
    assert str(refused.value) == message


def test_one_task_stays_itself():
    assert mixture.load("letters", "", seed=4, num_preference_groups=3) == letters.load("", seed=4, num_preference_groups=3)
    assert mixture.parts(letters.load("", seed=4, num_preference_groups=3)) == (letters.load("", seed=4, num_preference_groups=3),)


def test_the_real_tasks_mix(synthetic_dir):
    task = mixture.load("movielens:3 letters:1", synthetic_dir, seed=3, num_preference_groups=2)
    films, toy = mixture.parts(task)
    assert task.num_preference_groups == len(task.preference_group_names) == 4
    found = task.prompts("train", 5, 16)
    assert [p.prompt_id.split("/")[0] for p in found] == ["movielens", "movielens", "letters", "movielens"] * 4
    assert [p.text for p in found if p.prompt_id.startswith("movielens")] == [p.text for p in films.prompts("train", 5, 12)]
    assert [p.text for p in found if p.prompt_id.startswith("letters")] == [p.text for p in toy.prompts("train", 5, 4)]
    held_out = task.prompts("test", 0, task.num_prompts("test"))
    assert len({p.prompt_id for p in held_out}) == task.num_prompts("test") == films.num_prompts("test") + toy.num_prompts("test")
    judge = mixture.load_judge("movielens:3 letters:1", synthetic_dir, seed=3, num_preference_groups=2)
    for prompt in found:
        answer = prompt.facts["names"][0].split("|")[0] if "names" in prompt.facts else "aaaa"
        assert judge.reward(prompt, answer) == task.reward(prompt, answer)
        assert judge.reward(prompt, answer).components["answered"] == 1.0
        assert tuple(judge.reward(prompt, answer).components) == judge.reward_components == task.reward_components
    shifted = [2 + p.preference_id for p in toy.prompts("train", 5, 4)]
    assert [p.preference_id for p in found if p.prompt_id.startswith("letters")] == shifted
    assert set(task.baselines(found)) == {"random", "popular"} and (task.baselines(found)["random"] > 0).all()


def test_a_row_of_the_history_moves_with_its_task_and_back():
    class Pooled(Numbers):
        def prompts(self, split, batch_index, batch_size):
            return tuple(dataclasses.replace(p, history_id=1, user_id=self.name) for p in Numbers.prompts(self, split, batch_index, batch_size))

    mixed = Mixture(tasks={"plain": Pooled("plain"), "other": Pooled("other")}, weights={"plain": 1, "other": 1})
    found = mixed.prompts("train", 0, 4)
    assert [p.history_row for p in found] == [1, 3, 1, 3] and [p.user_id for p in found] == ["plain", "other"] * 2
    assert [mixed.reward(p, "abc").total for p in found] == [3, 3, 4, 4]  # each task got its own prompts back, as `Numbers.reward` asserts


def test_training_prompts_come_once_each_with_their_weights():
    (two, plain), (three, other) = mixture.training_prompts(MIXED)
    assert (two, three) == (2, 3) and plain + other == MIXED.own_prompts("plain") + MIXED.own_prompts("other")
    assert [p.prompt_id for p in other] == [f"other/train-{i}" for i in range(10)] and {p.preference_id for p in other} == {2, 3}
    assert mixture.training_prompts(OTHER) == [(1, OTHER.prompts("train", 0, 10))]
    assert mixture.parts(MIXED) == (MIXED.tasks["plain"], OTHER) and mixture.parts(OTHER) == (OTHER,)


def test_one_rule_for_all_tasks_that_each_must_offer(synthetic_dir):
    name = "movielens:1 letters:1"
    task = mixture.load(name, synthetic_dir, seed=0, num_preference_groups=3, preference_groups="user")
    for prompt in task.prompts("train", 0, 40):
        assert prompt.preference_id == int(prompt.user_id, 16) % 3 + (0 if prompt.prompt_id.startswith("movielens") else 3)
    judge = mixture.load_judge(name, synthetic_dir, seed=0, num_preference_groups=3, preference_groups="user")
    for prompt in task.prompts("train", 0, 10):
        assert judge.reward(prompt, "abc") == task.reward(prompt, "abc")
    for call in (mixture.load, mixture.load_judge):
        with pytest.raises(ValueError, match="^preference_groups = 'rating' is unknown to the task letters: use one of persona, user, or"):
            call(name, "nowhere", seed=0, num_preference_groups=3, preference_groups="rating")
    mixture.check_preference_groups(name, "")
    mixture.check_preference_groups("movielens", "column:age")
    with pytest.raises(ValueError, match="unknown to the task movielens: use one of kmeans, rating, user, column:gender, column:age, column:occ"):
        mixture.check_preference_groups(name, "persona")


def test_a_mixed_run_has_the_preference_groups_of_all_its_tasks(synthetic_dir):
    config = small_config.config(task__name="letters:1 movielens:1", task__data_dir=synthetic_dir, generation__prompt_buckets=(40, 1024),
                                 model__random__context_length=1100)  # fmt: skip
    settings.check(config)
    task = assembly.load_task(config)
    base = assembly.load_base(config, task)
    assert settings.num_preference_groups(config) == task.num_preference_groups == 2 * config.task.num_preference_groups
    assert settings.learner_settings(config, base.tokenizer).num_preference_groups == task.num_preference_groups
    with pytest.raises(ValueError, match="^prompt of .* tokens is longer than the largest bucket of 40: "):  # of the second task
        assembly.load_base(small_config.config(task__name="letters:1 movielens:1", task__data_dir=synthetic_dir), task)
