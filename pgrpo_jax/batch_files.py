"""Floor 1: one batch as the learner trained on it, as a file: to look at an update by itself, or to make it again elsewhere.

A compressed .npz archive without pickle: "batch/<field>" for each field of `TrainBatch` ("batch/packing" where there is one), "advantages", and
"old_log_probs" and "reference_log_probs" where the update had them.
"""

import dataclasses
import io
import zipfile
import zlib
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from pgrpo_jax.structs import TrainBatch

# What zipfile and NumPy raise while they read damaged archives; RuntimeError for flags of encryption and of methods that zipfile lacks.
_DAMAGED = (zipfile.BadZipFile, zlib.error, ValueError, KeyError, EOFError, RuntimeError, OSError)
_FIELDS = tuple(field.name for field in dataclasses.fields(TrainBatch))


class Dump(NamedTuple):
    """What an update was made of, on the host; shapes as given to `dump_batch`. None where the update had no such log-probs."""

    batch: TrainBatch
    advantages: np.ndarray
    old_log_probs: np.ndarray | None
    reference_log_probs: np.ndarray | None


def dump_batch(path: epath.PathLike, batch: TrainBatch, advantages: Any, old: Any | None, reference: Any | None) -> None:
    """Writes a batch; a file of that name is replaced.

    Args:
        path: of the file; its directory is made.
        batch: flat or cut into micro-batches, on the host or on devices of this process.
        advantages: one for each completion, shaped as `batch.rewards`.
        old: log-probs of the old policy, shaped as `batch.completions`; None = strictly on-policy, the policy itself.
        reference: log-probs of the reference policy, likewise; None = there is none.

    Raises:
        ValueError: shapes do not match the batch.
    """
    given = {"advantages": advantages, "old_log_probs": old, "reference_log_probs": reference}
    given = {name: values for name, values in given.items() if values is not None}
    for name, values in given.items():
        like = np.shape(batch.rewards if name == "advantages" else batch.completions)
        if np.shape(values) != like:
            raise ValueError(f"{name} has shape {np.shape(values)}, the batch needs {like}: give those of this very batch")
    arrays = {f"batch/{name}": values for name in _FIELDS if (values := getattr(batch, name)) is not None} | given
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **jax.device_get(arrays))
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())


def load_batch(path: epath.PathLike) -> Dump:
    """Reads a batch back, to the bit.

    Args:
        path: of a file of `dump_batch`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or is no batch.
    """
    path = epath.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give a file that dump_batch wrote")
    content = path.read_bytes()
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        batch = TrainBatch(**{name: arrays[f"batch/{name}"] for name in _FIELDS if name != "packing"}, packing=arrays.get("batch/packing"))
        return Dump(batch, arrays["advantages"], arrays.get("old_log_probs"), arrays.get("reference_log_probs"))
    except _DAMAGED as error:
        raise ValueError(f"{path} is damaged or no batch ({type(error).__name__}: {error}): dump it again") from error
