"""The learner role: rollouts → per-preference-group normalised advantages → update → weight versions and checkpoints."""

import dataclasses
import functools
from typing import Any, Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pgrpo_jax import batching, parallel
from pgrpo_jax.checkpoints import Checkpoints
from pgrpo_jax.controller import Schedule
from pgrpo_jax.models.transformer import Transformer
from pgrpo_jax.structs import Rollouts, TrainBatch, TrainState
from pgrpo_jax.update import ObjectiveSettings, OptimiserSettings, learning_rate, make_optimiser, score_slices, update


@dataclasses.dataclass(frozen=True)
class LearnerSettings:
    """Sizes and constants of the learner; see configs/base.py.

    Attributes:
        num_steps: updates in the run.
        schedule: which weight versions later steps need.
        num_preference_groups: K.
        completions_per_prompt: G.
        micro_batches: slices of whole prompts for gradient accumulation.
        passes_per_batch: optimiser steps made from one batch.
        pad_id: token id of padding.
        objective: clip range, KL coefficient, sampling support.
        optimiser: AdamW and its schedule.
    """

    num_steps: int
    schedule: Schedule
    num_preference_groups: int
    completions_per_prompt: int
    micro_batches: int
    passes_per_batch: int
    pad_id: int
    objective: ObjectiveSettings
    optimiser: OptimiserSettings


def initial_state(params: Any, history: Any, optimiser: OptimiserSettings) -> TrainState:
    """Returns the state before the first update; `params` are copied, since updates donate their input."""
    trainable, moments = _initialise(params, optimiser)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        next_work=jnp.zeros((), jnp.int32),
        trainable=trainable,
        optimiser=moments,
        history=history,
        objective={},
    )


# One program for all leaves, in these two: an eager copy would compile one for each shape.
@functools.partial(jax.jit, static_argnums=1)
def _initialise(params: Any, optimiser: OptimiserSettings) -> tuple[Any, Any]:
    copies = jax.tree.map(jnp.copy, params)
    return copies, make_optimiser(optimiser).init(copies)


@jax.jit
def _copy(params: Any) -> Any:
    return jax.tree.map(jnp.copy, params)


