"""Arms: only the row of the history changes; a placebo keeps sizes and shares, and is the same in every process."""

import collections
import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from pgrpo_jax.tasks import letters, mixture
from pgrpo_jax.tasks.arms import ARMS, with_arm

TASK = letters.load("", seed=0, num_preference_groups=3)


def everything(task, split):
    return task.prompts(split, 0, task.num_prompts(split))


def users(task, split):
    """user_id -> row of the history; it must be one."""
    rows = {}
    for prompt in everything(task, split):
        assert rows.setdefault(prompt.user_id, prompt.history_row) == prompt.history_row
    return rows


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_an_arm_changes_the_row_and_nothing_else(arm, split):
    task = with_arm(TASK, arm, 0)
    for one, other in zip(everything(task, split), everything(TASK, split), strict=True):
        assert dataclasses.replace(one, history_id=None) == other
        assert task.reward(one, "abc") == TASK.reward(other, "abc") and task.choice(one, "abc") is None
    assert task.preference_group_names == TASK.preference_group_names and task.num_preference_groups == 3
    assert task.reward_components == TASK.reward_components and task.num_prompts(split) == TASK.num_prompts(split)
    found = everything(task, split)
    np.testing.assert_array_equal(task.baselines(found)["random"], TASK.baselines(found)["random"])
    assert task.prompts(split, 3, 5) == task.prompts(split, 0, 20)[15:]


def test_the_first_arm_is_the_task_and_the_second_one_history():
    assert with_arm(TASK, "preference", 0) is TASK
    assert {p.history_row for p in everything(with_arm(TASK, "pooled", 0), "train")} == {0}
    assert {p.history_row for p in everything(with_arm(TASK, "pooled", 0), "test")} == {0}


def test_a_placebo_permutes_the_training_users():
    own, placebo = users(TASK, "train"), users(with_arm(TASK, "placebo", 0), "train")
    assert own != placebo and list(own) == list(placebo)
    assert collections.Counter(own.values()) == collections.Counter(placebo.values())
    together = collections.Counter((own[user], placebo[user]) for user in own)  # independent: as many as the two sizes' product says
    sizes = collections.Counter(own.values())
    for pair in ((a, b) for a in sizes for b in sizes):
        assert abs(together[pair] - sizes[pair[0]] * sizes[pair[1]] / len(own)) < 25
    assert users(with_arm(TASK, "placebo", 0), "train") == placebo != users(with_arm(TASK, "placebo", 1), "train")


def test_users_never_seen_get_a_row_by_the_same_shares():
    task = with_arm(letters.load("", seed=0, num_preference_groups=2), "placebo", 0)
    prompt = everything(task, "test")[0]
    unseen = [dataclasses.replace(prompt, user_id=f"{i:016x}") for i in range(3000)]
    rows = [task.row(prompt) for prompt in unseen]
    share = np.mean([row == 0 for row in users(task, "train").values()])
    assert abs(np.mean([row == 0 for row in rows]) - share) < 4 * np.sqrt(0.25 / 3000)
    assert [task.row(prompt) for prompt in reversed(unseen[:50])] == rows[:50][::-1]


def test_a_placebo_is_the_same_in_another_process():
    program = (
        "from pgrpo_jax.tasks import letters; from pgrpo_jax.tasks.arms import with_arm\n"
        "task = with_arm(letters.load('', seed=0, num_preference_groups=3), 'placebo', 5)\n"
        "print(*(p.history_id for s in ('train', 'test') for p in task.prompts(s, 0, 64)))"
    )
    environment = {"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)}
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60, env=environment).stdout
    mine = with_arm(TASK, "placebo", 5)
    assert output.split() == [str(p.history_id) for split in ("train", "test") for p in mine.prompts(split, 0, 64)]


@pytest.mark.parametrize("arm", ["pooled", "placebo"])
def test_in_a_mixture_each_task_is_an_experiment_of_its_own(synthetic_dir, arm):
    mixed = mixture.load("letters:1 movielens:1", synthetic_dir, seed=0, num_preference_groups=2)
    task = with_arm(mixed, arm, 0)
    assert len(mixture.parts(task)) == 2
    rows = {name: {p.history_row for p in task.prompts("train", 0, 200) if p.prompt_id.startswith(name)} for name in mixed.tasks}
    assert rows == ({"letters": {0}, "movielens": {2}} if arm == "pooled" else {"letters": {0, 1}, "movielens": {2, 3}})
    for one, other in zip(task.prompts("train", 0, 40), mixed.prompts("train", 0, 40)):
        assert dataclasses.replace(one, history_id=None) == other
        assert task.reward(one, "abc") == mixed.reward(other, "abc") == mixed.reward(one, "abc")


def test_what_is_out_of_range_is_refused():
    with pytest.raises(ValueError, match="^arm = 'control' is unknown: use one of preference, pooled, placebo$"):
        with_arm(TASK, "control", 0)
    with pytest.raises(ValueError, match="seed is -1"):
        with_arm(TASK, "pooled", -1)
    nameless = dataclasses.replace(TASK, split_prompts={"train": (dataclasses.replace(TASK.split_prompts["train"][0], user_id=""),)})
    with pytest.raises(ValueError, match="^prompt train-0-0 has no user_id, and a placebo permutes users: use"):
        with_arm(nameless, "placebo", 0)
    assert with_arm(nameless, "pooled", 0).prompts("train", 0, 1)[0].history_id == 0
