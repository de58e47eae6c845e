"""The toy task: preferences conflict, rewards by hand, sizes and streams as documented."""

import collections
import hashlib
import json
import string

import numpy as np
import pytest

from pgrpo_jax import tasks
from pgrpo_jax.tasks import letters


def load(k, seed=0):
    return letters.load("", seed=seed, num_preference_groups=k)


def prompt_of(task, preference_id):
    return next(p for p in task.prompts("test", 0, task.num_prompts("test")) if p.preference_id == preference_id)


@pytest.mark.parametrize("k", [1, 2, 4, 5, 26])
def test_favourites_conflict_and_are_generous(k):
    sets = [letters.favourite_characters(p, num_preference_groups=k) for p in range(k)]
    for p, favourites in enumerate(sets):
        assert all(not favourites & other for other in sets[:p])
        assert len(favourites) >= 94 // max(k, 4) and favourites <= set(letters.PRINTABLE)
        assert favourites & set(string.ascii_lowercase)
    assert {"a", "e", "i"} <= letters.favourite_characters(0, num_preference_groups=3)


@pytest.mark.parametrize(
    "preference_id, answer, total, share",
    [
        (0, "aei", 1.0, 1.0),
        (0, "a b", 0.5, 0.5),
        (0, "bcd", 0.0, 0.0),
        (0, "a\u00e9", 0.5, 0.5),  # neither printable ASCII nor liked, but counted
        (1, "bf", 0.75, 1.0),  # offset 1/4, scale 1/2
        (1, "ab", 0.5, 0.5),
        (1, "aa", 0.25, 0.0),
        (2, "cccx", 1 / 3 + 0.75 / 3, 0.75),  # offset 1/3, scale 1/3
    ],
)
def test_reward_by_hand(preference_id, answer, total, share):
    task = load(3)
    reward = task.reward(prompt_of(task, preference_id), answer)
    assert reward.total == pytest.approx(total, rel=1e-12)
    assert reward.components == {"answered": 1.0, "share": share} and tuple(reward.components) == task.reward_components
    assert task.choice(prompt_of(task, preference_id), answer) is None


@pytest.mark.parametrize("answer", ["", "  \n\t"])
def test_an_empty_answer_earns_nothing(answer):
    task = load(3)
    for preference_id in range(3):
        reward = task.reward(prompt_of(task, preference_id), answer)
        assert reward.total == 0.0 and reward.components == {"answered": 0.0, "share": 0.0}


def test_prompts_show_what_the_user_likes_and_stay_short():
    task = load(5)
    for split in ("train", "test"):
        prompts = task.prompts(split, 0, task.num_prompts(split))
        for prompt in prompts:
            favourites = letters.favourite_characters(prompt.preference_id, num_preference_groups=5)
            assert prompt.text == f"user {prompt.facts['user']} likes: {' '.join(prompt.facts['shown'])}"
            assert len(prompt.facts["shown"]) == 3 and set(prompt.facts["shown"]) <= favourites
            assert len(prompt.text.encode()) <= 32
            assert task.reward(prompt, "".join(prompt.facts["shown"])).components["share"] == 1.0
        assert len({prompt.prompt_id for prompt in prompts}) == len(prompts)


def test_users_are_disjoint_and_sizes_as_documented():
    task = load(3)
    users = {split: {} for split in ("train", "test")}
    for split, seen in users.items():
        for prompt in task.prompts(split, 0, task.num_prompts(split)):
            assert seen.setdefault(prompt.facts["user"], prompt.preference_id) == prompt.preference_id
    assert not set(users["train"]) & set(users["test"])
    assert collections.Counter(users["train"].values()) == {0: 256, 1: 171, 2: 85}
    assert collections.Counter(users["test"].values()) == {0: 64, 1: 43, 2: 21}
    assert (task.num_prompts("train"), task.num_prompts("test")) == (2048, 128)
    assert min(collections.Counter(p.preference_id for p in load(26).prompts("test", 0, 128)).values()) >= 1


def test_stream_is_random_access_and_shuffled_anew_in_each_epoch():
    task, again = load(2), load(2)
    size = task.num_prompts("train")
    in_order = [prompt for batch in range(4) for prompt in task.prompts("train", batch, 8)]
    assert [again.prompts("train", i, 1)[0] for i in reversed(range(32))] == in_order[::-1]
    first, second = task.prompts("train", 0, size), task.prompts("train", 1, size)
    assert len({prompt.prompt_id for prompt in first}) == size
    assert {prompt.prompt_id for prompt in first} == {prompt.prompt_id for prompt in second} and first != second
    assert load(2, seed=1).prompts("train", 0, 8) != first[:8]
    assert task.prompts("test", 1, task.num_prompts("test")) == task.prompts("test", 0, task.num_prompts("test"))


