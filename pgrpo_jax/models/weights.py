"""A model's files, wherever they come from: a GGUF file, or a Hugging Face directory of safetensors."""

import hashlib
import pathlib
from typing import Any, Callable

import jax
import numpy as np

from pgrpo_jax.models import gguf_weights, hugging_face, safetensors_weights
from pgrpo_jax.models.config import ModelConfig


def locate(path: str | pathlib.Path) -> pathlib.Path:
    """Returns the model that `path` names.

    Args:
        path: a local GGUF file, a directory holding exactly one, or a Hugging Face directory (`config.json` and safetensors).

    Returns:
        The GGUF file, or the Hugging Face directory.

    Raises:
        FileNotFoundError: nothing is there, or the directory holds no model.
        ValueError: it holds several.
    """
    place = pathlib.Path(path)
    if not place.is_dir():
        if not place.is_file():
            raise FileNotFoundError(f"no model at {str(path)!r}: give a local GGUF file, a directory holding one, or a Hugging Face directory")
        return place
    if (place / "config.json").is_file() and any(entry.name.endswith((".safetensors", ".safetensors.index.json")) for entry in place.iterdir()):
        return place
    found = sorted(entry for entry in place.iterdir() if entry.suffix.lower() == ".gguf" and entry.is_file())
    if not found:
        there = ", ".join(sorted(entry.name for entry in place.iterdir())) or "nothing"
        raise FileNotFoundError(f"no .gguf file, and no config.json with safetensors, in {place} (there is: {there}): give a GGUF file or a Hugging Face directory")
    if len(found) > 1:
        raise ValueError(f"{len(found)} .gguf files in {place} ({', '.join(entry.name for entry in found)}): name one of them")
    return found[0]


def digest(path: str | pathlib.Path) -> str:
    """Returns the sha256, in hexadecimal, of the file at `path` (see `locate`); of a directory, of the sha256 of its configuration and of each shard."""
    place = locate(path)
    if not place.is_dir():
        return _sha256(place).hex()
    return hashlib.sha256(b"".join(_sha256(part) for part in [place / "config.json", *safetensors_weights.shards(place)])).hexdigest()


def _sha256(file: pathlib.Path) -> bytes:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").digest()


def read_config(path: str | pathlib.Path) -> ModelConfig:
    """Reads a model's sizes and settles the account of its tensors; cheap, the tensor data is not touched.

    Args:
        path: as for `locate`.

    Returns:
        The model's sizes.

    Raises:
        ValueError: a file is damaged, of an unknown family, or its tensors are not those of its sizes.
        FileNotFoundError: there is no model at `path`, or a shard of it is missing.
    """
    place = locate(path)
    if not place.is_dir():
        return gguf_weights.read_config(place)
    config = hugging_face.read_config(place)
    safetensors_weights.check(place, config)
    return config


def load(
    path: str | pathlib.Path, shardings: Any = None, dtype_of: Callable[[str], Any] = lambda name: np.float32
) -> tuple[ModelConfig, dict[str, Any]]:
    """Loads a model.

    Args:
        path: as for `locate`.
        shardings: of each parameter, in the tree of `parameters.parameter_shapes`: a Hugging Face directory is then read straight onto devices, by
            each process what its own hold. None = onto the host, as a GGUF file always is.
        dtype_of: from a parameter's name to the type it is kept in.

    Returns:
        The model's sizes, and its parameters in the tree of `parameters.parameter_shapes`: NumPy arrays, or arrays that lie as `shardings` say.

    Raises:
        ValueError: as for `read_config`; or a tensor holds a number that is not finite.
        FileNotFoundError: as for `read_config`.
    """
    place = locate(path)
    if not place.is_dir():
        config, params = gguf_weights.load(place)
        return config, jax.tree_util.tree_map_with_path(lambda path, leaf: leaf.astype(dtype_of(path[-1].key), copy=False), params)
    config = hugging_face.read_config(place)
    return config, safetensors_weights.load(place, config, shardings, dtype_of)
