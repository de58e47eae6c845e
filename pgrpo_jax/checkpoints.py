"""Checkpoints: one atomic Orbax step holds the whole `TrainState`, the weight versions that later steps need, and the run's identity."""

import contextlib
import hashlib
import json
import os
from typing import Any, Iterable, Mapping

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from pgrpo_jax import parallel
from pgrpo_jax.exchange import Exchange
from pgrpo_jax.structs import TrainState

# What Orbax and TensorStore raise while they read damaged files (tests/test_checkpoints.py damages each in many ways).
_DAMAGED = (ValueError, LookupError, TypeError, AttributeError, AssertionError, OSError)


class CheckpointError(ValueError):
    """A checkpoint is missing, corrupt, or belongs to another run; the message says which and what to do."""


def state_sha256(state: Any) -> str:
    """Returns a digest over every leaf of a pytree: its path, dtype, shape and bytes, in path order.

    It is the same for the same values, however they are laid out. With several processes all must call it: leaves that are spread over
    them come together one by one.
    """
    digest = hashlib.sha256()
    for _, path, leaf in _in_path_order(state):
        array = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
        _add(digest, path, array.dtype, array.shape, parallel.whole(array))
    return digest.hexdigest()


def _in_path_order(tree: Any) -> list[tuple[int, str, Any]]:
    """(place in the tree, path, leaf) of every leaf."""
    leaves = [(i, jax.tree_util.keystr(path), leaf) for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(tree))]
    return sorted(leaves, key=lambda item: item[1])


def _add(digest: Any, path: str, dtype: Any, shape: tuple[int, ...], pieces: Iterable[np.ndarray]) -> None:
    digest.update(f"{path} {dtype} {shape}\n".encode())
    for piece in pieces:
        digest.update(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)


