"""Floor 5: the durable records of a run, keyed by step, so that after a resume no step is missing or twice.

    config.json                  {dotted key: value}                     written at every start
    metrics.jsonl                one object for each update               appended
    samples.jsonl                one object for each sample               appended
    verdicts.jsonl               one object for each reward that failed   appended; only where one did
    rollouts/step_000012.npz     everything of a step's rollouts          one file a step (rollout_files.py)
    evaluation_000012.json       one evaluation, after that many updates
    summary.json                 only when the run reached its last step
    tensorboard/                 the numbers of metrics.jsonl again, for TensorBoard

`step` is the number of updates done. A step's line in metrics.jsonl is written last: it marks the step as recorded. The caller commits
the checkpoint of a step after recording it, and calls `truncate_after(restored step)` when it starts.
"""

import json
import math
import os
import re
import tempfile
import time
from typing import Any, Mapping, Sequence

from etils import epath
from tensorboardX import summary as tensorboard_summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.proto import summary_pb2

from pgrpo_jax.rollout_files import pack_rollouts
from pgrpo_jax.structs import RewardFailure, Rollouts


def write_atomically(path: epath.PathLike, content: bytes) -> None:
    """Writes a file so that a reader, or a kill at any moment, sees the old content or the new, never a part.

    Args:
        path: the file; its directory is made. In a bucket an object appears whole or not at all, so it is written in place.
        content: the bytes.
    """
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if _in_bucket(path):
        path.write_bytes(content)
        return
    partial = path.parent / f"{path.name}.partial"
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    _sync_directory(path.parent)


def check_workdir(workdir: epath.PathLike) -> None:
    """Refuses a run directory that nothing could be written to, without making it.

    Raises:
        NotADirectoryError: it, or a part of its path, is a file.
        PermissionError: it may not be written to.
    """
    path = epath.Path(workdir)
    if _in_bucket(path):  # a bucket says so itself, at the first write
        return
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"--workdir {path}: {existing} is a file, a directory is needed: give another path")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"--workdir {path}: {existing} may not be written to: give another path or change its permissions")


