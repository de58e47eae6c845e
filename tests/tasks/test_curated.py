"""Curated streams: exact counts in every step, every prompt in its turn, the same by random access; filters and curriculum by definition."""

import collections
from fractions import Fraction
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pgrpo_jax.tasks import letters, mixture, movielens
from pgrpo_jax.tasks.arms import with_arm
from pgrpo_jax.tasks.curated import Curated, curated, quotas
from pgrpo_jax.tasks.difficulty import Estimate

TASK = letters.load("", seed=0, num_preference_groups=3)  # 1024, 684 and 340 training prompts
SIZE = TASK.num_prompts("train")
IDS = sorted(p.prompt_id for p in TASK.prompts("train", 0, SIZE))


def estimates(known=IDS):
    """Means with many ties, deviations that do not follow them."""
    rng = np.random.default_rng(7)
    return {name: Estimate(float(rng.integers(0, 11)) / 10, float(rng.integers(0, 6)) / 10, 8) for name in known}


def make(task=TASK, **options):
    return curated(task, **{"seed": 0, "prompts_per_step": 8} | options)


def test_nothing_asked_for_leaves_the_task_itself():
    assert make() is TASK
    assert make(difficulty=estimates()) is TASK  # estimates alone ask for nothing
    assert make(strata_floor=1) is not TASK


CASES = {
    "filter": {"difficulty": estimates(), "min_mean": 0.2, "max_mean": 0.8},
    "curriculum": {"difficulty": estimates(IDS[::2]), "order": "easy_first"},
    "strata": {"strata_floor": 2},
    "all": {"difficulty": estimates(IDS[::2]), "min_std": 0.2, "order": "hard_first", "strata_floor": 1},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.parametrize("size", [1, 3, 8, 50])
def test_random_access_equals_reading_in_order(options, size):
    task, again = make(**options), make(**options)
    assert isinstance(task, Curated)
    start = task.num_prompts("train") // size - 2 if size > 1 else 0  # over the end of an epoch
    whole = task.prompts("train", 0, (start + 6) * size)
    found = {index: again.prompts("train", index, size) for index in reversed(range(start, start + 6))}
    assert sum((found[index] for index in sorted(found)), ()) == whole[start * size :]


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_everything_but_the_training_stream_is_the_tasks_own(options):
    task = make(**options)
    assert task.prompts("test", 1, 7) == TASK.prompts("test", 1, 7) and task.num_prompts("test") == 128
    prompt = task.prompts("train", 0, 1)[0]
    assert task.reward(prompt, "abc") == TASK.reward(prompt, "abc") and task.choice(prompt, "a") is None
    np.testing.assert_array_equal(task.baselines([prompt])["popular"], TASK.baselines([prompt])["popular"])
    assert (task.num_preference_groups, task.preference_group_names) == (3, TASK.preference_group_names)
    assert task.reward_components == TASK.reward_components and mixture.parts(task) == (TASK,)
    other = curated(TASK, **{"seed": 1, "prompts_per_step": 8} | options)
    assert sorted(p.prompt_id for p in other.prompts("train", 0, 64)) != sorted(p.prompt_id for p in task.prompts("train", 0, 64))


def test_the_filter_by_its_definition():
    known = estimates(IDS[::3])
    for keep_unknown in (True, False):
        task = make(difficulty=known, min_mean=0.2, max_mean=0.8, min_std=0.3, keep_unknown=keep_unknown)
        expected = [n for n in IDS if (0.2 <= known[n].mean <= 0.8 and known[n].std >= 0.3 if n in known else keep_unknown)]
        size = task.num_prompts("train")
        epochs = [[p.prompt_id for p in task.prompts("train", epoch, size)] for epoch in range(3)]
        assert size == len(expected) and all(sorted(epoch) == expected for epoch in epochs)
        assert epochs[0] != epochs[1] != epochs[2]
    only = make(difficulty=known, keep_unknown=False)
    assert sorted(p.prompt_id for p in only.prompts("train", 0, only.num_prompts("train"))) == IDS[::3]


@pytest.mark.parametrize("order", ["easy_first", "hard_first"])
def test_the_curriculum_by_its_definition(order):
    known = estimates(IDS[::2])
    task = make(difficulty=known, order=order)
    epochs = [[p.prompt_id for p in task.prompts("train", epoch, SIZE)] for epoch in range(2)]
    for epoch in epochs:
        assert sorted(epoch) == IDS
        means = [known[n].mean for n in epoch if n in known]
        assert means == sorted(means, reverse=order == "easy_first")
        for start in range(0, SIZE - 32, 32):  # those without an estimate are spread evenly
            assert 15 <= sum(n in known for n in epoch[start : start + 32]) <= 17
    tied = [[n for n in epoch if n in known and known[n].mean == 0.5] for epoch in epochs]
    assert sorted(tied[0]) == sorted(tied[1]) and tied[0] != tied[1]  # equals are shuffled anew


def test_every_step_has_exactly_its_floor_and_its_shares():
    task = make(strata_floor=1)  # 3 by floor; 5 x (1024, 684, 340) / 2048 = 2.5, 1.67, 0.83: 2, 1, 0 and two by remainder
    assert task.counts == (3, 3, 2)
    stream = task.prompts("train", 0, 400)
    for start in range(0, 392):  # in any 8 in a row, not only in a step
        assert collections.Counter(p.preference_id for p in stream[start : start + 8]) == {0: 3, 1: 3, 2: 2}


def test_each_preference_group_goes_through_its_own_epochs():
    task = make(strata_floor=2)
    stream = task.prompts("train", 0, 3 * SIZE)
    for k, size in enumerate((1024, 684, 340)):
        own = [p.prompt_id for p in stream if p.preference_id == k]
        epochs = [own[start : start + size] for start in range(0, len(own) - size + 1, size)]
        assert len(epochs) >= 2 and all(len(set(epoch)) == size for epoch in epochs) and epochs[0] != epochs[1]


def test_a_preference_group_without_training_prompts_is_no_stratum():
    task = letters.load("", seed=0, num_preference_groups=3000, preference_groups="user")
    present = {p.preference_id for p in task.prompts("train", 0, SIZE)}
    assert 0 < 3000 - len(present)
    counts = curated(task, seed=0, prompts_per_step=len(present) + 9, strata_floor=1).counts
    assert len(counts) == len(present) and sum(counts) == len(present) + 9


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=8), st.integers(0, 3), st.integers(0, 60))
@hypothesis_settings(max_examples=100, deadline=None)
def test_quotas_add_up_and_are_within_one_of_the_share(sizes, floor, more):
    shares = [Fraction(size, 7) for size in sizes]
    total = floor * len(sizes) + more
    found = quotas(shares, floor=floor, total=total)
    assert sum(found) == total
    for count, size in zip(found, sizes):
        assert abs(count - floor - more * size / sum(sizes)) < 1 + 1e-9
    ranked = sorted(zip(sizes, found))
    assert all(a[1] <= b[1] or a[0] == b[0] for a, b in zip(ranked, ranked[1:]))  # more prompts, never fewer places