class Checkpoints:
    """The committed steps of one run.

    A step is committed by one rename, after everything in it is durable; older steps are deleted only after that. Steps
    whose commit never happened are ignored.

    With several processes each has one of these, over the same directory, which all must see, and all call the same methods in the same
    order. Each writes what its own devices hold, and reads everything, array by array. None waits for the others for ever.

    Args:
        directory: where the steps live; may be a bucket.
        identity: what decides the trajectory, flat and JSON-serialisable; a step of another identity is refused.
        keep: committed steps kept.
        read_only: for readers beside a process that trains: nothing is made or tidied up, and nothing may be saved.
        timeout_secs: longest wait for the slowest process, its writes included.
    """

    def __init__(
        self, directory: epath.PathLike, *, identity: Mapping[str, Any], keep: int = 2, read_only: bool = False, timeout_secs: int = 1200
    ):
        path = epath.Path(directory)
        self._directory = path if "://" in os.fspath(path) else path.absolute()  # Orbax refuses relative paths, in its write thread
        self._identity = dict(identity)
        self._exchange = Exchange(timeout_secs=timeout_secs)
        if not read_only:
            self._directory.mkdir(parents=True, exist_ok=True)
        # Named processes wait for each other through JAX's coordination service, with deadlines; by default Orbax would use collectives,
        # which have none, and which its threads would mix with those of the training.
        alone = self._exchange.num_processes == 1
        everyone = ocp.options.MultiprocessingOptions(active_processes=None if alone else set(range(self._exchange.num_processes)))
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=False,
            cleanup_tmp_directories=not read_only,
            multiprocessing_options=everyone,
            async_options=ocp.AsyncOptions(timeout_secs=timeout_secs),
        )
        with self._deadline("open the checkpoints"):
            self._manager = ocp.CheckpointManager(self._directory, options=options)

    def latest_step(self) -> int | None:
        """Returns the newest committed step, or None.

        Raises:
            CheckpointError: processes see different ones.
            TimeoutError: a process did not come to compare.
        """
        step = self._manager.latest_step()
        if self._exchange.num_processes > 1:
            seen = [part.decode() for part in self._exchange.gather("the newest checkpoint", str(step).encode())]
            if len(set(seen)) > 1:
                steps = ", ".join(f"process {process} {theirs}" for process, theirs in enumerate(seen))
                raise CheckpointError(
                    f"the newest committed step in {self._directory} is not the same for all ({steps}): "
                    "--workdir must be a directory that all processes share"
                )
        return step

    def save(self, state: TrainState, versions: Mapping[int, Any], *, wait: bool = False) -> None:
        """Saves a step; returns once the arrays are copied, the write goes on in the background.

        Args:
            state: the whole training state; its `step` names the checkpoint.
            versions: weight versions that steps after this one are generated or scored with, other than `state.trainable`.
            wait: return only after the commit.

        Raises:
            CheckpointError: the step was not accepted for saving, or the processes do not agree on what is saved.
            TimeoutError: a process did not come to save.
        """
        step = int(state.step)
        with self._deadline(f"save step {step}"):
            if step != self._manager.latest_step():
                trees = {"state": state} | {f"weights_{v}": weights for v, weights in versions.items()}
                digests = {name: state_sha256(tree) for name, tree in trees.items()}
                self._agree(step, digests)
                record = {"identity": self._identity, "versions": sorted(versions), "sha256": digests}
                items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()} | {"record": ocp.args.JsonSave(record)}
                if not self._manager.save(step, args=ocp.args.Composite(**items)):
                    raise CheckpointError(
                        f"checkpoint of step {step} was refused in {self._directory}, the newest step there is {self._manager.latest_step()}: "
                        "use another --workdir, or delete the steps that are newer"
                    )
            if wait:
                self._manager.wait_until_finished()

    def _agree(self, step: int, digests: Mapping[str, str]) -> None:
        """Copies of the same parameters that drifted apart, by a faulty device for one, must not be saved as one."""
        if self._exchange.num_processes == 1:
            return
        sent = [json.loads(part) for part in self._exchange.gather(f"the digests of step {step}", json.dumps(digests).encode())]
        if odd := [process for process, theirs in enumerate(sent) if theirs != sent[0]]:
            names = sorted({name for process in odd for name in {*sent[process], *sent[0]} if sent[process].get(name) != sent[0].get(name)})
            raise CheckpointError(
                f"step {step} is not saved: {', '.join(names)} of processes {', '.join(map(str, odd))} differ from those of process 0; "
                "the last checkpoint is good, run again from it"
            )

    @contextlib.contextmanager
    def _deadline(self, what: str):
        """Says of a wait that took too long what was waited for, and who was missing."""
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if self._exchange.num_processes == 1:
                raise
            raise TimeoutError(
                f"the {self._exchange.num_processes} processes did not {what} in {self._directory} together: look at the logs of those missing, "
                f"and run again to go on from the last committed step ({' '.join(str(error).split())[:500]})"
            ) from error

    def restore(self, like: TrainState, weights_like: Any = None) -> tuple[TrainState, dict[int, Any]]:
        """Restores the newest committed step, verified against its digest; it may have been saved from another mesh, by other processes.

        Args:
            like: a state of the expected structure; its shapes, dtypes and shardings are used.
            weights_like: likewise for weight versions; None = as `like.trainable`.

        Returns:
            (state, {version: weights}).

        Raises:
            CheckpointError: there is no committed step, it is of another identity, or it does not match its digest.
        """
        step = self.latest_step()
        if step is None:
            raise CheckpointError(f"no committed checkpoint in {self._directory}: give the --workdir of a run that has saved one")
        weights_like = like.trainable if weights_like is None else weights_like
        try:
            record = self._local(ocp.JsonCheckpointHandler).restore(self._directory / str(step) / "record", args=ocp.args.JsonRestore())
            self._check_identity(step, record["identity"])
            wanted = {"state": like} | {f"weights_{v}": weights_like for v in record["versions"]}
            found = {name: self._read(step, name, tree) for name, tree in wanted.items()}
            damaged = [name for name, (_, sha256) in found.items() if sha256 != record["sha256"][name]]
        except CheckpointError:
            raise
        except _DAMAGED as error:
            raise CheckpointError(self._corrupt(step, " ".join(f"{type(error).__name__}: {error}".split())[:300])) from error
        if damaged:
            raise CheckpointError(self._corrupt(step, f"{', '.join(damaged)}: not what was saved, by its digest"))
        return found["state"][0], {v: found[f"weights_{v}"][0] for v in record["versions"]}

    def _local(self, handler: type) -> ocp.Checkpointer:
        """A reader that waits for no other process: what one of them finds damaged the others find as well."""
        process = self._exchange.process
        alone = ocp.options.MultiprocessingOptions(primary_host=process, active_processes={process})
        return ocp.Checkpointer(handler(multiprocessing_options=alone), multiprocessing_options=alone)

    def _read(self, step: int, name: str, like: Any) -> tuple[Any, str]:
        """Reads one tree of a step through the host to its devices; returns it with its digest.

        One leaf at a time: the host need not hold more, and where many are read at once and one fails, Orbax closes its event loop
        under the others, and each of them writes a traceback to stderr.
        """
        places, digest = _in_path_order(like), hashlib.sha256()
        tree = jax.tree.structure(like)
        numpy = tree.unflatten([ocp.RestoreArgs(restore_type=np.ndarray)] * len(places))
        leaves: list[Any] = [None] * len(places)
        with self._local(ocp.PyTreeCheckpointHandler) as reader:
            for i, path, leaf in places:
                item = tree.unflatten([np.empty(leaf.shape, leaf.dtype) if j == i else ocp.PLACEHOLDER for j in range(len(places))])
                restored = reader.restore(self._directory / str(step) / name, args=ocp.args.PyTreeRestore(item=item, restore_args=numpy))
                value = jax.tree.leaves(restored)[i]
                if (value.shape, value.dtype) != (leaf.shape, leaf.dtype):
                    raise ValueError(f"{name}{path} is {value.dtype}{list(value.shape)}, not {leaf.dtype}{list(leaf.shape)}")
                _add(digest, path, value.dtype, value.shape, [value])
                leaves[i] = parallel.place(value, leaf.sharding)
        return tree.unflatten(leaves), digest.hexdigest()

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
        with self._deadline("finish the checkpoints"):
            self._manager.close()
