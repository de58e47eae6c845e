"""Floor 1: what each user's rewards contributed to the reward histories, from recorded rollouts; and histories without him, or newly assigned.

Moments add up over users, so a cumulative history is the merge of its users' contributions: one of them can be taken out, and all of them can be
dealt to other preference groups, exactly but for rounding. A memory that fades or forgets has no such parts. Users are known by pseudonym.

Letters: K rows of the history, C reward components that are kept apart.
"""

from typing import Callable, Iterable, Mapping

import numpy as np

from pgrpo_jax.algorithms import reward_history
from pgrpo_jax.structs import RewardHistory, Rollouts

_LEAVES = ("count", "weight", "mean", "m2")


def contributions(
    rollouts: Iterable[Rollouts],
    num_rows: int,
    *,
    rewards: Callable[[Rollouts], np.ndarray] | None = None,
    weights: Callable[[Rollouts], np.ndarray] | None = None,
) -> dict[str, RewardHistory]:
    """Moments of every user's rewards, by the row of the history that they went to.

    Args:
        rollouts: units of work in any order; a unit that comes twice (same split and index) counts once, only training units count.
        num_rows: K.
        rewards: unit -> [N] or [N, C] float, the rewards as they entered the histories; None = as recorded.
        weights: unit -> [N] float, what each counted for; rewards of weight 0 count nowhere; None = 1.

    Returns:
        user_id -> moments [K] (or [C, K]) on the host, count int32, the rest float64; sorted by user.

    Raises:
        ValueError: a prompt has no user, or names a row outside [0, K).
    """
    found: dict[str, list[tuple[int, np.ndarray, float]]] = {}
    seen: set[tuple[str, int]] = set()
    num_components: int | None = None
    for unit in rollouts:
        if unit.work.split != "train" or (unit.work.split, unit.work.index) in seen:
            continue
        seen.add((unit.work.split, unit.work.index))
        values = np.asarray(unit.rewards if rewards is None else rewards(unit), np.float64)
        counted = np.ones(len(values)) if weights is None else np.asarray(weights(unit), np.float64)
        num_components = values.shape[1] if values.ndim == 2 else None
        for prompt, value, weight in zip(unit.prompt_index.tolist(), values, counted, strict=True):
            user, row = _whose(unit, prompt, num_rows)
            if weight > 0:
                found.setdefault(user, []).append((row, value, weight))
    return {user: _moments(found[user], num_rows, num_components) for user in sorted(found)}


def _whose(unit: Rollouts, prompt: int, num_rows: int) -> tuple[str, int]:
    record = unit.prompt_records[prompt]
    if not record.user_id:
        raise ValueError(
            f"prompt {record.prompt_id} of work unit {unit.work.index} has no user_id: its rewards can not be told from other users'; "
            "use rollouts of a task that knows its users"
        )
    if not 0 <= record.history_row < num_rows:
        raise ValueError(f"prompt {record.prompt_id} names row {record.history_row} of the history, outside [0, {num_rows}): give all its rows")
    return record.user_id, record.history_row


def _moments(parts: list[tuple[int, np.ndarray, float]], num_rows: int, num_components: int | None) -> RewardHistory:
    """Closed form, in float64: of what one user earned."""
    rows = np.array([row for row, _, _ in parts])
    weights = np.array([weight for _, _, weight in parts])
    values = np.stack([value for _, value, _ in parts]).reshape(len(parts), -1)  # [n, C or 1]
    count, weight = np.zeros(num_rows, np.int32), np.ones(num_rows)
    mean, m2 = np.zeros((2, values.shape[1], num_rows))
    for row in np.unique(rows):
        of_row, mine = weights[rows == row], values[rows == row]
        count[row], weight[row] = len(of_row), of_row.mean()
        mean[:, row] = of_row @ mine / of_row.sum()
        m2[:, row] = of_row @ (mine - mean[:, row]) ** 2
    spread = [np.broadcast_to(x, mean.shape).copy() for x in (count, weight)]
    leaves = (*spread, mean, m2) if num_components is not None else (count, weight, mean[0], m2[0])
    return RewardHistory(**dict(zip(_LEAVES, leaves, strict=True)))


