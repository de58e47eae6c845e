"""Checkpoints: one atomic Orbax step holds the whole `TrainState`, the weight versions that later steps need, and the run's identity."""

import hashlib
import os
from typing import Any, Mapping

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from pgrpo_jax.structs import TrainState

# What Orbax and TensorStore raise while they read damaged files (tests/test_checkpoints.py damages each in many ways).
_DAMAGED = (ValueError, LookupError, TypeError, AttributeError, AssertionError, OSError)


class CheckpointError(ValueError):
    """A checkpoint is missing, corrupt, or belongs to another run; the message says which and what to do."""


def state_sha256(state: Any) -> str:
    """Returns a digest over every leaf of a pytree: its path, dtype, shape and bytes, in path order."""
    digest = hashlib.sha256()
    leaves = [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)]
    for path, leaf in sorted(leaves, key=lambda item: item[0]):
        array = np.asarray(jax.device_get(leaf))
        digest.update(f"{path} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _place(value: np.ndarray, like: jax.Array) -> jax.Array:
    return jax.device_put(value, like.sharding)


class Checkpoints:
    """The committed steps of one run.

    A step is committed by one rename, after everything in it is durable; older steps are deleted only after that. Steps
    whose commit never happened are ignored.

    Args:
        directory: where the steps live; may be a bucket.
        identity: what decides the trajectory, flat and JSON-serialisable; a step of another identity is refused.
        keep: committed steps kept.
        read_only: for readers beside a process that trains: nothing is made or tidied up, and nothing may be saved.
    """

    def __init__(self, directory: epath.PathLike, *, identity: Mapping[str, Any], keep: int = 2, read_only: bool = False):
        path = epath.Path(directory)
        self._directory = path if "://" in os.fspath(path) else path.absolute()  # Orbax refuses relative paths, in its write thread
        self._identity = dict(identity)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=not read_only, cleanup_tmp_directories=not read_only)
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
            trees = {"state": state} | {f"weights_{v}": weights for v, weights in versions.items()}
            digests = {name: state_sha256(tree) for name, tree in trees.items()}
            record = {"identity": self._identity, "versions": sorted(versions), "sha256": digests}
            items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()} | {"record": ocp.args.JsonSave(record)}
            if not self._manager.save(step, args=ocp.args.Composite(**items)):
                raise CheckpointError(
                    f"checkpoint of step {step} was refused in {self._directory}, the newest step there is {self.latest_step()}: "
                    "use another --workdir, or delete the steps that are newer"
                )
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
        try:
            record = self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]
            self._check_identity(step, record["identity"])
            wanted = {"state": like} | {f"weights_{v}": like.trainable for v in record["versions"]}
            found = {name: self._read(step, name, tree) for name, tree in wanted.items()}
            damaged = [name for name in wanted if state_sha256(found[name]) != record["sha256"][name]]
        except CheckpointError:
            raise
        except _DAMAGED as error:
            raise CheckpointError(self._corrupt(step, " ".join(f"{type(error).__name__}: {error}".split())[:300])) from error
        if damaged:
            raise CheckpointError(self._corrupt(step, f"{', '.join(damaged)}: not what was saved, by its digest"))
        placed = {name: jax.tree.map(_place, found[name], tree) for name, tree in wanted.items()}
        return placed["state"], {v: placed[f"weights_{v}"] for v in record["versions"]}

    def _read(self, step: int, name: str, like: Any) -> Any:
        """Reads one tree of a step to the host, so that nothing unverified reaches a device.

        One leaf at a time: where many are read at once and one fails, Orbax closes its event loop under the others, and each of
        them writes a traceback to stderr.
        """
        paths, tree = jax.tree_util.tree_flatten_with_path(like)
        numpy = tree.unflatten([ocp.RestoreArgs(restore_type=np.ndarray)] * len(paths))
        leaves = []
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            for i, (path, leaf) in enumerate(paths):
                item = tree.unflatten([np.empty(leaf.shape, leaf.dtype) if j == i else ocp.PLACEHOLDER for j in range(len(paths))])
                restored = reader.restore(self._directory / str(step) / name, args=ocp.args.PyTreeRestore(item=item, restore_args=numpy))
                value = jax.tree.leaves(restored)[i]
                if (value.shape, value.dtype) != (leaf.shape, leaf.dtype):
                    key = jax.tree_util.keystr(path)
                    raise ValueError(f"{name}{key} is {value.dtype}{list(value.shape)}, not {leaf.dtype}{list(leaf.shape)}")
                leaves.append(value)
        return tree.unflatten(leaves)

    def _corrupt(self, step: int, reason: str) -> str:
        return f"checkpoint {self._directory / str(step)} is corrupt ({reason}): delete that directory to go on from the step before it"

    def _check_identity(self, step: int, found: Mapping[str, Any]) -> None:
        keys, absent = sorted(set(found) | set(self._identity)), "(absent)"
        pairs = [(key, found.get(key, absent), self._identity.get(key, absent)) for key in keys]
        differences = [f"{key}: {there} there, {here} here" for key, there, here in pairs if there != here]
        if differences:
            raise CheckpointError(
                f"checkpoint {self._directory / str(step)} belongs to another run ({'; '.join(differences)}): "
                "use another --workdir, or the configuration of that run"
            )

    def close(self) -> None:
        """Waits for writes in the background and releases the directory."""
        self._manager.close()
