"""Checkpoints: one atomic Orbax step holds the whole `TrainState`, the run's identity and which weight versions later steps need."""

import contextlib
import functools
import hashlib
import json
import os
from typing import Any, Callable, Mapping

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from pgrpo_jax import parallel
from pgrpo_jax.digests import add, held_sha256, in_path_order, state_sha256
from pgrpo_jax.exchange import Exchange
from pgrpo_jax.late_record import LateRecordSave
from pgrpo_jax.structs import TrainState
from pgrpo_jax.weight_versions import WeightVersions

# What Orbax and TensorStore raise while they read damaged files (tests/test_checkpoints.py damages each in many ways).
_DAMAGED = (ValueError, LookupError, TypeError, AttributeError, AssertionError, OSError)


class CheckpointError(ValueError):
    """A checkpoint is missing, corrupt, or belongs to another run; the message says which and what to do."""


class Checkpoints:
    """The committed steps of one run.

    A step is committed by one rename, after everything in it is durable; older steps are deleted only after that. Steps
    whose commit never happened are ignored. The weight versions that steps refer to lie beside them in `versions/`, each stored once:
    durable before the first step that refers to it is committed, deleted when none does.

    With several processes each has one of these, over the same directory, which all must see, and all call the same methods in the same
    order. Each writes what its own devices hold, and reads everything, array by array. None waits for the others for ever.

    Args:
        directory: where the steps live; may be a bucket.
        identity: what decides the trajectory, flat and JSON-serialisable; a step of another identity is refused.
        keep: committed steps kept.
        read_only: for readers beside a process that trains: nothing is made or tidied up, and nothing may be saved.
        timeout_secs: longest wait for the slowest process, its writes included.

    Attributes:
        directory: where the steps live, absolute.
    """

    def __init__(
        self, directory: epath.PathLike, *, identity: Mapping[str, Any], keep: int = 2, read_only: bool = False, timeout_secs: int = 1200
    ):
        path = epath.Path(directory)
        self.directory = path if "://" in os.fspath(path) else path.absolute()  # Orbax refuses relative paths, in its write thread
        self._identity = dict(identity)
        self._exchange, self._read_only = Exchange(timeout_secs=timeout_secs), read_only
        if not read_only:
            self.directory.mkdir(parents=True, exist_ok=True)
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
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        self._versions = WeightVersions(self.directory / "versions", everyone=everyone, timeout_secs=timeout_secs)
        self._tidy()

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
                    f"the newest committed step in {self.directory} is not the same for all ({steps}): "
                    "--workdir must be a directory that all processes share"
                )
        return step

    def save(self, state: TrainState, versions: Mapping[int, Any], *, wait: bool = False) -> None:
        """Saves a step; returns once the arrays are copied, the write goes on in the background.

        Args:
            state: the whole training state; its `step` names the checkpoint.
            versions: weight versions that steps after this one are generated or scored with, other than `state.trainable`; those not
                stored yet are durable on return.
            wait: return only after the commit.

        Raises:
            CheckpointError: the step was not accepted for saving, the processes do not agree on what is saved, or a version is not the one
                of that number that committed steps refer to.
            TimeoutError: a process did not come to save.
        """
        step = int(state.step)
        with self._deadline(f"save step {step}"):
            if step != (newest := self._manager.latest_step()):
                hashed = self._versions.digests(versions)
                trees = {"state": ocp.args.StandardSave(state), "record": LateRecordSave(self._promised(step, state, hashed))}
                accepted = newest is None or newest < step
                if accepted:
                    self._manager.wait_until_finished()  # then it is known what committed steps refer to
                    self._versions.write({v: versions[v] for v in self._missing(step, hashed)})
                if not accepted or not self._manager.save(step, args=ocp.args.Composite(**trees)):
                    raise CheckpointError(
                        f"checkpoint of step {step} was refused in {self.directory}, the newest step there is {self._manager.latest_step()}: "
                        "use another --workdir, or delete the steps that are newer"
                    )
            if wait:
                self._manager.wait_until_finished()
                self._tidy()

    def _promised(self, step: int, state: TrainState, hashed: Mapping[int, str]) -> Callable[[], dict[str, Any]]:
        """What returns the record of a step. One process alone computes the state's digest while the step is written; several compare it first."""
        alone = self._exchange.num_processes == 1
        of_state = held_sha256(state) if alone else functools.partial(str, state_sha256(state))
        of_versions = {f"weights_{v}": sha256 for v, sha256 in hashed.items()}
        if not alone:
            self._agree(step, {"state": of_state()} | of_versions)
        return lambda: {"identity": self._identity, "versions": sorted(hashed), "sha256": {"state": of_state()} | of_versions}

    def _missing(self, step: int, wanted: Mapping[int, str]) -> list[int]:
        """Versions among `wanted` ({version: digest}) that are to be written for a step; process 0 looks, and deletes what is of no use."""
        found: dict[str, Any] = {}
        if self._exchange.process == 0:
            referred, complete = self._referred()
            odd = [v for v, sha256 in wanted.items() if referred.get(v, sha256) != sha256]
            found = {"odd": odd, "missing": [] if odd else self._versions.settle(vouched=referred, wanted=wanted, complete=complete)}
        if self._exchange.num_processes > 1 and wanted:
            found = json.loads(self._exchange.gather(f"the weight versions stored before step {step}", json.dumps(found).encode())[0])
        if found.get("odd"):
            raise CheckpointError(
                f"step {step} is not saved: weight version {found['odd'][0]} is not the one that committed steps refer to, in "
                f"{self._versions.path(found['odd'][0])}: use another --workdir, or run again to go on from the last checkpoint"
            )
        return found.get("missing", [])

    def _tidy(self) -> None:
        """Process 0 deletes the weight versions that no committed step refers to."""
        if self._exchange.process == 0 and not self._read_only and self._versions.exist():
            referred, complete = self._referred()
            self._versions.settle(vouched=referred, wanted=(), complete=complete)

    def _referred(self) -> tuple[dict[int, str], bool]:
        """{version: digest} of what committed steps refer to, and whether that is all: a damaged record does not tell."""
        referred, complete = {}, True
        for step in self._manager.all_steps() if self._versions.exist() else ():
            try:
                record = self._record(step)
                theirs = {v: record["sha256"][f"weights_{v}"] for v in record["versions"]}
                complete &= len(record["sha256"]) == 1 + len(theirs)
            except _DAMAGED:
                complete = False
            else:
                referred |= theirs
        return referred, complete

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
                f"the {self._exchange.num_processes} processes did not {what} in {self.directory} together: look at the logs of those missing, "
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
        with self._deadline("finish the last save"):
            self._manager.wait_until_finished()
        self._tidy()
        step = self.latest_step()
        if step is None:
            raise CheckpointError(f"no committed checkpoint in {self.directory}: give the --workdir of a run that has saved one")
        weights_like, found, where = like.trainable if weights_like is None else weights_like, {}, "record"
        try:
            record = self._record(step)
            self._check_identity(step, record["identity"])
            wanted = {"state": (self.directory / str(step) / "state", like)}
            wanted |= {f"weights_{v}": (self._versions.path(v), weights_like) for v in record["versions"]}
            for name, (path, tree) in wanted.items():
                where, expected = f"{name} in {path}", record["sha256"][name]
                found[name], sha256 = self._read(path, name, tree)
                if sha256 != expected:
                    raise CheckpointError(self._corrupt(step, f"{where}: not what was saved, by its digest"))
        except CheckpointError:
            raise
        except _DAMAGED as error:
            raise CheckpointError(self._corrupt(step, f"{where}: {' '.join(f'{type(error).__name__}: {error}'.split())[:300]}")) from error
        versions = {v: found[f"weights_{v}"] for v in record["versions"]}
        self._versions.remember(versions, {v: record["sha256"][f"weights_{v}"] for v in versions})
        return found["state"], versions

    def _record(self, step: int) -> dict[str, Any]:
        return self._local(ocp.JsonCheckpointHandler).restore(self.directory / str(step) / "record", args=ocp.args.JsonRestore())

    def _local(self, handler: type) -> ocp.Checkpointer:
        """A reader that waits for no other process: what one of them finds damaged the others find as well."""
        process = self._exchange.process
        alone = ocp.options.MultiprocessingOptions(primary_host=process, active_processes={process})
        return ocp.Checkpointer(handler(multiprocessing_options=alone), multiprocessing_options=alone)

    def _read(self, directory: epath.Path, name: str, like: Any) -> tuple[Any, str]:
        """Reads one tree through the host to its devices; returns it with its digest.

        One leaf at a time: the host need not hold more, and where many are read at once and one fails, Orbax closes its event loop
        under the others, and each of them writes a traceback to stderr.
        """
        places, digest = in_path_order(like), hashlib.sha256()
        tree = jax.tree.structure(like)
        numpy = tree.unflatten([ocp.RestoreArgs(restore_type=np.ndarray)] * len(places))
        leaves: list[Any] = [None] * len(places)
        with self._local(ocp.PyTreeCheckpointHandler) as reader:
            for i, path, leaf in places:
                item = tree.unflatten([np.empty(leaf.shape, leaf.dtype) if j == i else ocp.PLACEHOLDER for j in range(len(places))])
                restored = reader.restore(directory, args=ocp.args.PyTreeRestore(item=item, restore_args=numpy))
                value = jax.tree.leaves(restored)[i]
                if (value.shape, value.dtype) != (leaf.shape, leaf.dtype):
                    raise ValueError(f"{name}{path} is {value.dtype}{list(value.shape)}, not {leaf.dtype}{list(leaf.shape)}")
                add(digest, path, value.dtype, value.shape, [value])
                leaves[i] = parallel.place(value, leaf.sharding)
        return tree.unflatten(leaves), digest.hexdigest()

    def _corrupt(self, step: int, reason: str) -> str:
        return f"checkpoint {self.directory / str(step)} is corrupt ({reason}): delete that directory to go on from the step before it"

    def _check_identity(self, step: int, found: Mapping[str, Any]) -> None:
        keys, absent = sorted(set(found) | set(self._identity)), "(absent)"
        pairs = [(key, found.get(key, absent), self._identity.get(key, absent)) for key in keys]
        differences = [f"{key}: {there} there, {here} here" for key, there, here in pairs if there != here]
        if differences:
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)} belongs to another run ({'; '.join(differences)}): "
                "use another --workdir, or the configuration of that run"
            )

    def close(self) -> None:
        """Waits for writes in the background and releases the directory."""
        with self._deadline("finish the checkpoints"):
            self._manager.close()
            self._versions.close()
