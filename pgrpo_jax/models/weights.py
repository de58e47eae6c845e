"""A model's files, wherever they come from: a GGUF file, or a Hugging Face directory of safetensors."""

import hashlib
import pathlib
from typing import Any

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


def load(path: str | pathlib.Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Loads a model.

    Args:
        path: as for `locate`.

    Returns:
        The model's sizes, and its parameters as NumPy float32 arrays in the tree of `parameters.parameter_shapes`.

    Raises:
        ValueError: as for `read_config`; or a tensor holds a number that is not finite.
        FileNotFoundError: as for `read_config`.
    """
    place = locate(path)
    if not place.is_dir():
        return gguf_weights.load(place)
    config = hugging_face.read_config(place)
    return config, safetensors_weights.load(place, config)
