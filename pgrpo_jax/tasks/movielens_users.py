"""MovieLens users by another rule than their taste (`assignments`): computed from the tables when a task is loaded, nothing is built.

The prompts stay what they were built as: which films are put to choice depends on the users' tastes (`movielens_prompts`), never on the
rule. So runs that differ in the rule alone answer the same questions.
"""

import numpy as np

from pgrpo_jax.tasks import assignments
from pgrpo_jax.tasks import movielens_prompts
from pgrpo_jax.tasks import movielens_tables


def assign(source_dir: str, *, seed: int, num_preference_groups: int, rule: str, task: str) -> tuple[dict[str, int], tuple[str, ...]]:
    """Gives every user of the tables his preference group.

    Args:
        source_dir: directory of the three MovieLens files.
        seed: of the run; it decides who is held out, and so who is counted.
        num_preference_groups: K.
        rule: "rating", "user" or "column:NAME" with NAME gender, age or occupation.
        task: the task's name, for pseudonyms.

    Returns:
        user id as the file spells it -> preference group, and K names for people.

    Raises:
        FileNotFoundError: a source file is missing.
        ValueError: a line is malformed, or K does not fit the rule.
    """
    tables = movielens_tables.read(source_dir)
    is_train, in_history = movielens_prompts.divide(tables, seed=seed)
    if rule == "user":
        names = [assignments.pseudonym(task, user) for user in tables.users]
        found = assignments.by_user(names, num_preference_groups)
    elif rule == "rating":
        means = mean_ratings(tables, in_history=in_history, is_train=is_train)
        found = assignments.by_rating(means, is_train=is_train, num_preference_groups=num_preference_groups)
    else:
        column = rule.removeprefix("column:")
        values = movielens_tables.read_column(source_dir, column)
        values = tuple(map(assignments.age_bucket, values)) if column == "age" else values
        found = assignments.by_column(values, is_train=is_train, num_preference_groups=num_preference_groups, column=column)
    return dict(zip(tables.users, found.ids.tolist(), strict=True)), found.names


def mean_ratings(tables: movielens_tables.Tables, *, in_history: np.ndarray, is_train: np.ndarray) -> np.ndarray:
    """Returns each user's mean rating over his history part: the films he is asked about decide nothing.

    Args:
        tables: the ratings.
        in_history: [R] bool.
        is_train: [U] bool.

    Returns:
        [U] float64, stars; the mean over the training users' ratings for a user who has none.
    """
    user, rating = tables.user[in_history], tables.rating[in_history]
    count = np.bincount(user, minlength=len(tables.users))
    total = np.bincount(user, weights=rating, minlength=len(tables.users))
    overall = total[is_train].sum() / max(count[is_train].sum(), 1)
    return np.where(count > 0, total / np.maximum(count, 1), overall)
