"""Weights from a GGUF file: every tensor of the file and of the model is accounted for.

The header is checked first (gguf_header.py) and the account is settled before the first parameter is allocated; then the
tensors are decoded one by one into their rows, so that the peak of host memory is about the float32 model.
"""

import pathlib
from typing import Any, Mapping

import gguf
import jax
import numpy as np

from pgrpo_jax.models import families, gguf_header
from pgrpo_jax.models.config import ModelConfig
from pgrpo_jax.models.parameters import leaf, parameter_shapes

_DEFAULT_ROPE_THETA = 10000.0  # what llama.cpp assumes where a file names none


def read_config(file: pathlib.Path) -> ModelConfig:
    """Reads a model's sizes from its header and settles the account of its tensors; cheap, the tensor data is not touched.

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
    try:
        family = families.family(header.metadata.get("general.architecture"))
        config = _config(header, family)
        if config.num_layers > len(header.tensors):  # keeps the account below from growing with a lie
            raise ValueError(f"num_layers is {config.num_layers}, the file has only {len(header.tensors)} tensors")
        places = families.placements(family.tensors, config)
        families.settle({name: record.shape for name, record in header.tensors.items()}, places)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return config, header, places


def _config(header: gguf_header.Header, family: families.Family) -> ModelConfig:
    prefix = f"{family.name}."
    # a list where one number is expected (sizes that differ from layer to layer) counts as missing
    single = {key.removeprefix(prefix): value for key, value in header.metadata.items() if isinstance(value, int | float | str)}
    for key, off in family.unsupported.items():
        if single.get(key, off) != off:
            raise ValueError(f"{prefix}{key} is {single[key]!r}, must be {off!r} or absent: the transformer does not compute it")
    sizes = {field: single.get(key) for field, key in family.metadata.items()}
    sizes["vocab_size"] = _vocab_size(header.metadata, sizes["vocab_size"], prefix + family.metadata["vocab_size"])
    if sizes["num_kv_heads"] is None:
        sizes["num_kv_heads"] = sizes["num_heads"]
    if sizes["rope_theta"] is None:
        sizes["rope_theta"] = _DEFAULT_ROPE_THETA
    if sizes["head_dim"] is None:
        sizes["head_dim"] = single.get("rope.dimension_count")
    missing = [prefix + family.metadata[field] for field, value in sizes.items() if value is None]
    if missing:
        raise ValueError(f"metadata holds no single value for {', '.join(missing)}: the file does not describe a model of one layer size")
    for field in ("rope_theta", "norm_epsilon"):
        if type(sizes[field]) is not float:
            raise ValueError(f"{prefix}{family.metadata[field]} is {sizes[field]!r}, must be a floating-point number")
    for key in ("rope.dimension_count", "attention.value_length"):
        if single.get(key, sizes["head_dim"]) != sizes["head_dim"]:
            raise ValueError(f"{prefix}{key} is {single[key]!r}, must be the head size {sizes['head_dim']}: other sizes are not computed")
    return ModelConfig(**sizes, tied_embeddings="output.weight" not in header.tensors)


def _vocab_size(metadata: Mapping[str, Any], stated: int | None, key: str) -> int | None:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if tokens is None:
        return stated
    if not isinstance(tokens, list):
        raise ValueError("tokenizer.ggml.tokens must be a list of strings")
    if stated is not None and stated != len(tokens):
        raise ValueError(f"{key} is {stated}, the tokenizer has {len(tokens)} tokens: they must agree")
    return len(tokens)
