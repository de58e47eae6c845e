"""Checkpoints: one atomic Orbax step holds the whole `TrainState`, the weight versions that later steps need, and the run's identity."""

import hashlib
from typing import Any, Mapping

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from pgrpo_jax.structs import TrainState


class CheckpointError(ValueError):
    """A checkpoint is missing, corrupt, or belongs to another run; the message says which and what to do."""


def state_sha256(state: Any) -> str:
    """Returns a digest over every leaf of a pytree: its path, dtype, shape and bytes, in path order."""
    digest = hashlib.sha256()
    leaves = [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)]
    for path, leaf in sorted(leaves, key=lambda item: item[0]):
        array = np.ascontiguousarray(jax.device_get(leaf))
        digest.update(f"{path} {array.dtype} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


class Checkpoints:
    """The committed steps of one run.

    A step is committed by one rename, after everything in it is durable; older steps are deleted only after that. Steps
    whose commit never happened are ignored.

    Args:
        directory: where the steps live; may be a bucket.
        identity: what decides the trajectory, flat and JSON-serialisable; a step of another identity is refused.
        keep: committed steps kept.
    """

    def __init__(self, directory: epath.PathLike, *, identity: Mapping[str, Any], keep: int = 2):
        self._directory, self._identity = epath.Path(directory), dict(identity)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def latest_step(self) -> int | None:
        """Returns the newest committed step, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState, versions: Mapping[int, Any], *, wait: bool = False) -> None:
        """Saves a step; returns once the arrays are copied, the write goes on in the background.

        Args:
            state: the whole training state; its `step` names the checkpoint.
            versions: weight versions that steps after this one are generated or scored with, other than `state.trainable`.
            wait: return only after the commit.

        Raises:
            CheckpointError: the step was not accepted for saving.
        """
        step = int(state.step)
        if step != self.latest_step():
            record = {"identity": self._identity, "versions": sorted(versions), "state_sha256": state_sha256(state)}
            items = {"state": ocp.args.StandardSave(state), "record": ocp.args.JsonSave(record)}
            items |= {f"weights_{v}": ocp.args.StandardSave(weights) for v, weights in versions.items()}
            if not self._manager.save(step, args=ocp.args.Composite(**items)):
                raise CheckpointError(f"checkpoint of step {step} was refused in {self._directory}: newest step there is {self.latest_step()}")
        if wait:
            self._manager.wait_until_finished()

    def restore(self, like: TrainState) -> tuple[TrainState, dict[int, Any]]:
        """Restores the newest committed step, verified against its digest.

        Args:
            like: a state of the expected structure; its shapes, dtypes and shardings are used.

        Returns:
            (state, {version: weights}).

        Raises:
            CheckpointError: there is no committed step, it is of another identity, or it does not match its digest.
        """
        step = self.latest_step()
        if step is None:
            raise CheckpointError(f"no committed checkpoint in {self._directory}: give the --workdir of a run that has saved one")
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        try:
            record = self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]
            self._check_identity(step, record["identity"])
            items = {"state": ocp.args.StandardRestore(abstract)}
            items |= {f"weights_{v}": ocp.args.StandardRestore(abstract.trainable) for v in record["versions"]}
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        except CheckpointError:
            raise
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise CheckpointError(self._corrupt(step, str(error).splitlines()[0][:300])) from error
        state = restored["state"]
        if (found := state_sha256(state)) != record["state_sha256"]:
            raise CheckpointError(self._corrupt(step, f"digest {found} differs from {record['state_sha256']} written with it"))
        return state, {v: restored[f"weights_{v}"] for v in record["versions"]}

    def _corrupt(self, step: int, reason: str) -> str:
        return f"checkpoint {self._directory / str(step)} is corrupt ({reason}): delete that directory to go on from the step before it"

    def _check_identity(self, step: int, found: Mapping[str, Any]) -> None:
        keys = sorted(set(found) | set(self._identity))
        absent = "(absent)"
        differences = [f"{k}: {found.get(k, absent)} there, {self._identity.get(k, absent)} here" for k in keys if found.get(k) != self._identity.get(k)]
        if differences:
            raise CheckpointError(
                f"checkpoint {self._directory / str(step)} belongs to another run ({'; '.join(differences)}): "
                "use another --workdir, or the configuration of that run"
            )

    def close(self) -> None:
        """Waits for writes in the background and releases the directory."""
        self._manager.close()
