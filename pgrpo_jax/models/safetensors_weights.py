"""Weights of a Hugging Face directory: safetensors in one file or in several with an index, read slice by slice and written.

The library checks each file's header (offsets that overlap, lengths that overflow, unknown types, bytes that nobody names); the index and the account of
tensors are checked here, before the first parameter is allocated. A reader takes of each tensor what one device holds, so that the peak of host memory
is about the largest piece of a parameter on one device.
"""

import contextlib
import json
import pathlib
from typing import Any, Callable, Iterator, Mapping

import jax
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from pgrpo_jax.models import families
from pgrpo_jax.models.config import ModelConfig
from pgrpo_jax.models.parameters import leaf, parameter_shapes

_INDEX, _ONE = "model.safetensors.index.json", "model.safetensors"
_MOST_INDEX_BYTES = 2**26
_SHARD_BYTES = 5 * 10**9  # of a file that is written, as transformers cuts them
DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}  # of tensors
_READ = {"F32", "F16", "BF16"}


def shards(directory: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files that hold a model's tensors.

    Raises:
        FileNotFoundError: there are none, or some that the index names are missing.
        ValueError: the index is damaged, or names a file outside the directory.
    """
    index = directory / _INDEX
    if not index.is_file():
        if not (directory / _ONE).is_file():
            raise FileNotFoundError(f"neither {_ONE} nor {_INDEX} in {directory}: download the model's safetensors")
        return [directory / _ONE]
    names = sorted(set(_weight_map(index).values()))
    if missing := [name for name in names if not (directory / name).is_file()]:
        raise FileNotFoundError(f"{len(missing)} of {len(names)} shards that {index} names are missing: {', '.join(missing)}; download them")
    return [directory / name for name in names]


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    if index.stat().st_size > _MOST_INDEX_BYTES:
        raise ValueError(f"{index} has {index.stat().st_size} bytes, at most {_MOST_INDEX_BYTES}: it is not an index of safetensors")
    try:
        found = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{index} is not JSON ({error}): download it again") from None
    names = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index} holds no weight_map from tensors to files: download it again")
    for name in names.values():
        if pathlib.PurePath(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise ValueError(f"{index} names the file {name!r}: a shard is a .safetensors file beside its index, nothing else is opened")
    return names


@contextlib.contextmanager
def _opened(directory: pathlib.Path, config: ModelConfig) -> Iterator[tuple[dict[str, Any], dict[str, families.Placement]]]:
    """Opens all shards and settles the account: (tensor name -> its opened file, placements)."""
    with contextlib.ExitStack() as open_files:
        files = {}
        for path in shards(directory):
            try:
                opened = open_files.enter_context(safetensors.safe_open(path, "np"))
            except safetensors.SafetensorError as error:
                raise ValueError(f"{path} is damaged ({error}): download it again and compare its sha256") from None
            for name in opened.keys():
                if name in files:
                    raise ValueError(f"tensor {name!r} lies in two shards of {directory}: download the model again")
                files[name] = opened
        found = {name: opened.get_slice(name) for name, opened in files.items() if not _idle(name, config)}
        if wrong := sorted({f"{name} is {tensor.get_dtype()}" for name, tensor in found.items() if tensor.get_dtype() not in _READ}):
            raise ValueError(f"tensors of {directory} are of types that are not read: {', '.join(wrong[:3])}; use a file in {', '.join(DTYPES)}")
        try:
            if config.num_layers * max(1, config.num_experts) > len(found):  # or the account would grow with a lie
                of_experts = f" with num_experts {config.num_experts}" if config.num_experts else ""
                raise ValueError(f"num_layers is {config.num_layers}{of_experts}, the files have only {len(found)} tensors")
            places = families.placements(families.hugging_face_rules(config), config)
            families.settle({name: tuple(tensor.get_shape()) for name, tensor in found.items()}, places)
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from None
        yield files, places


def _idle(name: str, config: ModelConfig) -> bool:
    """Whether a tensor says nothing that is not known: a head that is the embedding, the rotary frequencies of old files."""
    return name.endswith("rotary_emb.inv_freq") or (config.tied_embeddings and name == "lm_head.weight")


def check(directory: pathlib.Path, config: ModelConfig) -> None:
    """Settles the account of a directory's tensors; their data is not touched.

    Raises:
        FileNotFoundError: a shard is missing.
        ValueError: a file is damaged, or its tensors are not those of the model.
    """
    with _opened(directory, config):
        pass


def load(
    directory: pathlib.Path, config: ModelConfig, shardings: Any = None, dtype_of: Callable[[str], Any] = lambda name: np.float32
) -> dict[str, Any]:
    """Loads a model.

    Args:
        directory: with safetensors under the names of transformers.
        config: the model's sizes.
        shardings: of each parameter, in the tree of `parameter_shapes`; None = NumPy arrays.
        dtype_of: from a parameter's name to the type it is kept in.

    Returns:
        Parameters: NumPy arrays, or arrays that lie as `shardings` say, of which each process reads what its own devices hold.

    Raises:
        FileNotFoundError: as `check`.
        ValueError: as `check`; or a tensor holds a number that is not finite.
    """
    with _opened(directory, config) as (files, places):
        sources: dict[tuple[str, ...], list[tuple[str, families.Placement]]] = {}
        for name, place in places.items():
            sources.setdefault(place.rule.path, []).append((name, place))

        def parameter(path: Any, spec: Any, sharding: Any = None) -> Any:
            of, dtype = sources[tuple(key.key for key in path)], dtype_of(path[-1].key)
            if sharding is None:
                return _piece(files, of, spec.shape, (slice(None),) * len(spec.shape), dtype)
            pieces = [  # one after the other: left to itself JAX would gather those of all devices first
                jax.block_until_ready(jax.device_put(_piece(files, of, spec.shape, index, dtype), device))
                for device, index in sharding.addressable_devices_indices_map(spec.shape).items()
            ]
            return jax.make_array_from_single_device_arrays(spec.shape, sharding, pieces)

        rest = () if shardings is None else (shardings,)
        return jax.tree_util.tree_map_with_path(parameter, parameter_shapes(config), *rest)


def _piece(files: Mapping[str, Any], sources: list[tuple[str, families.Placement]], shape: tuple[int, ...], index: tuple[slice, ...], dtype: Any) -> np.ndarray:
    """Reads a part of one parameter, of `shape` cut by `index`."""
    spans = [range(size)[cut] for size, cut in zip(shape, index, strict=True)]
    stacked = len(sources[0][1].row)
    if not stacked:
        return _finite(*sources[0], files, spans).astype(dtype, copy=False)
    out = np.empty([len(span) for span in spans], dtype)
    for name, place in sources:
        if all(row in span for row, span in zip(place.row, spans)):
            at = tuple(row - span.start for row, span in zip(place.row, spans))
            out[at] = _finite(name, place, files, spans[stacked:])
    return out


def _finite(name: str, place: families.Placement, files: Mapping[str, Any], spans: list[range]) -> np.ndarray:
    part = _read(files[name].get_slice(name), place, spans)
    if not np.isfinite(part).all():
        raise ValueError(f"tensor {name!r} holds numbers that are not finite: download the model again and compare its sha256")
    return part


def _read(tensor: Any, place: families.Placement, spans: list[range]) -> np.ndarray:
    """Reads of one tensor what belongs to a part of its parameter; only the first axis of its inputs and of its outputs may be cut."""
    lengths, split = [len(span) for span in spans], place.rule.input_axes
    if not split and not place.rule.flat:
        return tensor[tuple(slice(span.start, span.stop) for span in spans)].astype(np.float32, copy=False)
    rows, columns = (_joined(place.shape[part], spans[part]) for part in (slice(split, None), slice(split)))
    if place.rule.flat:
        return tensor[rows].astype(np.float32, copy=False).reshape(lengths)
    return tensor[rows, columns].astype(np.float32, copy=False).T.reshape(lengths)


def _joined(shape: tuple[int, ...], spans: list[range]) -> slice:
    """The part of some axes, laid one behind the other, where only the first is cut."""
    rest = [(size, len(span)) for size, span in zip(shape[1:], spans[1:])]
    if any(size != length for size, length in rest):
        raise ValueError(f"axes {shape} are cut behind the first one: shard the first axis of a matrix's inputs and outputs (parameters.SHARDED_AXES)")
    size = int(np.prod([size for size, _ in rest], initial=1))
    return slice(spans[0].start * size, spans[0].stop * size) if spans else slice(0, 1)


def save(directory: pathlib.Path, config: ModelConfig, params: Any, *, dtype: str = "float32") -> None:
    """Writes a model's tensors under the names of transformers, a file of 5 GB after the other.

    Args:
        directory: there already; files of another model in it are not looked at.
        config: the model's sizes.
        params: parameters in the tree of `parameter_shapes`, on the host or on devices of this process.
        dtype: of `DTYPES`.

    Raises:
        ValueError: a tensor holds a number that is not finite, or has none in this type.
    """
    places = families.placements(families.hugging_face_rules(config), config)
    files_of: list[dict[str, families.Placement]] = [{}]
    held = 0
    for name, place in places.items():
        size = int(np.prod(place.source_shape)) * DTYPES[dtype].itemsize
        if files_of[-1] and held + size > _SHARD_BYTES:
            files_of.append({})
            held = 0
        files_of[-1][name] = place
        held += size
    names = [_ONE] if len(files_of) == 1 else [f"model-{n:05d}-of-{len(files_of):05d}.safetensors" for n in range(1, len(files_of) + 1)]
    for file, of in zip(names, files_of, strict=True):
        safetensors.numpy.save_file({name: _tensor(params, name, place, dtype) for name, place in of.items()}, directory / file, metadata={"format": "pt"})
    if len(files_of) > 1:
        total = sum(int(np.prod(place.source_shape)) for place in places.values()) * DTYPES[dtype].itemsize
        weight_map = {name: file for file, of in zip(names, files_of, strict=True) for name in of}
        (directory / _INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2))


def _tensor(params: Any, name: str, place: families.Placement, dtype: str) -> np.ndarray:
    array = np.asarray(leaf(params, place.rule.path)[place.row])
    with np.errstate(over="ignore"):  # it is looked for below
        written = np.ascontiguousarray(families.from_parameter(array, place).astype(DTYPES[dtype]))
    if not np.isfinite(written).all():
        raise ValueError(
            f"tensor {name!r} reaches to {np.abs(array).max():g}, the largest finite {dtype} is {ml_dtypes.finfo(DTYPES[dtype]).max:g}: "
            "write it as float32, or bfloat16; where that is not finite either the policy is damaged"
        )
    return written
