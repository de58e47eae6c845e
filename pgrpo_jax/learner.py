"""The learner role: rollouts → per-preference-group normalised advantages → update → weight versions and checkpoints."""

import dataclasses
import functools
from typing import Any, Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pgrpo_jax import batching, parallel
from pgrpo_jax.checkpoints import Checkpoints, state_sha256
from pgrpo_jax.models.transformer import Transformer
from pgrpo_jax.schedule import Schedule
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
        weights_dtype: of weight versions, "float32" or "bfloat16"; the state itself is float32.
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
    weights_dtype: str


def initial_state(params: Any, history: Any, optimiser: OptimiserSettings, mesh: Mesh) -> TrainState:
    """Returns the state before the first update, on its devices: no device ever holds more than its share.

    Args:
        params: the policy, from the host or this process's devices; the same in every process. Copied, since updates donate their input.
        history: before the first reward.
        optimiser: AdamW's settings.
        mesh: of `parallel.make_mesh`.
    """
    placed = parallel.place(params, parallel.layout(params, mesh))
    shardings = parallel.layout(jax.eval_shape(functools.partial(_start, optimiser=optimiser), placed), mesh)
    trainable, moments = parallel.compiled(_start, shardings, optimiser=optimiser)(placed)
    counted = {"step": np.int32(0), "next_work": np.int32(0), "history": history}
    return TrainState(trainable=trainable, optimiser=moments, objective={}, **parallel.replicate(counted, mesh))


# One program for all leaves, in these two: an eager copy would compile one for each shape.
def _start(params: Any, *, optimiser: OptimiserSettings) -> tuple[Any, Any]:
    copies = jax.tree.map(jnp.copy, params)
    return copies, make_optimiser(optimiser).init(copies)


def _copy(params: Any, *, dtype: str) -> Any:
    return jax.tree.map(lambda x: jnp.copy(x).astype(dtype), params)