def total(parts: Iterable[RewardHistory], like: RewardHistory) -> RewardHistory:
    """Moments of several users together, in float64: mean = Σ n μ / Σ n, m2 = Σ m2 + Σ n (μ − mean)², n the effective counts.

    Args:
        parts: of `contributions`.
        like: moments of the shape of the result; its values do not matter.
    """
    parts = list(parts)
    count, weight, mean, m2 = (
        np.stack([np.zeros(np.shape(like.mean)), *(np.asarray(getattr(part, name), np.float64) for part in parts)]) for name in _LEAVES
    )
    effective = count * weight
    known, number = effective.sum(axis=0), count.sum(axis=0)
    centre = (effective * mean).sum(axis=0) / np.where(known > 0, known, 1)
    return RewardHistory(
        count=np.minimum(number, 2**31 - 1).astype(np.int32),
        weight=np.where(number > 0, known / np.where(number > 0, number, 1), 1.0),
        mean=centre,
        m2=m2.sum(axis=0) + (effective * (mean - centre) ** 2).sum(axis=0),
    )


def without_user(history: RewardHistory, contribution: RewardHistory) -> RewardHistory:
    """A cumulative history as if one user's rewards had never been seen, by the down-date of `reward_history.remove`.

    Args:
        history: [K] or [C, K], on the host.
        contribution: the user's, of `contributions`, from all rollouts that the history was made of.

    Returns:
        The history, in its own dtype.

    Raises:
        ValueError: the user has more rewards than the history.
    """
    part = as_dtype(contribution, history.mean.dtype)
    if np.ndim(history.count) == 1:
        return reward_history.remove(history, part)
    apart = [
        reward_history.remove(_component(history, c), _component(part, c)) for c in range(np.shape(history.count)[0])
    ]  # fmt: skip
    return RewardHistory(**{name: np.stack([getattr(one, name) for one in apart]) for name in _LEAVES})


def _component(history: RewardHistory, c: int) -> RewardHistory:
    return RewardHistory(**{name: np.asarray(getattr(history, name))[c] for name in _LEAVES})


def as_dtype(history: RewardHistory, dtype: np.dtype) -> RewardHistory:
    """Returns moments with their floats in another dtype, on the host."""
    floats = {name: np.asarray(getattr(history, name)).astype(dtype) for name in ("weight", "mean", "m2")}
    return RewardHistory(count=np.asarray(history.count, np.int32), **floats)


def migrate(parts: Mapping[str, RewardHistory], new_rows: Mapping[str, int], num_rows: int) -> RewardHistory:
    """The cumulative histories under another assignment of the users: what they would be had it held from the start.

    Args:
        parts: user_id -> contribution.
        new_rows: user_id -> new row, for every user with a contribution.
        num_rows: new K.

    Returns:
        Moments [K] or [C, K], float64, on the host.

    Raises:
        ValueError: a user has no new row, or one outside [0, K); or there are no contributions.
    """
    if not parts:
        raise ValueError("0 users have a contribution, at least 1 is needed: give the rollouts that the histories were made of")
    for user in parts:
        if not 0 <= new_rows.get(user, -1) < num_rows:
            raise ValueError(f"user {user} has new row {new_rows.get(user)}, it must be in [0, {num_rows}): assign every user who has rewards")
    shape = next(iter(parts.values())).mean.shape[:-1]
    empty = RewardHistory(**{name: np.zeros((*shape, 1)) for name in _LEAVES})
    columns = []
    for row in range(num_rows):
        mine = [_column(part, k) for user, part in sorted(parts.items()) if new_rows[user] == row for k in range(part.mean.shape[-1])]
        columns.append(total(mine, empty))
    return RewardHistory(**{name: np.concatenate([getattr(c, name) for c in columns], axis=-1) for name in _LEAVES})


def _column(history: RewardHistory, k: int) -> RewardHistory:
    return RewardHistory(**{name: np.asarray(getattr(history, name))[..., k : k + 1] for name in _LEAVES})
