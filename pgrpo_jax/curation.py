"""Floor 1: which of a step's prompts and completions are trained on, and what an answer that ran too long is worth. On the host.

A step consumes `oversample` × P prompts, always as many: nothing is drawn again, so the schedule of work stays fixed and a lost unit is
simply made anew. All rewards enter the histories; the first P *informative* prompts in canonical order fill the fixed-shape batch, and
where there are fewer, what is left of it is masked (DAPO, arXiv:2503.14476, §3.2, draws until a batch is full, which no schedule can foresee).

Letters: Q prompts that a step consumes, P prompts of a batch, N = Q × G completions.
"""

import dataclasses
from typing import Sequence

import numpy as np

from pgrpo_jax import batching
from pgrpo_jax.structs import Rollouts, TrainBatch

SELECT = ("any", "raw", "information")


@dataclasses.dataclass(frozen=True)
class Curation:
    """What is trained on.

    Attributes:
        prompts_per_step: P, prompts of a batch.
        select: which prompts are informative: "any"; "raw", those whose completions differ in the raw metric (DAPO's rule); "information", those
            with an advantage of at least `min_information`: under P-GRPO a prompt whose completions all earn the same still says something
            where its preference group is used to more or to less.
        metric: of "raw": "reward", or the name of a reward component. Never the shaped reward, which differs by length alone.
        min_information: of "information": the smallest |advantage| that counts.
        max_new_tokens: the longest completion, tokens.
        overlong_buffer: tokens before the limit over which the penalty rises; 0 = off (DAPO, §3.4, eq. 13).
        overlong_penalty: reward taken off a completion at the limit.
        mask_truncated: completions that ran out of tokens are not trained on.
    """

    prompts_per_step: int
    select: str = "any"
    metric: str = "reward"
    min_information: float = 1e-3
    max_new_tokens: int = 1
    overlong_buffer: int = 0
    overlong_penalty: float = 1.0
    mask_truncated: bool = False


@dataclasses.dataclass(frozen=True)
class Signals:
    """What the estimator needs beside the batch, a row for each of its N rows; rows that only pad hold 0.

    Attributes:
        rewards: [N] float32 shaped totals, or [N, C] components.
        raw: [N] float32, the raw metric.
        history_ids: [N] int32, rows of the reward history.
        staleness: [N] int32, updates since the weights that generated the completion.
        truncated: [N] bool, ran out of tokens.
    """

    rewards: np.ndarray
    raw: np.ndarray
    history_ids: np.ndarray
    staleness: np.ndarray
    truncated: np.ndarray


def signals(
    rollouts: Sequence[Rollouts], batch: TrainBatch, curation: Curation, *, step: int, components: Sequence[str] = ()
) -> Signals:
    """Collects the signals of a step.

    Args:
        rollouts: of the step, in canonical order.
        batch: of `batching.to_train_batch`, of the same rollouts.
        curation: what is trained on.
        step: updates done.
        components: names of the reward components that are standardised apart; none = the total.

    Returns:
        `Signals`. An overlong penalty is taken off the total, and off every component where there are components.

    Raises:
        ValueError: a component is not one of the task's.
    """
    per_prompt = len(batch.rewards) // len(batch.prompts)
    order = batching.completion_rows(rollouts, completions_per_prompt=per_prompt)

    def rows(of: object) -> np.ndarray:
        joined = np.concatenate([np.asarray(of(r)) for r in rollouts])
        table = np.zeros((len(batch.rewards), *joined.shape[1:]), joined.dtype)
        table[order] = joined
        return table

    def metric(name: str) -> np.ndarray:
        return batch.rewards if name == "reward" else rows(lambda r: _component(r, name))

    rewards = np.stack([metric(name) for name in components], axis=1) if components else batch.rewards
    penalty = overlong_penalty(batch.completion_mask.sum(axis=1), curation)
    history_ids = np.array([p.history_row for r in rollouts for p in r.prompt_records], np.int32)
    return Signals(
        rewards=(rewards - (penalty[:, None] if components else penalty)).astype(np.float32),
        raw=metric(curation.metric),
        history_ids=history_ids[batch.prompt_index],
        staleness=rows(lambda r: np.full(len(r.rewards), step - r.work.version, np.int32)),
        truncated=rows(lambda r: r.truncated),
    )


