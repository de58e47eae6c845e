"""The header of a GGUF model file, read with bounds: nothing is allocated that the file does not pay for in bytes.

Model files come from strangers. Each count, length and offset is checked against what is left of the file before it is used,
so that a truncated or hostile file ends in one ValueError. The format is that of GGUF version 2 and 3, little-endian:
magic, version, two counts, key/value pairs, tensor records, padding, tensor data.
"""

import math
import mmap
import pathlib
import struct
from typing import Any, Mapping, NamedTuple

import gguf
import numpy as np

_VERSIONS = (2, 3)
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_MAX_DIMENSIONS = 4
_MAX_NAME_BYTES = 256
_MAX_ENTRIES = 2**16  # key/value pairs; also tensors
_MAX_STRINGS = 2**22  # in the whole header: a Python string takes several times its bytes in the file
_DEFAULT_ALIGNMENT = 32
_KINDS = tuple(
    gguf.GGMLQuantizationType[name] for name in "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K".split()
)


class TensorRecord(NamedTuple):
    """Where a tensor lies in the file.

    Attributes:
        name: unique in the file.
        shape: in NumPy order, the last axis contiguous.
        kind: how its numbers are coded.
        offset: bytes from the start of the file.
        num_bytes: size of its data in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    offset: int
    num_bytes: int


class Header(NamedTuple):
    """What a GGUF file says before its tensor data.

    Attributes:
        metadata: key -> int, float, bool, str, list of str, or NumPy array of numbers.
        tensors: name -> record; every record lies within the file.
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorRecord]


