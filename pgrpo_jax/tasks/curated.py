"""Which training prompts are asked, and in what order: pre-filter by difficulty, curriculum, and steps with a floor for small preference groups.

All of it is decided before the run, so the stream stays what every stream here is: a function of the position alone, read by random access.
It is made of *strata*, each with an endless stream of epochs of its own, dealt out by `mixture.locate` in fixed counts: a task alone is one
stratum, a mixture has one for each task (counts = weights), and with a floor each preference group is one (counts = its prompts of a step).
The held-out stream is the task's own.
"""

import dataclasses
from fractions import Fraction
import math
from typing import Mapping, NamedTuple, Sequence

import numpy as np

from pgrpo_jax.structs import Prompt, Reward
from pgrpo_jax.tasks import Task, mixture, streams
from pgrpo_jax.tasks.difficulty import Estimate

ORDERS = ("shuffled", "easy_first", "hard_first")


class Stratum(NamedTuple):
    """Prompts with an endless stream of epochs of their own.

    Attributes:
        name: of its random numbers.
        prompts: in ascending order of their ids.
    """

    name: str
    prompts: tuple[Prompt, ...]


@dataclasses.dataclass(frozen=True)
class Curated:
    """A task with another stream of training prompts; see `pgrpo_jax.tasks.Task` for the methods, which are otherwise the task's own.

    Attributes:
        task: the task.
        seed: of the run.
        order: of an epoch, one of ORDERS.
        strata: where prompts come from.
        counts: prompts of each stratum among sum(counts) consecutive ones.
        means: prompt_id -> estimated mean reward, for the curriculum.
    """

    task: Task
    seed: int
    order: str
    strata: tuple[Stratum, ...]
    counts: tuple[int, ...]
    means: Mapping[str, float]

    @property
    def parts(self) -> tuple[Task, ...]:
        """The tasks it is made of, for `mixture.parts`: with all their prompts."""
        return mixture.parts(self.task)

    @property
    def num_preference_groups(self) -> int:
        """K of the task."""
        return self.task.num_preference_groups

    @property
    def preference_group_names(self) -> tuple[str, ...]:
        """The task's K descriptions."""
        return self.task.preference_group_names

    @property
    def reward_components(self) -> tuple[str, ...]:
        """The task's names."""
        return self.task.reward_components

    def num_prompts(self, split: str) -> int:
        """Returns the number of different prompts of a split, "train" (those that are kept) or "test"."""
        return sum(len(stratum.prompts) for stratum in self.strata) if split == "train" else self.task.num_prompts(split)

    def prompts(self, split: str, batch_index: int, batch_size: int) -> tuple[Prompt, ...]:
        """Returns prompts `batch_index * batch_size` onwards of the split's endless stream.

        Args:
            split: "train" or "test".
            batch_index: at least 0.
            batch_size: at least 1.

        Raises:
            ValueError: an argument is outside its range.
        """
        if split != "train":
            return self.task.prompts(split, batch_index, batch_size)
        found, orders = [], {}
        for position in streams.batch_range(batch_index, batch_size):
            index, place = mixture.locate(position, self.counts)
            stratum = self.strata[index]
            epoch, place = divmod(place, len(stratum.prompts))
            if (index, epoch) not in orders:
                orders[index, epoch] = epoch_order(stratum, self.means, seed=self.seed, epoch=epoch, order=self.order)
            found.append(stratum.prompts[orders[index, epoch][place]])
        return tuple(found)

    def reward(self, prompt: Prompt, answer: str) -> Reward:
        """Judges an answer as the task does."""
        return self.task.reward(prompt, answer)

    def choice(self, prompt: Prompt, answer: str) -> int | None:
        """Returns the index of the candidate that an answer names, as the task sees it."""
        return self.task.choice(prompt, answer)

    def baselines(self, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        """Returns what answers without a policy earn: "random" and "popular", [P] float64."""
        return self.task.baselines(prompts)


def curated(
    task: Task,
    *,
    seed: int,
    prompts_per_step: int,
    difficulty: Mapping[str, Estimate] | None = None,
    min_mean: float = -math.inf,
    max_mean: float = math.inf,
    min_std: float = 0.0,
    keep_unknown: bool = True,
    order: str = "shuffled",
    strata_floor: int = 0,
) -> Task:
    """Curates the training prompts of a task.

    Args:
        task: a task or a mixture, in its arm.
        seed: of the run.
        prompts_per_step: prompts that one update consumes.
        difficulty: prompt_id -> estimate, as `difficulty.read` gives them.
        min_mean, max_mean: a prompt is kept where its estimated mean reward lies between, bounds included: what is hopeless or solved teaches
            nothing that GRPO could see.
        min_std: reward; a prompt is kept where its estimated deviation is at least this.
        keep_unknown: whether prompts without an estimate are kept.
        order: of an epoch: "shuffled"; "easy_first" or "hard_first", by estimated mean reward, ties and prompts without an estimate
            in the epoch's shuffled order, the latter spread evenly over it.
        strata_floor: prompts of every preference group that has any in every `prompts_per_step` prompts in a row; the others are dealt out by
            natural share (largest remainder). 0 leaves the proportions as they are.

    Returns:
        The task itself where nothing is asked for.

    Raises:
        ValueError: an argument is outside its range, estimates are missing, or too few prompts remain; numbers and remedy are named.
    """
    streams.check_seed(seed)
    _check(prompts_per_step, min_mean, max_mean, min_std, order, strata_floor)
    filters = (min_mean, max_mean, min_std, keep_unknown) != (-math.inf, math.inf, 0.0, True)
    if not filters and order == "shuffled" and not strata_floor:
        return task
    sources = mixture.training_prompts(task)
    estimates = difficulty or {}
    if filters or order != "shuffled":
        _check_estimates(sources, estimates)
    kept = []
    for weight, prompts in sources:
        chosen = (p for p in prompts if _keeps(estimates.get(p.prompt_id), min_mean, max_mean, min_std, keep_unknown))
        kept.append((weight, tuple(sorted(chosen, key=lambda p: p.prompt_id))))
    _check_remaining(sources, kept, prompts_per_step, f"{min_mean:g} <= mean <= {max_mean:g}, std >= {min_std:g}")
    strata = [Stratum(f"task {index}", prompts) for index, (_, prompts) in enumerate(kept)]
    counts = tuple(weight for weight, _ in kept)
    if strata_floor:
        strata, shares = _by_preference_group(kept)
        counts = quotas(shares, floor=strata_floor, total=prompts_per_step)
        _check_strata(strata, counts, task.preference_group_names)
    return Curated(task, seed, order, tuple(strata), counts, {name: estimate.mean for name, estimate in estimates.items()})


def quotas(shares: Sequence[Fraction], *, floor: int, total: int) -> tuple[int, ...]:
    """Divides the prompts of a step: `floor` for each, the rest by share, rounded by largest remainder (Hamilton's method).

    Args:
        shares: of each stratum, in any unit, above 0.
        floor: prompts that each gets, at least 0.
        total: prompts to divide.

    Returns:
        Prompts of each, adding up to `total`; of equal remainders the first stratum's is rounded up.

    Raises:
        ValueError: the floor asks for more than there is.
    """
    rest = total - floor * len(shares)
    if rest < 0:
        raise ValueError(
            f"strata_floor = {floor} asks for {floor * len(shares)} prompts for {len(shares)} preference groups, more than the "
            f"{total} of a step: lower it to {total // len(shares)} or take more prompts for each step"
        )
    exact = [rest * Fraction(share) / sum(shares) for share in shares]
    whole = [math.floor(part) for part in exact]
    first = sorted(range(len(shares)), key=lambda i: whole[i] - exact[i])[: rest - sum(whole)]
    return tuple(floor + part + (i in first) for i, part in enumerate(whole))


def epoch_order(stratum: Stratum, means: Mapping[str, float], *, seed: int, epoch: int, order: str) -> list[int]:
    """Returns the order in which one epoch of a stratum asks its prompts: a permutation of their indices.

    Args:
        stratum: the prompts.
        means: prompt_id -> estimated mean reward.
        seed: of the run.
        epoch: from 0; another one shuffles anew.
        order: one of ORDERS.
    """
    size = len(stratum.prompts)
    shuffled = streams.named_stream(seed, f"curated, {stratum.name}, epoch {epoch}").permutation(size).tolist()
    if order == "shuffled":
        return shuffled
    sign = -1.0 if order == "easy_first" else 1.0
    known = {i: sign * means[stratum.prompts[i].prompt_id] for i in shuffled if stratum.prompts[i].prompt_id in means}
    dealt = (sorted(known, key=known.__getitem__), [i for i in shuffled if i not in known])
    return [dealt[kind][place] for kind, place in (mixture.locate(p, (len(known), size - len(known))) for p in range(size))]


def _keeps(estimate: Estimate | None, min_mean: float, max_mean: float, min_std: float, keep_unknown: bool) -> bool:
    return keep_unknown if estimate is None else min_mean <= estimate.mean <= max_mean and estimate.std >= min_std


def _by_preference_group(kept: Sequence[tuple[int, Sequence[Prompt]]]) -> tuple[list[Stratum], list[Fraction]]:
    """The strata and their shares of the stream without a floor; a preference group without training prompts is none."""
    found: dict[int, list[Prompt]] = {}
    shares: dict[int, Fraction] = {}
    for weight, prompts in kept:
        for prompt in prompts:
            found.setdefault(prompt.preference_id, []).append(prompt)
            shares[prompt.preference_id] = shares.get(prompt.preference_id, Fraction(0)) + Fraction(weight, len(prompts))
    ids = sorted(found)
    return [Stratum(f"preference group {k}", tuple(found[k])) for k in ids], [shares[k] for k in ids]


def _check(prompts_per_step: int, min_mean: float, max_mean: float, min_std: float, order: str, strata_floor: int) -> None:
    if prompts_per_step < 1:
        raise ValueError(f"prompts_per_step = {prompts_per_step} is below 1: give the prompts of one update")
    if not min_mean <= max_mean:  # NaN as well
        raise ValueError(f"min_mean = {min_mean} and max_mean = {max_mean} leave nothing between: give bounds in ascending order")
    if not 0 <= min_std < math.inf:
        raise ValueError(f"min_std = {min_std} is outside [0, inf): give a deviation in units of the reward")
    if order not in ORDERS:
        raise ValueError(f"order = {order!r} is unknown: use one of {', '.join(ORDERS)}")
    if strata_floor < 0:
        raise ValueError(f"strata_floor = {strata_floor} is below 0: give prompts for each preference group and step, 0 for no floor")


def _check_estimates(sources: Sequence[tuple[int, Sequence[Prompt]]], estimates: Mapping[str, Estimate]) -> None:
    if not any(prompt.prompt_id in estimates for _, prompts in sources for prompt in prompts):
        raise ValueError(
            f"a pre-filter or a curriculum needs estimates of difficulty, and of the {len(estimates)} given none is of a training prompt: "
            "measure them on this task and seed, or ask for neither"
        )


def _check_remaining(
    sources: Sequence[tuple[int, Sequence[Prompt]]], kept: Sequence[tuple[int, Sequence[Prompt]]], needed: int, bounds: str
) -> None:
    before, after = (sum(len(prompts) for _, prompts in parts) for parts in (sources, kept))
    if after < needed:
        raise ValueError(f"{bounds} keeps {after} of {before} training prompts, fewer than the {needed} of one step: widen the bounds")
    if not all(prompts for _, prompts in kept):
        raise ValueError(f"{bounds} keeps {after} of {before} training prompts, but none of one task of the mixture: widen the bounds")


def _check_strata(strata: Sequence[Stratum], counts: Sequence[int], names: Sequence[str]) -> None:
    for stratum, count in zip(strata, counts, strict=True):
        if len(stratum.prompts) < count:
            name = names[stratum.prompts[0].preference_id]
            raise ValueError(
                f"preference group {name!r} has {len(stratum.prompts)} training prompts, fewer than its {count} of a step: "
                "lower strata_floor, or a step would ask a prompt twice"
            )