def test_quotas_by_hand():
    assert quotas([Fraction(1), Fraction(1)], floor=0, total=3) == (2, 1)  # equal remainders: the first
    assert quotas([Fraction(7), Fraction(2), Fraction(1)], floor=0, total=5) == (4, 1, 0)  # 3.5, 1, 0.5
    assert quotas([Fraction(7), Fraction(2), Fraction(1)], floor=1, total=5) == (3, 1, 1)  # 1.4, 0.4, 0.2: of equal remainders the first
    assert quotas([Fraction(97), Fraction(3)], floor=2, total=4) == (2, 2)


def test_a_mixture_keeps_its_weights(synthetic_dir):
    mixed = mixture.load("letters:3 movielens:1", synthetic_dir, seed=0, num_preference_groups=2)
    films = sorted({p.prompt_id for p in mixed.own_prompts("movielens")})
    known = {name: Estimate(index / len(films), 0.3, 4) for index, name in enumerate(films)}
    task = curated(mixed, seed=0, prompts_per_step=8, difficulty=known, min_mean=0.5, order="easy_first")
    owners = [p.prompt_id.split("/")[0] for p in task.prompts("train", 0, 40)]
    assert owners == [p.prompt_id.split("/")[0] for p in mixed.prompts("train", 0, 40)] and mixture.parts(task) == mixture.parts(mixed)
    half = math.floor(len(films) / 2)
    asked = [p.prompt_id for p in task.prompts("train", 0, 4 * half) if p.prompt_id.startswith("movielens")]
    assert asked == films[: len(films) - half - 1 : -1]
    prompt = task.prompts("train", 0, 1)[0]
    assert prompt in mixed.own_prompts("letters") and task.reward(prompt, "abc") == mixed.reward(prompt, "abc")