class _Cursor:
    """Reads forwards through bytes and never beyond their end."""

    def __init__(self, data: mmap.mmap):
        self.data = data
        self.position = 0
        self.strings_left = _MAX_STRINGS

    def take(self, size: int, what: str) -> bytes:
        left = len(self.data) - self.position
        if size > left:
            raise ValueError(f"{what} needs {size} bytes at byte {self.position}, {left} are left")
        self.position += size
        return self.data[self.position - size : self.position]

    def number(self, code: str, what: str) -> int | float:
        return struct.unpack(code, self.take(struct.calcsize(code), what))[0]

    def count(self, what: str, *, item_bytes: int, limit: int) -> int:
        value, left = self.number("<Q", what), len(self.data) - self.position
        bound = min(limit, left // item_bytes)
        if value > bound:
            raise ValueError(f"{what} is {value}, at most {bound} with {left} bytes left")
        return value

    def string(self, what: str, limit: int = 2**31) -> str:
        if self.strings_left == 0:
            raise ValueError(f"the header holds more than {_MAX_STRINGS} strings")
        self.strings_left -= 1
        raw = self.take(self.count(f"length of {what}", item_bytes=1, limit=limit), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{what} is not UTF-8 at byte {self.position - len(raw) + error.start}") from None


def read(path: pathlib.Path) -> Header:
    """Reads and checks the header of a GGUF file; the tensor data is not touched.

    Args:
        path: a local file.

    Returns:
        Metadata and tensor records.

    Raises:
        ValueError: the file is no GGUF file, is truncated, or its header contradicts itself or the file's size.
        FileNotFoundError: there is no such file.
    """
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            if size < 24:
                raise ValueError(f"the file has {size} bytes, a GGUF header has at least 24")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(_Cursor(data))
    except ValueError as error:
        raise ValueError(f"cannot read {path} as GGUF: {error}; use a whole, supported GGUF file (compare its sha256)") from None


def _parse(cursor: _Cursor) -> Header:
    if (magic := cursor.take(4, "magic")) != b"GGUF":
        raise ValueError(f"magic is {magic!r}, must be b'GGUF'")
    version = cursor.number("<I", "version")
    if version not in _VERSIONS:
        raise ValueError(f"version is {version}, supported are {_VERSIONS}, little-endian")
    # a tensor record takes at least 32 bytes and a pair 13: absurd counts fail here, before any loop
    num_tensors = cursor.count("tensor count", item_bytes=32, limit=_MAX_ENTRIES)
    num_pairs = cursor.count("key/value count", item_bytes=13, limit=_MAX_ENTRIES)
    metadata: dict[str, Any] = {}
    for index in range(num_pairs):
        key = cursor.string(f"key {index}", _MAX_NAME_BYTES)
        if key in metadata:
            raise ValueError(f"key {key!r} occurs twice")
        metadata[key] = _value(cursor, cursor.number("<I", f"type of {key!r}"), f"value of {key!r}")
    records = [_tensor_record(cursor, index) for index in range(num_tensors)]
    return Header(metadata, _placed(records, cursor, _alignment(metadata)))


def _value(cursor: _Cursor, code: int, what: str) -> Any:
    if code == _STRING:
        return cursor.string(what)
    if code == _ARRAY:
        return _array(cursor, what)
    if code not in _SCALARS:
        raise ValueError(f"type of {what} is {code}, known are {sorted((*_SCALARS, _STRING, _ARRAY))}")
    value = cursor.number(_SCALARS[code], what)
    if code == _BOOL and value not in (0, 1):
        raise ValueError(f"{what} is {value}, a boolean must be 0 or 1")
    return bool(value) if code == _BOOL else value


def _array(cursor: _Cursor, what: str) -> Any:
    code = cursor.number("<I", f"item type of {what}")
    if code == _STRING:
        length = cursor.count(f"length of {what}", item_bytes=8, limit=cursor.strings_left)
        return [cursor.string(f"item {index} of {what}") for index in range(length)]
    if code not in _SCALARS:
        raise ValueError(f"item type of {what} is {code}, known are {sorted((*_SCALARS, _STRING))}; arrays of arrays are not read")
    dtype = np.dtype(_SCALARS[code])
    length = cursor.count(f"length of {what}", item_bytes=dtype.itemsize, limit=len(cursor.data))
    return np.frombuffer(cursor.take(length * dtype.itemsize, what), dtype)


def _alignment(metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r}, must be a power of two")
    return alignment


def _tensor_record(cursor: _Cursor, index: int) -> TensorRecord:
    """Reads one record; its offset is still relative to the start of the tensor data."""
    name = cursor.string(f"name of tensor {index}", _MAX_NAME_BYTES)
    num_dimensions = cursor.number("<I", f"number of dimensions of {name!r}")
    if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
        raise ValueError(f"{name!r} has {num_dimensions} dimensions, must have 1 to {_MAX_DIMENSIONS}")
    shape = tuple(reversed([cursor.number("<Q", f"dimension of {name!r}") for _ in range(num_dimensions)]))
    code = cursor.number("<I", f"type of {name!r}")
    if code not in _KINDS:
        raise ValueError(f"{name!r} has quantisation type {code}, supported are {', '.join(f'{kind.name} ({kind})' for kind in _KINDS)}")
    kind = gguf.GGMLQuantizationType(code)
    block_items, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if min(shape) < 1 or shape[-1] % block_items:
        raise ValueError(f"{name!r} has shape {shape}, every dimension must be at least 1 and the last a multiple of {block_items}")
    num_bytes = math.prod(shape) // block_items * block_bytes
    return TensorRecord(name, shape, kind, cursor.number("<Q", f"offset of {name!r}"), num_bytes)


def _placed(records: list[TensorRecord], cursor: _Cursor, alignment: int) -> dict[str, TensorRecord]:
    """Returns the records by name with absolute offsets.

    Tensors must lie one after another, each aligned: llama.cpp asks the same, and it leaves no room for overlaps.
    """
    start = _aligned(cursor.position, alignment)
    expected, placed = 0, {}
    for record in records:
        if record.name in placed:
            raise ValueError(f"tensor {record.name!r} occurs twice")
        if record.offset != expected:
            raise ValueError(f"tensor {record.name!r} lies at offset {record.offset}, must be {expected}, right after the one before")
        end = start + record.offset + record.num_bytes
        if end > len(cursor.data):
            raise ValueError(f"tensor {record.name!r} ends at byte {end}, the file has {len(cursor.data)}")
        placed[record.name] = record._replace(offset=start + record.offset)
        expected = _aligned(record.offset + record.num_bytes, alignment)
    return placed


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