class Learner:
    """Holds the training state, or this process's part of it: with several processes each has one of these, and all call the same methods
    with the same arguments in the same order.

    Args:
        model: the transformer, as the learner runs it.
        state: of `initial_state`.
        advantage_kernel: jitted, pmapped (rewards, prompt_index, preference_ids, mask, history) → (advantages, history,
            diagnostics); see `parallel.advantage_kernel`.
        settings: sizes and constants.
        reference: parameters of the reference policy, or None where the KL coefficient is 0.
        load_base: returns the parameters of the untrained policy, which are not kept.
        mesh: what the state lies on.
        checkpoints: where the state is committed.

    Attributes:
        state: the training state.
        step: updates done.
        next_work: index of the first work unit that a run resumed from here issues.
        versions: weight versions that may be generated with, in `weights_dtype`, laid out as the state; no update touches them.
        stopping: whether the devices are about to be taken away; never those of this process (see `engines.ray_learner.LearnerGang`).
        lost: whether it must be made again; never, where it lives in the process that asks.
    """

    stopping = lost = False

    def __init__(
        self,
        model: Transformer,
        state: TrainState,
        *,
        advantage_kernel: Callable,
        settings: LearnerSettings,
        reference: Any | None,
        load_base: Callable[[], Any],
        mesh: Mesh,
        checkpoints: Checkpoints,
    ):
        self._model, self._settings, self._checkpoints, self._mesh = model, settings, checkpoints, mesh
        self._advantages = parallel.over_processes(advantage_kernel, len({device.process_index for device in mesh.devices.flat}))
        self._learning_rate = jax.jit(learning_rate(settings.optimiser))
        self._load_base = load_base
        self._params_layout = parallel.layout(state.trainable, mesh)
        self._copy = parallel.compiled(_copy, self._params_layout, dtype=settings.weights_dtype)
        self._version_shapes = jax.tree.map(_shape, jax.eval_shape(self._copy, state.trainable), self._params_layout)
        self._reference = None if reference is None else parallel.place(reference, self._params_layout)
        self.state = state
        self.step, self.next_work = int(state.step), int(state.next_work)
        self.versions: dict[int, Any] = {}
        self._offer_versions()

    def restore(self) -> bool:
        """Goes on from the newest committed checkpoint, if there is one; returns whether there was.

        The state before it is let go first, so that the devices need not hold both: after an error the learner is of no more use.

        Raises:
            CheckpointError: the checkpoint is corrupt or of another identity.
        """
        if self._checkpoints.latest_step() is None:
            return False
        like = jax.tree.map(lambda x: _shape(x, x.sharding), self.state)
        self.state, self.versions = None, {}
        self.state, self.versions = self._checkpoints.restore(like, self._version_shapes)
        self.step, self.next_work = int(self.state.step), int(self.state.next_work)
        self._offer_versions()
        return True

    def _offer_versions(self) -> None:
        """Keeps the weight versions that this and later steps are generated with; copies, because an update donates the state."""
        needed = self._needed()
        if self.step in needed:
            self.offer(self.step)
        self.versions = {v: weights for v, weights in self.versions.items() if v in needed}

    def _needed(self) -> set[int]:
        """Versions for steps to come; after the last one, the trained policy itself, to be evaluated."""
        done = self.step >= self._settings.num_steps
        return {self.step} if done else set(self._settings.schedule.needed(self.step, self._settings.num_steps))

    def offer(self, version: int) -> None:
        """Makes a version one that may be generated with, until the next update.

        Args:
            version: one that is on offer already, the policy as it is now (`step`), or 0, the untrained policy, which is loaded again.

        Raises:
            ValueError: the version is another.
        """
        if version in self.versions:
            return
        if version not in (0, self.step):
            raise ValueError(
                f"weight version {version} is gone: version 0, the newest {self.step} and those that later steps need "
                f"({sorted(self.versions)}) can be offered"
            )
        current = version == self.step
        weights = self.state.trainable if current else parallel.place(self._load_base(), self._params_layout)
        self.versions = self.versions | {version: self._copy(weights)}

    def update(self, rollouts: Sequence[Rollouts], *, next_work: int | None = None) -> tuple[dict[str, float], np.ndarray]:
        """Trains on the rollouts of one step.

        Args:
            rollouts: of this step, in canonical order, all of one weight version unless the schedule takes the freshest. Prompts may
                have fewer completions than others, or none.
            next_work: first work unit that a run resumed after this update issues; None = the one after the last of `rollouts`.

        Returns:
            (metrics, advantages [N] of the completions in canonical order).

        Raises:
            ValueError: a reward is not finite, a preference id out of range or the weight version not the schedule's; the state
                is untouched.
            FloatingPointError: the loss or the gradient is not finite; the last checkpoint stays good.
        """
        s = self._settings
        expected = None if s.schedule.freshest else s.schedule.version(self.step)
        batching.check(rollouts, num_preference_groups=s.num_preference_groups, version=expected)
        flat = batching.to_train_batch(rollouts, completions_per_prompt=s.completions_per_prompt, pad_id=s.pad_id)
        advantages, history, diagnostics = self._advantages(
            flat.rewards, flat.prompt_index, flat.preference_ids[flat.prompt_index], flat.valid, self.state.history
        )
        batch = parallel.shard_rows(batching.micro_batches(flat, s.micro_batches), self._mesh, axis=1)
        sliced = parallel.shard_rows(np.asarray(advantages).reshape(s.micro_batches, -1), self._mesh, axis=1)
        old, reference = self._fixed_log_probs(batch, version=expected)

        for _ in range(s.passes_per_batch):
            self.state, scalars = update(self.state, self._model, s.objective, s.optimiser, batch, sliced, old, reference)
            scalars = jax.device_get(scalars)
            self._refuse_non_finite(scalars)
        staleness = np.mean([self.step - r.work.version for r in rollouts])
        self.step += 1
        self.next_work = rollouts[-1].work.index + 1 if next_work is None else next_work
        counted = {"step": np.int32(self.step), "next_work": np.int32(self.next_work), "history": history}
        self.state = self.state.replace(**parallel.replicate(counted, self._mesh))
        self._offer_versions()
        metrics = {"kl": float("nan")} | {name: float(value) for name, value in scalars.items()}  # without a reference: not measured
        metrics |= {"staleness": float(staleness), "learning_rate": float(self._learning_rate(self.step * s.passes_per_batch - 1))}
        rows = batching.completion_rows(rollouts, completions_per_prompt=s.completions_per_prompt)
        return metrics | describe(flat, np.asarray(advantages), jax.device_get(diagnostics)), np.asarray(advantages)[rows]

    def _fixed_log_probs(self, batch: TrainBatch, *, version: int | None) -> tuple[jax.Array | None, jax.Array | None]:
        """Log-probs of the old policy and of the reference, in the update's own layout; None where they are not needed.

        Strictly on-policy with one pass, the old policy is the stopped gradient of the policy itself. Where units are of several
        versions (None) the sampler's own log-probs stand for it: the weights of old versions are not kept.
        """
        support = self._settings.objective.support
        reference = None if self._reference is None else score_slices(self._reference, self._model, support, batch)
        if version is None:
            return batch.behaviour_log_probs, reference
        on_policy = version == self.step and self._settings.passes_per_batch == 1
        weights = self.state.trainable if version == self.step else self.versions[version]
        return None if on_policy else score_slices(weights, self._model, support, batch), reference

    def _refuse_non_finite(self, scalars: dict[str, np.ndarray]) -> None:
        for name in ("loss", "grad_norm"):
            if not np.isfinite(scalars[name]):
                raise FloatingPointError(
                    f"{name} = {scalars[name]} at step {self.step + 1} is not finite: the last checkpoint is good; "
                    "lower optimiser.learning_rate or raise algorithm.std_floor and run again"
                )

    def save(self, *, wait: bool = False) -> None:
        """Commits the state, with the weight versions that later steps need, as one checkpoint; see `Checkpoints.save`."""
        needed = self._needed() - {self.step}
        self._checkpoints.save(self.state, {v: weights for v, weights in self.versions.items() if v in needed}, wait=wait)

    def digest(self) -> str:
        """Returns `state_sha256` of the state: the same for the same values, whatever the mesh and the number of processes."""
        return state_sha256(self.state)

    def close(self) -> None:
        """Waits for checkpoints in the background."""
        self._checkpoints.close()


def _shape(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


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
    lengths = batch.completion_mask.sum(axis=1)[batch.valid]
    if len(rewards) == 0:  # all dropped: there is nothing to take a mean of
        rewards = kept = lengths = np.array([np.nan])
    metrics = {
        "reward": rewards.mean(),
        "reward_std": rewards.std(),
        "advantage_mean": kept.mean(),
        "advantage_std": kept.std(),
        "advantage_scale": (share * diagnostics.advantage_scale).sum(),
        "advantage_bias": (share * diagnostics.bias).sum(),
        "dead_prompts": np.mean([len(r) == 0 or r.max() == r.min() for r in by_prompt]),
        "length": lengths.mean(),
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