def test_baselines_against_a_loop():
    task = load(3)
    prompts = task.prompts("test", 0, 40)
    found = task.baselines(prompts)
    popular = "".join(c for c in string.printable if "!" <= c <= "~" and (ord(c) - 97) % 4 == 0)
    for i, prompt in enumerate(prompts):
        each = [task.reward(prompt, chr(code)).total for code in range(33, 127)]
        assert found["random"][i] == pytest.approx(np.mean(each), rel=1e-12)
        assert found["popular"][i] == pytest.approx(task.reward(prompt, popular).total, rel=1e-12)
    means = {p: found["random"][[q.preference_id == p for q in prompts]].mean() for p in range(3)}
    assert means[0] < means[1] < means[2]  # the distributions of rewards differ, which is the point


def test_random_bytes_earn_something():
    rng = np.random.default_rng(0)
    task = load(2)
    prompt = prompt_of(task, 0)
    answers = [bytes(rng.integers(0, 256, 16, dtype=np.uint8)).decode("utf-8", errors="replace") for _ in range(400)]
    rewards = [task.reward(prompt, answer).total for answer in answers]
    assert 0.07 < np.mean(rewards) < 0.13 and np.mean(np.array(rewards) > 0) > 0.6


@pytest.mark.parametrize("k", [0, -1, 27])
def test_a_k_out_of_range_is_refused(k):
    with pytest.raises(ValueError, match=rf"num_preference_groups is {k}, outside \[1, 26\]"):
        load(k)


def test_other_bad_arguments():
    task = load(4)
    with pytest.raises(ValueError, match="seed is -1"):
        load(2, seed=-1)
    with pytest.raises(ValueError, match="split is 'valid'"):
        task.prompts("valid", 0, 1)
    with pytest.raises(ValueError, match="batch_size 0"):
        task.prompts("train", 0, 0)
    with pytest.raises(ValueError, match=r"preference id is 3, outside \[0, 2\)"):
        load(2).reward(prompt_of(task, 3), "a")


def test_both_tasks_are_on_offer():
    assert set(tasks.TASKS) == {"movielens", "letters"}
    assert tasks.TASKS["letters"]("", seed=0, num_preference_groups=2).num_preference_groups == 2


def test_users_by_themselves_keep_their_personas_and_get_hashed_rows():
    task, persona = letters.load("", seed=0, num_preference_groups=16, preference_groups="user"), load(4)
    for split in ("train", "test"):
        size = task.num_prompts(split)
        assert size == persona.num_prompts(split) and task.num_personas == 4
        for prompt, same in zip(task.prompts(split, 0, size), persona.prompts(split, 0, size)):
            assert (prompt.text, prompt.facts, prompt.user_id) == (same.text, same.facts, same.user_id)  # the same questions and judge
            assert prompt.preference_id == int(prompt.user_id, 16) % 16
            assert letters.persona_of(prompt, num_personas=4) == same.preference_id
            assert task.reward(prompt, "abc") == persona.reward(same, "abc")
    np.testing.assert_array_equal(*(t.baselines(t.prompts("train", 0, 40))["popular"] for t in (task, persona)))
    assert len(task.preference_group_names) == 16
    assert letters.load("", seed=0, num_preference_groups=100, preference_groups="user").num_preference_groups == 100


def test_a_user_has_one_pseudonym_and_shares_it_with_nobody():
    task = load(3)
    names = {}
    for split in ("train", "test"):
        for prompt in task.prompts(split, 0, task.num_prompts(split)):
            assert names.setdefault(prompt.facts["user"], prompt.user_id) == prompt.user_id
    assert len(set(names.values())) == len(names) == 640 and load(3).split_prompts == task.split_prompts


def test_an_unknown_rule_is_refused():
    for rule in ("kmeans", "personas"):
        with pytest.raises(ValueError, match=f"^preference_groups = '{rule}' is unknown to the task letters: use one of persona, user,"):
            letters.load("", seed=0, num_preference_groups=3, preference_groups=rule)
    assert letters.load("", seed=0, num_preference_groups=3, preference_groups="persona") == load(3)
    with pytest.raises(ValueError, match="num_preference_groups is 0"):
        letters.load("", seed=0, num_preference_groups=0, preference_groups="user")


def test_the_default_stream_is_pinned():
    """A run resumed under newer code must meet the same prompts: ids, texts, facts and preference groups as they were first released."""
    digest = hashlib.sha256()
    for split in ("train", "test"):
        for p in load(3).prompts(split, 0, 100) + load(3).prompts(split, 30, 100):
            digest.update(json.dumps([p.prompt_id, p.text, p.preference_id, dict(p.facts)]).encode())
    assert digest.hexdigest().startswith("05a8040626db380b")
