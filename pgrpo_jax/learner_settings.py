"""Sizes and constants of the learner."""

import dataclasses

from pgrpo_jax.algorithms.preference_weights import PreferenceWeights
from pgrpo_jax.curation import Curation
from pgrpo_jax.kl_control import KLControl
from pgrpo_jax.optimiser import OptimiserSettings
from pgrpo_jax.schedule import Schedule
from pgrpo_jax.update import LossSettings

PROXIMAL = ("generator", "current")


@dataclasses.dataclass(frozen=True)
class LearnerSettings:
    """Sizes and constants of the learner; see configs/base.py.

    Attributes:
        num_steps: updates in the run.
        schedule: which weight versions later steps need.
        num_preference_groups: K.
        completions_per_prompt: G.
        micro_batches: slices of whole prompts for gradient accumulation, at least.
        micro_batch_tokens: tokens of a slice on each device at most (`batching.num_slices`); 0 = no bound.
        packing: short completions of a prompt are computed in one row.
        passes_per_batch: optimiser steps made from one batch.
        pad_id: token id of padding.
        loss: objective and sampling support.
        optimiser: AdamW and its schedule.
        weights_dtype: of weight versions, "float32" or "bfloat16"; the state itself is float32.
        curation: which prompts and completions are trained on.
        oversample: prompts that a step consumes, as a multiple of those of a batch.
        components: names of the reward components that are standardised apart; none = the total.
        preference_weights: how much each preference group weighs in the loss.
        kl: how the KL to the reference is held.
        proximal: the old policy of the ratio: "generator", the weights that generated the batch, or "current", those before the update
            (decoupled PPO, AReaL, arXiv:2505.24298).
        gradients_every: updates between two measurements of each preference group's gradient; 0 = never.
        dump_batches: updates whose batch is written beside the checkpoints, in batches/.
    """

    num_steps: int
    schedule: Schedule
    num_preference_groups: int
    completions_per_prompt: int
    micro_batches: int
    passes_per_batch: int
    pad_id: int
    loss: LossSettings
    optimiser: OptimiserSettings
    weights_dtype: str
    curation: Curation
    oversample: int = 1
    components: tuple[str, ...] = ()
    preference_weights: PreferenceWeights = PreferenceWeights()
    kl: KLControl = KLControl()
    proximal: str = "current"
    gradients_every: int = 0
    dump_batches: tuple[int, ...] = ()
    micro_batch_tokens: int = 0
    packing: bool = False
