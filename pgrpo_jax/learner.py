"""The learner role: rollouts → per-preference-group normalised advantages → update → weight versions and checkpoints."""

import dataclasses
from typing import Any, Callable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pgrpo_jax import batch_files, batch_metrics, batching, curation, gradient_shares, kl_control, parallel
from pgrpo_jax.algorithms import preference_weights
from pgrpo_jax.checkpoints import Checkpoints, state_sha256
from pgrpo_jax.curation import Signals
from pgrpo_jax.learner_settings import LearnerSettings
from pgrpo_jax.models import lora
from pgrpo_jax.models.mesh import ROWS, size
from pgrpo_jax.models.transformer import laid_over, Transformer
from pgrpo_jax.optimiser import learning_rate
from pgrpo_jax.structs import Rollouts, TrainBatch, TrainState
from pgrpo_jax.train_state import copied
from pgrpo_jax.update import kl_penalties, refuse_non_finite, score_slices, update


class Learner:
    """Holds the training state, or this process's part of it: with several processes each has one of these, and all call the same methods
    with the same arguments in the same order.

    Args:
        model: the transformer, as the learner runs it.
        state: of `initial_state`.
        advantage_kernel: of `parallel.advantage_kernel`.
        settings: sizes and constants.
        reference: parameters of the reference policy, those that are frozen where some are; or None where the KL coefficient is 0.
        load_base: returns what is trained of the untrained policy, which is not kept.
        mesh: what the state lies on.
        checkpoints: where the state is committed.
        frozen: parameters that are not trained, from the host: the model that adapters are added to; {} = all are trained.

    Attributes:
        state: the training state.
        step: updates done.
        next_work: index of the first work unit that a run resumed from here issues.
        versions: weight versions that may be generated with, in `weights_dtype`, laid out as the state; no update touches them.
        stopping: whether the devices are about to be taken away; never those of this process (see `engines.ray_learner.LearnerGang`).
        frozen: the parameters that are not trained, on the mesh.
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
        frozen: Mapping[str, Any] = {},
    ):
        self._model, self._settings, self._checkpoints, self._mesh = laid_over(model, mesh), settings, checkpoints, mesh
        self._advantages = parallel.over_processes(advantage_kernel, len({device.process_index for device in mesh.devices.flat}))
        self._learning_rate = jax.jit(learning_rate(settings.optimiser))
        self._load_base = load_base
        self._params_layout = parallel.layout(state.trainable, mesh)
        self._copy = parallel.compiled(copied, self._params_layout, dtype=settings.weights_dtype)
        self._version_shapes = jax.tree.map(_shape, jax.eval_shape(self._copy, state.trainable), self._params_layout)
        self.frozen = parallel.place(dict(frozen), parallel.layout(dict(frozen), mesh))
        # What adapters are added to is a reference that takes no memory.
        if reference is not None and not self.frozen:
            reference = parallel.place(reference, self._params_layout)
        self._reference = self.frozen or reference if reference is not None else None
        self._reference_model = dataclasses.replace(self._model, config=dataclasses.replace(model.config, lora=None))
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

    def update(self, rollouts: Sequence[Rollouts], *, next_work: int | None = None) -> tuple[dict[str, Any], np.ndarray]:
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
        flat = batching.pack(flat) if s.packing else flat
        signals = curation.signals(rollouts, flat, s.curation, step=self.step, components=s.components)
        signals = self._pay_kl(flat, signals, version=expected)
        preference_ids = flat.preference_ids[flat.prompt_index]
        advantages, history, diagnostics = self._advantages(
            signals.rewards, flat.prompt_index, preference_ids, signals.history_ids, signals.staleness, flat.valid, self.state.history
        )
        advantages = np.asarray(advantages)
        trained, wanted, informative = curation.train_on(flat, signals, advantages, s.curation)
        counts = np.bincount(trained.preference_ids[trained.prompt_index][trained.valid], minlength=s.num_preference_groups).astype(np.int32)
        past = np.where(diagnostics.history_count > 0, diagnostics.history_mean, np.nan).astype(advantages.dtype)
        weights = np.asarray(preference_weights.weights(s.preference_weights, past, counts))
        wanted = wanted * weights[trained.preference_ids[trained.prompt_index]]
        scalars, shares = self._optimise(trained, wanted.astype(advantages.dtype), version=expected, present=counts > 0)

        staleness = np.mean([self.step - r.work.version for r in rollouts])
        self.step += 1
        self.next_work = rollouts[-1].work.index + 1 if next_work is None else next_work
        counted = {"step": np.int32(self.step), "next_work": np.int32(self.next_work), "history": history}
        self.state = self.state.replace(**parallel.replicate(counted, self._mesh), objective=self._next_objective(scalars))
        self._offer_versions()
        metrics = batch_metrics.describe(flat, advantages, jax.device_get(diagnostics)) | batch_metrics.of_update(scalars, self._kl_coefficients())
        metrics |= {"staleness": float(staleness), "learning_rate": float(self._learning_rate(self.step * s.passes_per_batch - 1))}
        metrics |= shares | {"informative_prompts": informative, "reward_shaped": batch_metrics.mean_reward(signals.rewards, flat.valid)}
        metrics |= {f"preference_group/{p}/weight": float(weight) for p, weight in enumerate(weights)}
        rows = batching.completion_rows(rollouts, completions_per_prompt=s.completions_per_prompt)
        return metrics, advantages[rows]

    def _optimise(
        self, trained: TrainBatch, advantages: np.ndarray, *, version: int | None, present: np.ndarray
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Makes the optimiser steps of a batch; returns what the last one measured, and whose gradient the first one followed."""
        s = self._settings
        batch = self._sliced(trained)
        sliced = parallel.shard_rows(advantages.reshape(len(batch.rewards), -1), self._mesh, axis=1)
        old, reference = self._old_log_probs(batch, version=version), self._reference_log_probs(batch)
        if self.step + 1 in s.dump_batches:
            whole = parallel.on_hosts((batch, sliced, old, reference))
            if jax.process_index() == 0:
                batch_files.dump_batch(self._checkpoints.directory.parent / "batches" / f"step_{self.step + 1:06d}.npz", *whole)
        shares = {}
        if s.gradients_every and (self.step + 1) % s.gradients_every == 0:
            fixed = (self.state.trainable, self._model, s.loss, batch, sliced, self._kl_coefficients(), old, reference)
            shares = gradient_shares.describe(gradient_shares.gradient_shares(*fixed, frozen=self.frozen))
        for _ in range(s.passes_per_batch):
            fixed = (self._model, s.loss, s.optimiser, batch, sliced, old, reference)
            self.state, scalars = update(self.state, *fixed, frozen=self.frozen, present=present if s.optimiser.num_adapters > 1 else None)
            scalars = jax.device_get(scalars)
            refuse_non_finite(scalars, step=self.step + 1)
        return scalars, shares

    def _sliced(self, batch: TrainBatch, *, times: int = 1) -> TrainBatch:
        """A batch in micro-batches, on its devices; one of `times` as many prompts as an update's has as many more."""
        s, devices = self._settings, size(self._mesh, *ROWS)
        count = batching.num_slices(batch, at_least=s.micro_batches * times, most_tokens=s.micro_batch_tokens, devices=devices)
        return parallel.shard_rows(batching.micro_batches(batch, count), self._mesh, axis=1)

    def _old_log_probs(self, batch: TrainBatch, *, version: int | None, always: bool = False) -> jax.Array | None:
        """Log-probs of the old policy, in the update's own layout; None where it is the policy itself and one pass is made.

        Where units are of several versions (None) the sampler's own log-probs stand for the generator: the weights of old versions are not kept.
        """
        s = self._settings
        if version is None and s.proximal == "generator":
            return batch.behaviour_log_probs
        current = s.proximal == "current" or version == self.step
        if current and s.passes_per_batch == 1 and not always:
            return None
        trained = self.state.trainable if current else self.versions[version]
        return score_slices(lora.joined(self.frozen, trained), self._model, s.loss.support, batch)

    def _reference_log_probs(self, batch: TrainBatch) -> jax.Array | None:
        support, refreshed = self._settings.loss.support, self.state.objective.get("reference")
        if refreshed is not None:
            return score_slices(lora.joined(self.frozen, refreshed), self._model, support, batch)
        return None if self._reference is None else score_slices(self._reference, self._reference_model, support, batch)

    def _pay_kl(self, flat: TrainBatch, signals: Signals, *, version: int | None) -> Signals:
        """Takes the KL of each completion, summed over its tokens, off its reward, where it is paid there."""
        s = self._settings
        if s.loss.objective.kl_in != "reward" or s.kl.coefficient == 0:
            return signals
        batch = self._sliced(flat, times=s.oversample)
        old, reference = self._old_log_probs(batch, version=version, always=True), self._reference_log_probs(batch)
        everywhere = NamedSharding(self._mesh, PartitionSpec())
        paid = parallel.compiled(kl_penalties, everywhere, estimator=s.loss.objective.kl_estimator)(old, reference, batch)
        beta = self._kl_coefficients()[flat.preference_ids[flat.prompt_index]]
        return dataclasses.replace(signals, rewards=signals.rewards - beta * np.asarray(jax.device_get(paid)).reshape(-1))

    def _kl_coefficients(self) -> np.ndarray:
        """[K] float32; zeros where no KL is paid."""
        zeros = np.zeros(self._settings.num_preference_groups, np.float32)
        return np.asarray(jax.device_get(self.state.objective.get("kl_coefficients", zeros)))

    def _next_objective(self, scalars: dict[str, np.ndarray]) -> dict[str, Any]:
        """The objective's state after the update that `self.step` counts already."""
        kl, after = self._settings.kl, dict(self.state.objective)
        if "kl_coefficients" in after:
            moved = kl_control.adapted(kl, self._kl_coefficients(), scalars)
            after |= parallel.replicate({"kl_coefficients": moved}, self._mesh)
        if kl.refreshes(self.step):
            after["reference"] = parallel.compiled(copied, self._params_layout, dtype=None)(self.state.trainable)
        return after

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