def _component(rollouts: Rollouts, name: str) -> np.ndarray:
    if name not in rollouts.reward_components:
        known = ", ".join(sorted(rollouts.reward_components))
        raise ValueError(f"the rewards have no component {name!r}, they have {known}: name one of these in algorithm.components or curation.metric")
    return rollouts.reward_components[name]


def overlong_penalty(lengths: np.ndarray, curation: Curation) -> np.ndarray:
    """Soft punishment of answers near the limit (DAPO, arXiv:2503.14476, eq. 13), in tokens.

    Args:
        lengths: [N] int, tokens of each completion, stop token included.
        curation: limit, buffer and penalty.

    Returns:
        [N] float64: 0 up to `max_new_tokens − overlong_buffer` tokens, rising to `overlong_penalty` at the limit.
    """
    if curation.overlong_buffer == 0:
        return np.zeros(len(lengths))
    over = lengths - (curation.max_new_tokens - curation.overlong_buffer)
    return curation.overlong_penalty * np.clip(over / curation.overlong_buffer, 0.0, 1.0)


def informative(curation: Curation, batch: TrainBatch, raw: np.ndarray, advantages: np.ndarray) -> np.ndarray:
    """Finds the prompts that are worth a place in the batch.

    Args:
        curation: the rule.
        batch: flat, on the host.
        raw: [N] float, the raw metric.
        advantages: [N] float.

    Returns:
        [Q] bool. Under "any" every prompt, also one without completions.
    """
    num_prompts = len(batch.prompts)
    if curation.select == "any":
        return np.ones(num_prompts, bool)
    per_prompt = batch.valid.reshape(num_prompts, -1)
    if curation.select == "information":
        return ((np.abs(advantages).reshape(num_prompts, -1) >= curation.min_information) & per_prompt).any(axis=1)
    values = raw.reshape(num_prompts, -1).astype(np.float64)
    return np.where(per_prompt, values, -np.inf).max(axis=1) > np.where(per_prompt, values, np.inf).min(axis=1)


def choose(wanted: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Fills a batch with the first informative prompts.

    Args:
        wanted: [Q] bool, informative prompts.
        count: P, at most Q.

    Returns:
        ([P] int64, rising, prompts of the batch; [P] bool, False on those that only fill its shape).
    """
    chosen = np.flatnonzero(wanted)[:count]
    fill = np.setdiff1d(np.arange(len(wanted)), np.flatnonzero(wanted))[: count - len(chosen)]
    places = np.sort(np.concatenate([chosen, fill]))
    return places, wanted[places]


def train_on(batch: TrainBatch, signal: Signals, advantages: np.ndarray, curation: Curation) -> tuple[TrainBatch, np.ndarray, float]:
    """Makes the batch of the update from all that a step consumed.

    Args:
        batch: flat, Q prompts, on the host.
        signal: of the same rows.
        advantages: [N] float.
        curation: what is trained on.

    Returns:
        (batch of P prompts, where rows that are not trained on are not `valid`; their advantages, 0 where not valid; the share of
        the Q prompts that are informative).
    """
    wanted = informative(curation, batch, signal.raw, advantages)
    places, kept = choose(wanted, curation.prompts_per_step)
    smaller, rows = batching.take_prompts(batch, places)
    trained = np.repeat(kept, len(rows) // len(places))
    if curation.mask_truncated:
        trained &= ~signal.truncated[rows]
    smaller = smaller.replace(valid=smaller.valid & trained)
    return smaller, np.where(smaller.valid, advantages[rows], 0).astype(advantages.dtype), float(wanted.mean())