class RunDirectory:
    """Writes and reads the records of one run.

    Args:
        workdir: local directory or bucket path (anything etils.epath opens). Nothing is touched before the first write.
        tensorboard: also write TensorBoard files.
    """

    def __init__(self, workdir: epath.PathLike, *, tensorboard: bool = False):
        self.path = epath.Path(workdir)
        self._tensorboard = tensorboard
        self._events: _Events | None = None

    def write_config(self, values: Mapping[str, Any]) -> None:
        """Writes config.json.

        Args:
            values: flat {dotted key: value}.
        """
        self._write_json("config.json", values)

    def truncate_after(self, step: int) -> None:
        """Forgets everything recorded for later steps, and lines torn by a kill; call it once at every start.

        Args:
            step: updates done by the checkpoint that was restored; 0 for a fresh start.
        """
        for name in ("metrics.jsonl", "samples.jsonl", "verdicts.jsonl"):
            if (self.path / name).exists():
                # Verdicts are of no step and stay: what is made again must be made of the same ones.
                kept = [record for record in self._read_lines(name) if record.get("step", 0) <= step]
                write_atomically(self.path / name, b"".join(map(_json_line, kept)))
        for file in self._listed("") + self._listed("rollouts"):
            found = re.fullmatch(r"(?:step|evaluation)_(\d+)\.(?:npz|json)", file.name)
            if (found and int(found[1]) > step) or file.name.endswith(".partial"):
                file.unlink()
        summary = self.summary()
        if summary is not None and summary["steps"] > step:
            (self.path / "summary.json").unlink()
        self._restart_events(step)

    def write_verdicts(self, rollouts: Sequence[Rollouts]) -> None:
        """Records the rewards that failed, each once, of units of any split; call it before a step is made of them. No kill loses them."""
        failures = [(unit.work, failure) for unit in rollouts for failure in unit.reward_failures]
        records = [{"split": work.split, "index": work.index, "version": work.version, **vars(failure)} for work, failure in failures]
        made = {(r["split"], r["index"], r["version"], r["row"]): r for r in records}
        for r in self._read_lines("verdicts.jsonl"):
            made.pop((r["split"], r["index"], r["version"], r["row"]), None)
        if made:
            self._append("verdicts.jsonl", list(made.values()))

    def verdicts(self, split: str) -> dict[tuple[int, int], tuple[RewardFailure, ...]]:
        """Returns the failed rewards of a split on record, by (work index, weight version), as `Work.failed_rewards` takes them."""
        found: dict[tuple[int, int], tuple[RewardFailure, ...]] = {}
        for r in self._read_lines("verdicts.jsonl"):
            if r["split"] == split:
                unit, failure = (r["index"], r["version"]), RewardFailure(row=r["row"], reason=r["reason"], policy=r["policy"])
                found[unit] = (*found.get(unit, ()), failure)
        return found

    def write_step(self, record: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], rollouts: Sequence[Rollouts]) -> None:
        """Records one update; when it returns, no kill can lose the step.

        Args:
            record: metrics, flat, with `step` >= 1. Numbers that are not finite become null.
            samples: {step, prompt_id, preference_id, prompt, answer, reward, advantage, truncated} each; same `step`.
            rollouts: the units of work that the update consumed, in canonical order.

        Raises:
            ValueError: the step is already recorded, or a sample belongs to another step.
        """
        step = int(record["step"])
        strangers = {sample["step"] for sample in samples} - {step}
        if strangers:
            raise ValueError(f"samples of steps {sorted(strangers)} handed over with step {step}; pass the samples of one step")
        path = self.path / "rollouts" / f"step_{step:06d}.npz"
        if step < 1 or path.exists():
            raise ValueError(f"step {step} is already recorded in {self.path} or below 1; call truncate_after({max(step - 1, 0)}) first")
        write_atomically(path, pack_rollouts(rollouts))
        self._append("samples.jsonl", [{**sample} for sample in samples])
        self._append("metrics.jsonl", [{"step": step} | dict(record)])
        if self._tensorboard:
            if self._events is None:
                self._restart_events(step - 1)
            self._events.write(step, record)

    def write_evaluation(self, record: Mapping[str, Any]) -> None:
        """Writes evaluation_NNNNNN.json, named by the record's `step` (updates done; 0 = the untrained policy)."""
        self._write_json(f"evaluation_{int(record['step']):06d}.json", record)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes summary.json; its `steps` is the number of updates of the finished run."""
        self._write_json("summary.json", summary)

    def config(self) -> dict[str, Any] | None:
        """Returns config.json, or None where it was not written yet."""
        return self._read_json("config.json")

    def summary(self) -> dict[str, Any] | None:
        """Returns summary.json, or None where the run has not finished."""
        return self._read_json("summary.json")

    def metrics(self) -> list[dict[str, Any]]:
        """Returns the recorded steps, in the order they were written; a torn last line is left out."""
        return self._read_lines("metrics.jsonl")

    def samples(self) -> list[dict[str, Any]]:
        """Returns the recorded samples, in the order they were written; a torn last line is left out."""
        return self._read_lines("samples.jsonl")

    def evaluations(self) -> list[dict[str, Any]]:
        """Returns the evaluations in the order of their steps."""
        names = [file.name for file in self._listed("") if re.fullmatch(r"evaluation_\d+\.json", file.name)]
        return sorted((self._read_json(name) for name in names), key=lambda record: record["step"])

    def close(self) -> None:
        """Closes the TensorBoard file; the other records are closed after every write."""
        if self._events is not None:
            self._events.close()
            self._events = None

    def _restart_events(self, step: int) -> None:
        self.close()
        if self._tensorboard:
            self._events = _Events(self.path / "tensorboard", purge_step=step + 1)

    def _listed(self, folder: str) -> list[epath.Path]:
        directory = self.path / folder
        return sorted(directory.iterdir()) if directory.exists() else []

    def _write_json(self, name: str, value: Any) -> None:
        write_atomically(self.path / name, (json.dumps(_plain(value), indent=1, allow_nan=False) + "\n").encode("ascii"))

    def _read_json(self, name: str) -> Any:
        path = self.path / name
        if not path.exists():
            return None
        try:
            return json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}); delete it and run the same command again") from error

    def _append(self, name: str, records: Sequence[Mapping[str, Any]]) -> None:
        path, lines = self.path / name, b"".join(map(_json_line, records))
        if _in_bucket(path):  # objects can not be appended to
            path.write_bytes((path.read_bytes() if path.exists() else b"") + lines)
            return
        created = not path.exists()
        with path.open("ab") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
        if created:
            _sync_directory(path.parent)

    def _read_lines(self, name: str) -> list[dict[str, Any]]:
        path = self.path / name
        if not path.exists():
            return []
        *lines, _torn = path.read_bytes().split(b"\n")  # a whole line ends in a newline, so what follows the last one is torn
        records = []
        for i, line in enumerate(lines, start=1):
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path} line {i} is not JSON ({error}); delete that line and run the same command again") from error
        return records


class _Events:
    """One TensorBoard file, flushed at every step: tensorboardX's own SummaryWriter queues and would lose the last steps in a kill."""

    def __init__(self, directory: epath.Path, *, purge_step: int):
        self._directory = directory
        self._scratch = None
        local = directory
        if _in_bucket(directory):  # written here and copied whole, as an object can not be appended to
            self._scratch = tempfile.TemporaryDirectory()
            local = epath.Path(self._scratch.name)
        local.mkdir(parents=True, exist_ok=True)
        # The suffix keeps a resume within the same second from writing over the file of the run before it.
        self._writer = EventsWriter(os.fspath(local / "events"), filename_suffix=f".from_{purge_step:06d}")
        self._add(step=purge_step, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        numbers = {key: _plain(value) for key, value in record.items() if key != "step"}
        scalars = [tensorboard_summary.scalar(key, value).value[0] for key, value in numbers.items() if isinstance(value, (int, float))]
        self._add(step=step, summary=summary_pb2.Summary(value=scalars))

    def close(self) -> None:
        self._writer.close()
        if self._scratch is not None:
            self._scratch.cleanup()

    def _add(self, **fields: Any) -> None:
        self._writer.write_event(event_pb2.Event(wall_time=time.time(), **fields))
        self._writer.flush()
        if self._scratch is not None:
            for file in epath.Path(self._scratch.name).iterdir():
                write_atomically(self._directory / file.name, file.read_bytes())


def _in_bucket(path: epath.Path) -> bool:
    return "://" in os.fspath(path)


def _sync_directory(directory: epath.Path) -> None:
    """Makes a created or renamed file's name durable, not only its content."""
    descriptor = os.open(os.fspath(directory), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _json_line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(_plain(record), allow_nan=False).encode("ascii") + b"\n"


def _plain(value: Any) -> Any:
    """Returns a value as standard JSON knows it: array scalars become numbers, numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy and JAX arrays and scalars
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