def test_strata_of_a_mixture_share_by_weight(synthetic_dir):
    mixed = mixture.load("letters:3 movielens:1", synthetic_dir, seed=0, num_preference_groups=2)
    films = collections.Counter(p.preference_id for p in mixed.own_prompts("movielens"))
    task = curated(mixed, seed=0, prompts_per_step=160, strata_floor=1)
    toys = collections.Counter(p.preference_id for p in mixed.own_prompts("letters"))
    exact = [Fraction(3, 4) * Fraction(toys[k], toys.total()) for k in (0, 1)] + [Fraction(films[k], 4 * films.total()) for k in (2, 3)]
    assert all(abs(count - 1 - 156 * share) < 1 for count, share in zip(task.counts, exact, strict=True)) and sum(task.counts) == 160


def test_an_arm_goes_along():
    task = make(with_arm(TASK, "placebo", 0), strata_floor=1)
    rows = {p.user_id: p.history_row for p in with_arm(TASK, "placebo", 0).prompts("train", 0, SIZE)}
    assert all(p.history_row == rows[p.user_id] for p in task.prompts("train", 0, 100))
    assert {k: v for k, v in collections.Counter(p.preference_id for p in task.prompts("train", 5, 8)).items()} == {0: 3, 1: 3, 2: 2}


def test_real_films_in_steps_with_a_floor(real_dir):
    task = movielens.load(real_dir, seed=3, num_preference_groups=5)
    found = curated(task, seed=3, prompts_per_step=16, strata_floor=3)
    for step in (0, 1, 250, 10_000):
        counts = collections.Counter(p.preference_id for p in found.prompts("train", step, 16))
        assert sorted(counts.values()) == [3, 3, 3, 3, 4]
    size = task.num_prompts("train")
    known = {p.prompt_id: p for p in task.prompts("train", 0, size)}
    assert all(known[p.prompt_id] == p for p in found.prompts("train", 0, size)) and found.num_prompts("train") == size


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prompts_per_step": 0}, "prompts_per_step = 0 is below 1"),
        ({"seed": -1}, "seed is -1"),
        ({"min_mean": 0.6, "max_mean": 0.4}, "min_mean = 0.6 and max_mean = 0.4 leave nothing between"),
        ({"min_mean": math.nan}, "min_mean = nan"),
        ({"min_std": -0.1}, "min_std = -0.1 is outside"),
        ({"order": "hardest"}, "order = 'hardest' is unknown: use one of shuffled, easy_first, hard_first"),
        ({"strata_floor": -1}, "strata_floor = -1 is below 0"),
        ({"strata_floor": 3}, "strata_floor = 3 asks for 9 prompts for 3 preference groups, more than the 8 of a step: lower it to 2"),
        ({"order": "easy_first"}, "of the 0 given none is of a training prompt: measure them"),
        ({"min_std": 0.1}, "of the 0 given none"),
        ({"keep_unknown": False}, "of the 0 given none"),
        ({"difficulty": {"train-9999-0": Estimate(0.5, 0.1, 4)}, "min_std": 0.1}, "of the 1 given none"),
        ({"difficulty": estimates(IDS[:5]), "keep_unknown": False}, "-inf <= mean <= inf, std >= 0 keeps 5 of 2048 training prompts, fewer than the 8 of one step: widen"),
        ({"strata_floor": 600, "prompts_per_step": 1900}, "preference group 'likes cgkosw' has 340 training prompts, fewer than its 617 of a step: lower"),
    ],
)  # fmt: skip
def test_what_can_not_be_done_says_why(options, message):
    with pytest.raises(ValueError) as caught:
        make(**options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_task_of_a_mixture_must_keep_some_prompts(synthetic_dir):
    mixed = mixture.load("letters:1 movielens:1", synthetic_dir, seed=0, num_preference_groups=2)
    known = {p.prompt_id: Estimate(0.0, 0.0, 4) for p in mixed.own_prompts("movielens")}
    with pytest.raises(ValueError, match="but none of one task of the mixture: widen the bounds"):
        curated(mixed, seed=0, prompts_per_step=8, difficulty=known, min_std=0.1)
    task = curated(mixed, seed=0, prompts_per_step=8, strata_floor=1)
    with pytest.raises(ValueError, match="split is 'dev'"):
        task.prompts("dev", 0, 1)
    for index, size in ((-1, 1), (0, 0)):
        with pytest.raises(ValueError, match="ask within the bounds"):
            task.prompts("train", index, size)