class Learner:
    """Holds the training state of this process.

    Args:
        model: the transformer, as the learner runs it.
        state: the initial state.
        advantage_kernel: jitted, pmapped (rewards, prompt_index, preference_ids, mask, history) → (advantages, history,
            diagnostics); see `parallel.advantage_kernel`.
        settings: sizes and constants.
        reference: parameters of the reference policy, or None where the KL coefficient is 0.
        devices: local devices the batch is split over.
        checkpoints: where the state is committed.
    """

    def __init__(
        self,
        model: Transformer,
        state: TrainState,
        *,
        advantage_kernel: Callable,
        settings: LearnerSettings,
        reference: Any | None,
        devices: Sequence[jax.Device],
        checkpoints: Checkpoints,
    ):
        self._model, self._settings, self._checkpoints = model, settings, checkpoints
        self._advantages = advantage_kernel
        self._learning_rate = jax.jit(learning_rate(settings.optimiser))
        self._mesh = parallel.data_mesh(devices)
        self._reference = None if reference is None else parallel.replicate(reference, self._mesh)
        self.state = parallel.replicate(state, self._mesh)
        self.step = int(state.step)
        self.versions: dict[int, Any] = {}
        self._offer_versions()

    def restore(self) -> bool:
        """Goes on from the newest committed checkpoint, if there is one; returns whether there was.

        Raises:
            CheckpointError: the checkpoint is corrupt or of another identity.
        """
        if self._checkpoints.latest_step() is None:
            return False
        self.state, self.versions = self._checkpoints.restore(self.state)
        self.step = int(self.state.step)
        self._offer_versions()
        return True

    def _offer_versions(self) -> None:
        """Keeps the weight versions that this and later steps are generated with; copies, because an update donates the state."""
        needed = self._settings.schedule.needed(self.step, self._settings.num_steps)
        if self.step in needed and self.step not in self.versions:
            self.versions[self.step] = _copy(self.state.trainable)
        self.versions = {v: weights for v, weights in self.versions.items() if v in needed}

    def update(self, rollouts: Sequence[Rollouts]) -> tuple[dict[str, float], np.ndarray]:
        """Trains on the rollouts of one step.

        Args:
            rollouts: of this step, in canonical order, all of one weight version.

        Returns:
            (metrics, advantages [N] of the completions in canonical order).

        Raises:
            ValueError: a reward is not finite, a preference id out of range or the weight version not the schedule's; the state
                is untouched.
            FloatingPointError: the loss or the gradient is not finite; the last checkpoint stays good.
        """
        s = self._settings
        batching.check(rollouts, num_preference_groups=s.num_preference_groups, version=s.schedule.version(self.step))
        flat = batching.to_train_batch(rollouts, completions_per_prompt=s.completions_per_prompt, pad_id=s.pad_id)
        advantages, history, diagnostics = self._advantages(
            flat.rewards, flat.prompt_index, flat.preference_ids[flat.prompt_index], flat.valid, self.state.history
        )
        batch = parallel.shard_rows(batching.micro_batches(flat, s.micro_batches), self._mesh, axis=1)
        sliced = parallel.shard_rows(np.asarray(advantages).reshape(s.micro_batches, -1), self._mesh, axis=1)
        old, reference = self._fixed_log_probs(batch, version=rollouts[0].work.version)

        for _ in range(s.passes_per_batch):
            self.state, scalars = update(self.state, self._model, s.objective, s.optimiser, batch, sliced, old, reference)
            scalars = jax.device_get(scalars)
            self._refuse_non_finite(scalars)
        self.step += 1
        counted = {"step": np.int32(self.step), "next_work": np.int32(rollouts[-1].work.index + 1), "history": history}
        self.state = self.state.replace(**parallel.replicate(counted, self._mesh))
        self._offer_versions()
        metrics = {"kl": float("nan")} | {name: float(value) for name, value in scalars.items()}  # without a reference: not measured
        metrics["staleness"] = float(self.step - 1 - rollouts[0].work.version)
        metrics["learning_rate"] = float(self._learning_rate(self.step * s.passes_per_batch - 1))
        rows = batching.completion_rows(rollouts, completions_per_prompt=s.completions_per_prompt)
        return metrics | describe(flat, np.asarray(advantages), jax.device_get(diagnostics)), np.asarray(advantages)[rows]

    def _fixed_log_probs(self, batch: TrainBatch, *, version: int) -> tuple[jax.Array | None, jax.Array | None]:
        """Log-probs of the old policy and of the reference, in the update's own layout; None where they are not needed.

        Strictly on-policy with one pass, the old policy is the stopped gradient of the policy itself.
        """
        support = self._settings.objective.support
        on_policy = version == self.step and self._settings.passes_per_batch == 1
        weights = self.state.trainable if version == self.step else self.versions[version]
        old = None if on_policy else score_slices(weights, self._model, support, batch)
        reference = None if self._reference is None else score_slices(self._reference, self._model, support, batch)
        return old, reference

    def _refuse_non_finite(self, scalars: dict[str, np.ndarray]) -> None:
        for name in ("loss", "grad_norm"):
            if not np.isfinite(scalars[name]):
                raise FloatingPointError(
                    f"{name} = {scalars[name]} at step {self.step + 1} is not finite: the last checkpoint is good; "
                    "lower optimiser.learning_rate or raise algorithm.std_floor and run again"
                )

    def save(self, *, wait: bool = False) -> None:
        """Commits the state, with the weight versions that later steps need, as one checkpoint; see `Checkpoints.save`."""
        others = {v: weights for v, weights in self.versions.items() if v != self.step}
        self._checkpoints.save(self.state, others, wait=wait)


def describe(batch: TrainBatch, advantages: np.ndarray, diagnostics: Any) -> dict[str, float]:
    """Returns the metrics of a batch that need no model: rewards, advantages and Corollary 3.1, by preference group where it counts.

    Args:
        batch: flat, on the host.
        advantages: [N].
        diagnostics: `advantages.Diagnostics` on the host.
    """
    rewards, kept = batch.rewards[batch.valid].astype(np.float64), advantages[batch.valid].astype(np.float64)
    by_prompt = [batch.rewards[(batch.prompt_index == p) & batch.valid] for p in range(len(batch.prompts))]
    counts = np.maximum(np.asarray(diagnostics.batch_count, np.float64), 0)
    share = counts / max(1.0, counts.sum())
    metrics = {
        "reward": rewards.mean(),
        "reward_std": rewards.std(),
        "advantage_mean": kept.mean(),
        "advantage_std": kept.std(),
        "advantage_scale": (share * diagnostics.advantage_scale).sum(),
        "advantage_bias": (share * diagnostics.bias).sum(),
        "dead_prompts": np.mean([len(r) == 0 or r.max() == r.min() for r in by_prompt]),
        "length": batch.completion_mask.sum(axis=1)[batch.valid].mean(),
    }
    for p in range(len(counts)):
        prefix = f"preference_group/{p}"
        metrics |= {
            f"{prefix}/reward": diagnostics.batch_mean[p] if counts[p] else np.nan,
            f"{prefix}/count": counts[p],
            f"{prefix}/advantage_scale": diagnostics.advantage_scale[p],
            f"{prefix}/bias": diagnostics.bias[p],
            f"{prefix}/history_count": diagnostics.history_count[p],
            f"{prefix}/history_mean": diagnostics.history_mean[p],
            f"{prefix}/history_std": diagnostics.history_std[p],
        }
    return {name: float(value) for name, value in metrics.items()}
