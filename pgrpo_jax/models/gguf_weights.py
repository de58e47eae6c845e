"""Weights from a GGUF file: every tensor of the file and of the model is accounted for.

The header is checked first (gguf_header.py) and the account is settled before the first parameter is allocated; then the
tensors are decoded one by one into their rows, so that the peak of host memory is about the float32 model.
"""

import pathlib
from typing import Any

import gguf
import jax
import numpy as np

from pgrpo_jax.models import families, gguf_families, gguf_header
from pgrpo_jax.models.config import ModelConfig
from pgrpo_jax.models.parameters import leaf, parameter_shapes


def read_config(file: pathlib.Path) -> ModelConfig:
    """Reads a model's sizes from its header and settles the account of its tensors; cheap, the weights are not touched.

    Args:
        file: a GGUF file.

    Returns:
        The model's sizes.

    Raises:
        ValueError: the file is damaged, of an unknown family, or its tensors are not those of its sizes.
    """
    config, _, _ = _checked_header(file)
    return config


def load(file: pathlib.Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Loads a model.

    Args:
        file: a GGUF file.

    Returns:
        The model's sizes, and its parameters as NumPy float32 arrays in the tree of `parameter_shapes`.

    Raises:
        ValueError: as `read_config`; or a tensor holds a number that is not finite.
    """
    config, header, places = _checked_header(file)
    parameters = jax.tree.map(lambda spec: np.empty(spec.shape, spec.dtype), parameter_shapes(config))
    data = np.memmap(file, np.uint8, "r")
    for name, place in places.items():
        array = _decoded(data, header.tensors[name])
        if not np.isfinite(array).all():
            raise ValueError(f"tensor {name!r} of {file} holds numbers that are not finite: download the file again and compare its sha256")
        target = leaf(parameters, place.rule.path)
        target[place.row] = families.to_parameter(array, place)
    return config, parameters


def _decoded(data: np.ndarray, record: gguf_header.TensorRecord) -> np.ndarray:
    """Returns a tensor as float32 [record.shape]."""
    raw = data[record.offset : record.offset + record.num_bytes]
    rows = raw.reshape(gguf.quant_shape_to_byte_shape(record.shape, record.kind))
    with np.errstate(all="ignore"):  # a damaged scale overflows here; the caller looks at the result
        return gguf.dequantize(rows, record.kind)


def _checked_header(file: pathlib.Path) -> tuple[ModelConfig, gguf_header.Header, dict[str, families.Placement]]:
    header = gguf_header.read(file)
    tensors = dict(header.tensors)
    try:
        family = gguf_families.family(header.metadata.get("general.architecture"))
        config = gguf_families.to_model_config(header)
        if family.rope_factors and (factors := tensors.pop(gguf_families.ROPE_FACTORS, None)) is not None:
            if factors.shape != (config.head_dim // 2,):
                raise ValueError(f"{factors.name} is {factors.shape}, must be ({config.head_dim // 2},): use a file made for this architecture")
            config = gguf_families.with_rope_factors(config, _decoded(np.memmap(file, np.uint8, "r"), factors))
        places = families.placements(family.tensors, config)
        families.settle({name: record.shape for name, record in tensors.items()}, places)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return config, header, places
