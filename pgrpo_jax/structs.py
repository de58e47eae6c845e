"""Floor 0: the records that cross a boundary, and the letters their shapes are written in.

    P  prompts in a batch                    G  completions_per_prompt
    N  completions in a batch (P x G)        K  num_preference_groups
    Tp padded prompt length, tokens          Tc padded completion length, tokens
    L  layers      D  model width            V  vocabulary size

Sequences are padded on the right. Host records (`Prompt`, `Work`, `Rollouts`) hold NumPy arrays and text; device records
(`TrainBatch`, `RewardHistory`, `TrainState`) are pytrees.
"""

import dataclasses
from typing import Any, Mapping

import chex
import numpy as np


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One question of one user.

    Attributes:
        prompt_id: unique name of the prompt within its task, stable over runs.
        text: the user's message, before the chat template.
        preference_id: the user's preference group, in [0, K).
        facts: what the task's reward needs to judge an answer (JSON-serialisable; never shown to the policy).
        user_id: pseudonym of the user, for whom rewards can be taken out of the histories again; "" where the task knows no users.
        history_id: the row of the reward history that the prompt's rewards are compared with and go to; None = `preference_id`. The
            control arms "pooled" and "placebo" (algorithm.arm) set it; what is reported stays by `preference_id`.
    """

    prompt_id: str
    text: str
    preference_id: int
    facts: Mapping[str, Any]
    user_id: str = ""
    history_id: int | None = None

    @property
    def history_row(self) -> int:
        """The row of the reward history of this prompt."""
        return self.preference_id if self.history_id is None else self.history_id


@dataclasses.dataclass(frozen=True)
class Reward:
    """The verdict on one answer.

    Attributes:
        total: the scalar that is trained on.
        components: named parts that explain it, for example {"answered": 1.0, "rating": 0.8}.
    """

    total: float
    components: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class RewardFailure:
    """A reward function that gave no verdict on one answer, and what was made of it instead.

    Attributes:
        row: the completion's place among the N of its unit of work, before any is dropped.
        reason: what happened, for people: "timeout after 30 s", "ZeroDivisionError: …", "reward nan is not finite".
        policy: "zero" (the answer counts with reward 0) or "drop" (the completion is left out).
    """

    row: int
    reason: str
    policy: str


@dataclasses.dataclass(frozen=True)
class Work:
    """One unit of generation: a fixed-shape slice of the prompt stream, and the weights that must answer it.

    A rollout is a pure function of (weights, work): seeds derive from `split` and `index`, so lost work is simply issued
    again.

    Attributes:
        index: position in the stream of work units; prompts `index * prompts_per_work` onwards.
        step: the learner step (updates done before it) that will consume the unit; under the policy "freshest" the step it was
            issued at.
        version: the weight version that must generate it (the learner step that published it).
        split: the task's split, "train" or "test".
        failed_rewards: verdicts on record from an earlier attempt at this unit; they are repeated, not judged again.
    """

    index: int
    step: int
    version: int
    split: str = "train"
    failed_rewards: tuple[RewardFailure, ...] = ()


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """What an actor returns for one `Work`: completions with their log-probs and rewards, tagged with a weight version.

    Attributes:
        work: the unit that was generated.
        prompt_records: the P prompts, in canonical order.
        prompts: [P, Tp] int32, token ids.
        prompt_lengths: [P] int32, tokens.
        completions: [N, Tc] int32, token ids as sampled; the stop token, where there is one, is part of the completion.
        completion_lengths: [N] int32, tokens, stop token included.
        prompt_index: [N] int32, the row of `prompts` that each completion answers.
        behaviour_log_probs: [N, Tc] float32, log-prob of each sampled token under the sampling distribution; 0 on padding.
        truncated: [N] bool, True where the completion ran out of tokens before a stop token.
        texts: N decoded answers, special tokens left out.
        rewards: [N] float32.
        reward_components: name -> [N] float32.
        reward_failures: completions whose reward function failed; those under "drop" are not among the N.
        generation_secs: wall seconds spent generating (not part of the record's identity).
    """

    work: Work
    prompt_records: tuple[Prompt, ...]
    prompts: np.ndarray
    prompt_lengths: np.ndarray
    completions: np.ndarray
    completion_lengths: np.ndarray
    prompt_index: np.ndarray
    behaviour_log_probs: np.ndarray
    truncated: np.ndarray
    texts: tuple[str, ...]
    rewards: np.ndarray
    reward_components: Mapping[str, np.ndarray]
    reward_failures: tuple[RewardFailure, ...] = ()
    generation_secs: float = 0.0


@chex.dataclass(frozen=True, mappable_dataclass=False)
class TrainBatch:
    """What the learner trains on: prompts and completions apart, so that a prompt is computed once for all its completions.

    Attributes:
        prompts: [P, Tp] int32.
        prompt_lengths: [P] int32, tokens.
        preference_ids: [P] int32, in [0, K).
        completions: [N, Tc] int32.
        completion_mask: [N, Tc] bool, True on sampled tokens (stop token included).
        prompt_index: [N] int32, in [0, P).
        behaviour_log_probs: [N, Tc] float32.
        rewards: [N] float32.
        valid: [N] bool, False on rows that only pad the batch.
        packing: [P, R, C] int32, the R rows of C tokens that the model computes for each prompt in place of one a completion: at every place
            g * Tc + t, token t of the prompt's g-th completion, or -1; a completion's tokens lie together, in order. None: nothing is packed.
    """

    prompts: chex.Array
    prompt_lengths: chex.Array
    preference_ids: chex.Array
    completions: chex.Array
    completion_mask: chex.Array
    prompt_index: chex.Array
    behaviour_log_probs: chex.Array
    rewards: chex.Array
    valid: chex.Array
    packing: chex.Array | None = None


@chex.dataclass(frozen=True, mappable_dataclass=False)
class RewardHistory:
    """Running moments of past rewards, one row for each preference group (Welford 1962; P-GRPO, arXiv:2603.10009).

    Axes before K: [W] slots where the memory is a window, and before them [C] where reward components are kept apart.

    Attributes:
        count: [K] int32, rewards seen (float32 would stop counting at 2**24).
        weight: [K] float, mean weight of these rewards, exactly 1 where none was discounted; count · weight is what they count for.
        mean: [K] float, weighted mean reward.
        m2: [K] float, weighted sum of squared deviations from the mean.
    """

    count: chex.Array
    weight: chex.Array
    mean: chex.Array
    m2: chex.Array


@chex.dataclass(frozen=True, mappable_dataclass=False)
class TrainState:
    """Everything a resumed run needs; what is not in it is not state. Committed in one atomic checkpoint step.

    Attributes:
        step: int32 scalar, updates done.
        next_work: int32 scalar, index of the first work unit the next update consumes.
        trainable: the policy's parameters, a pytree of arrays.
        optimiser: optax state.
        history: statistics of the advantage estimator (`RewardHistory` for P-GRPO).
        objective: state of the objective (adaptive coefficients); empty where the objective has none.
    """

    step: chex.Array
    next_work: chex.Array
    trainable: Any
    optimiser: Any
    history: Any
    objective: Any


@dataclasses.dataclass(frozen=True)
class Started:
    """Event: an actor began a unit of work; its lease counts from here."""

    work: Work
    worker: str


@dataclasses.dataclass(frozen=True)
class Finished:
    """Event: an engine finished a unit of work."""

    rollouts: Rollouts


@dataclasses.dataclass(frozen=True)
class Lost:
    """Event: a unit of work will never finish (its actor is gone); it must be issued again."""

    work: Work
    reason: str


@dataclasses.dataclass(frozen=True)
class Tick:
    """Event: time passed since the tick before."""

    secs: float


Event = Started | Finished | Lost | Tick
