"""MovieLens users by column, rating and pseudonym: real tables against a loop, the same prompts whatever the rule."""

import collections
import pathlib

import numpy as np
import pytest

from pgrpo_jax.tasks import assignments, mixture, movielens, movielens_prompts, movielens_tables, movielens_users

SEED = 3  # of the fixtures over the real tables


def assign(real_dir, rule, k):
    return movielens_users.assign(real_dir, seed=SEED, num_preference_groups=k, rule=rule, task="movielens")


def test_real_columns_against_a_loop(real_dir, real_tables, real_preparation):
    lines = [line.split("\t") for line in pathlib.Path(real_dir, "ml-100k.user").read_text().splitlines()[1:]]
    for column, place, k in (("gender", 2, 3), ("occupation", 3, 6), ("age", 1, 5)):
        value = {line[0]: assignments.age_bucket(line[1]) if column == "age" else line[place] for line in lines}
        training = [user for user, train in zip(real_tables.users, real_preparation.is_train) if train]
        common = [name for name, _ in collections.Counter(value[user] for user in training).most_common(k - 1)]
        ids, names = assign(real_dir, f"column:{column}", k)
        assert names == (*(f"{column} {name}" for name in common), f"{column}: any other")
        assert ids == {user: common.index(value[user]) if value[user] in common else k - 1 for user in real_tables.users}


def test_real_ratings_use_the_history_part_alone(real_dir, real_tables, real_preparation):
    ids, names = assign(real_dir, "rating", 4)
    known = collections.defaultdict(list)
    for user, stars, in_history in zip(real_tables.user, real_tables.rating, real_preparation.in_history):
        if in_history:
            known[real_tables.users[user]].append(int(stars))
    means = {user: sum(stars) / len(stars) for user, stars in known.items()}
    held_out = [user for user, train in zip(real_tables.users, real_preparation.is_train) if not train]
    training = sorted((user for user in means if user not in set(held_out)), key=means.__getitem__)
    sizes = np.bincount([ids[user] for user in training])
    assert len(names) == 4 and np.all(np.abs(sizes - len(training) / 4) < 8)  # equal means stay together
    lowest = [min(means[user] for user in training if ids[user] == row) for row in range(4)]
    highest = [max(means[user] for user in training if ids[user] == row) for row in range(4)]
    assert all(high < low for high, low in zip(highest, lowest[1:]))
    for user in held_out:  # never seen: the bucket whose edges hold him
        row = ids[user]
        assert (row == 0 or means[user] > highest[row - 1]) and (row == 3 or means[user] < lowest[row + 1])


def test_a_user_without_ratings_counts_as_average(tmp_path, table_writer):
    table_writer(tmp_path, items=["1\tAlien\t1979\tSci-Fi"], users=["1\t3", "2\t3", "3\t3"], ratings=["1\t1\t2\t1", "2\t1\t5\t1"])
    tables = movielens_tables.read(str(tmp_path))
    found = movielens_users.mean_ratings(tables, in_history=np.array([True, True]), is_train=np.array([True, False, True]))
    assert found.tolist() == [2.0, 5.0, 2.0]


def test_real_users_are_hashed(real_dir, real_tables):
    ids, names = assign(real_dir, "user", 32)
    assert ids == {user: int(assignments.pseudonym("movielens", user), 16) % 32 for user in real_tables.users} and len(names) == 32


@pytest.mark.parametrize("rule, k", [("rating", 2), ("user", 40), ("column:gender", 3), ("column:age", 4), ("column:occupation", 2)])
def test_the_rule_changes_nothing_but_the_preference_group(synthetic_dir, rule, k):
    plain = movielens.load(synthetic_dir, seed=0, num_preference_groups=min(k, 5))
    task = mixture.load("movielens", synthetic_dir, seed=0, num_preference_groups=k, preference_groups=rule)
    rows, names = movielens_users.assign(synthetic_dir, seed=0, num_preference_groups=k, rule=rule, task="movielens")
    assert task.num_preference_groups == k and task.preference_group_names == names
    for split in ("train", "test"):
        size = plain.num_prompts(split)
        pairs = list(zip(task.prompts(split, 0, size), plain.prompts(split, 0, size), strict=True))
        assert all((a.prompt_id, a.text, a.facts, a.user_id) == (b.prompt_id, b.text, b.facts, b.user_id) for a, b in pairs)
        assert all(a.preference_id == rows[a.facts["user"]] for a, _ in pairs)
        assert all(a.user_id == assignments.pseudonym("movielens", a.facts["user"]) for a, _ in pairs)
    assert len({p.preference_id for p in task.prompts("train", 0, task.num_prompts("train"))}) > 1


def test_a_value_of_held_out_users_alone_goes_to_the_last_row(synthetic_dir):
    tables = movielens_tables.read(synthetic_dir)
    held_out = np.flatnonzero(~movielens_prompts.divide(tables, seed=0)[0])
    path = pathlib.Path(synthetic_dir, "ml-100k.user")
    lines = path.read_text().splitlines()
    lines[1 + held_out[0]] = lines[1 + held_out[0]].rsplit("\t", 1)[0] + "\tastronaut"
    path.write_text("\n".join(lines) + "\n")
    ids, names = movielens_users.assign(synthetic_dir, seed=0, num_preference_groups=2, rule="column:occupation", task="movielens")
    assert ids[tables.users[held_out[0]]] == 1 and names == ("occupation student", "occupation: any other")


def test_the_default_is_k_means_and_other_rules_are_refused(synthetic_dir):
    one, two = (movielens.load(synthetic_dir, seed=0, num_preference_groups=2, preference_groups=rule) for rule in ("", "kmeans"))
    assert one.prompts("train", 0, 30) == two.prompts("train", 0, 30) and one.preference_ids is None
    for load in (movielens.load, movielens.load_judge):
        with pytest.raises(ValueError, match="^preference_groups = 'column:zip' is unknown to the task movielens: use one of kmeans, rating, "):
            load(synthetic_dir, seed=0, num_preference_groups=2, preference_groups="column:zip")
    with pytest.raises(ValueError, match=r"num_preference_groups is 4, outside \[1, 3\] \(column 'gender' has 2 values"):
        movielens.load(synthetic_dir, seed=0, num_preference_groups=4, preference_groups="column:gender")
    with pytest.raises(ValueError, match=r"num_preference_groups is 0, outside \[1, 50\]"):
        movielens.load(synthetic_dir, seed=0, num_preference_groups=0, preference_groups="user")
