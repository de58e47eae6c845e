"""The bounded header reader, against the gguf package's own reader and against files made to harm."""

import pathlib
import struct
import tracemalloc

import gguf
import numpy as np
import pytest

from pgrpo_jax.models import gguf_header

MODEL = pathlib.Path(".assets/smollm2-135m/SmolLM2-135M-Instruct.Q4_1.gguf")


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def pair(key, code, payload):
    return text(key) + struct.pack("<I", code) + payload


def record(name="w", dims=(4, 2), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def gguf_bytes(pairs=(), records=(), *, magic=b"GGUF", version=3, num_records=None, num_pairs=None, data=b"\0" * 4096):
    """A GGUF file byte by byte, honest unless told otherwise."""
    counts = (len(records) if num_records is None else num_records, len(pairs) if num_pairs is None else num_pairs)
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(pairs) + b"".join(records)
    return head + b"\0" * (-len(head) % 32) + data


def test_agrees_with_the_gguf_package_on_a_real_file():
    if not MODEL.is_file():
        pytest.fail(f"{MODEL} is missing: run launch/test.sh, which fetches it")
    header, oracle = gguf_header.read(MODEL), gguf.GGUFReader(MODEL)
    for name, field in oracle.fields.items():
        if not name.startswith("GGUF."):
            found = header.metadata[name]
            assert (found.tolist() if isinstance(found, np.ndarray) else found) == field.contents(), name
    assert len(header.metadata) == len(oracle.fields) - 3
    expected = {t.name: (tuple(t.shape[::-1].tolist()), t.tensor_type, t.data_offset, t.n_bytes) for t in oracle.tensors}
    assert {name: found[1:] for name, found in header.tensors.items()} == expected


def test_reads_every_kind_of_value(tmp_path):
    scalars = {"B": 0, "b": 1, "H": 2, "h": 3, "I": 4, "i": 5, "f": 6, "?": 7, "Q": 10, "q": 11, "d": 12}
    pairs = [pair(f"one.{code}", number, struct.pack("<" + code, 1)) for code, number in scalars.items()]
    pairs.append(pair("texts", 9, struct.pack("<IQ", 8, 2) + text("a") + text("½")))
    pairs.append(pair("shorts", 9, struct.pack("<IQ3h", 3, 3, -1, 0, 7)))
    pairs.append(pair("none", 9, struct.pack("<IQ", 5, 0)))
    (tmp_path / "m.gguf").write_bytes(gguf_bytes(pairs, [record(), record("v", (3,), offset=32)]))
    header = gguf_header.read(tmp_path / "m.gguf")
    for code in scalars:
        value = header.metadata[f"one.{code}"]
        assert value == 1 and type(value) is {"f": float, "d": float, "?": bool}.get(code, int)
    assert header.metadata["texts"] == ["a", "½"]
    assert header.metadata["shorts"].tolist() == [-1, 0, 7] and header.metadata["none"].size == 0
    assert header.tensors["w"].shape == (2, 4) and header.tensors["w"].num_bytes == 32
    assert header.tensors["v"].offset == header.tensors["w"].offset + 32


HOSTILE = {
    "empty": (b"", "has 0 bytes"),
    "magic": (gguf_bytes(magic=b"GGML"), "magic is b'GGML'"),
    "version": (gguf_bytes(version=1), "version is 1, supported are"),
    "big-endian": (gguf_bytes(version=3 << 24), "supported are .* little-endian"),
    "tensor count": (gguf_bytes(num_records=2**63), "tensor count is 9223372036854775808, at most 128"),
    "tensor count beyond the file": (gguf_bytes(num_records=200), "tensor count is 200, at most 128"),
    "pair count": (gguf_bytes(num_pairs=2**40), "key/value count is 1099511627776, at most"),
    "key length": (gguf_bytes([struct.pack("<Q", 300) + b"k" * 300]), "length of key 0 is 300, at most 256"),
    "string length": (gguf_bytes([text("k") + struct.pack("<IQ", 8, 2**62)]), "length of value of 'k' is 4611686018427387904"),
    "array length": (gguf_bytes([text("k") + struct.pack("<IIQ", 9, 12, 2**61)]), "length of value of 'k' is 2305843009213693952"),
    "array of strings": (gguf_bytes([text("k") + struct.pack("<IIQ", 9, 8, 600)]), "is 600, at most 51"),
    "array of arrays": (gguf_bytes([text("k") + struct.pack("<IIQ", 9, 9, 1)]), "arrays of arrays are not read"),
    "value type": (gguf_bytes([pair("k", 13, b"")]), "type of value of 'k' is 13"),
    "boolean": (gguf_bytes([pair("k", 7, b"\2")]), "is 2, a boolean must be 0 or 1"),
    "key twice": (gguf_bytes([pair("k", 0, b"\1")] * 2), "key 'k' occurs twice"),
    "not UTF-8": (gguf_bytes([pair("k", 8, text(b"ab\xff"))]), "is not UTF-8 at byte"),
    "alignment": (gguf_bytes([pair("general.alignment", 4, struct.pack("<I", 24))]), "general.alignment is 24, must be a power of two"),
    "alignment zero": (gguf_bytes([pair("general.alignment", 4, struct.pack("<I", 0))]), "general.alignment is 0"),
    "no dimensions": (gguf_bytes(records=[record(dims=())]), "'w' has 0 dimensions"),
    "five dimensions": (gguf_bytes(records=[record(dims=(1,) * 5)]), "'w' has 5 dimensions"),
    "empty dimension": (gguf_bytes(records=[record(dims=(4, 0))]), "every dimension must be at least 1"),
    "product overflows": (gguf_bytes(records=[record(dims=(2**32, 2**32))]), "ends at byte 73786976294838"),
    "product wraps to 0": (gguf_bytes(records=[record(dims=(2**62, 4))]), "ends at byte"),
    "block size": (gguf_bytes(records=[record(dims=(48, 2), kind=8)]), "the last a multiple of 32"),
    "kind": (gguf_bytes(records=[record(kind=16)]), "quantisation type 16, supported are F32"),
    "tensor twice": (gguf_bytes(records=[record(), record(offset=32)]), "tensor 'w' occurs twice"),
    "overlap": (gguf_bytes(records=[record(dims=(16, 2)), record("v", offset=32)]), "'v' lies at offset 32, must be 128"),
    "unaligned": (gguf_bytes(records=[record(), record("v", offset=33)]), "'v' lies at offset 33, must be 32"),
    "offset wraps": (gguf_bytes(records=[record(offset=2**64 - 32)]), "must be 0"),
    "beyond the end": (gguf_bytes(records=[record(dims=(1024, 2))]), "ends at byte .* the file has"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_header_is_one_line_and_allocates_nothing(tmp_path, case):
    content, message = HOSTILE[case]
    (tmp_path / "m.gguf").write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message) as caught:
            gguf_header.read(tmp_path / "m.gguf")
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value) and "m.gguf" in str(caught.value)


def test_strings_are_limited_over_the_whole_header(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_header, "_MAX_STRINGS", 10)
    words = pair("a", 9, struct.pack("<IQ", 8, 5) + text("x") * 5), pair("b", 9, struct.pack("<IQ", 8, 5) + text("x") * 5)
    (tmp_path / "m.gguf").write_bytes(gguf_bytes(words[:1]))
    assert gguf_header.read(tmp_path / "m.gguf").metadata["a"] == ["x"] * 5
    (tmp_path / "m.gguf").write_bytes(gguf_bytes(words))
    with pytest.raises(ValueError, match="length of value of 'b' is 5, at most 3"):
        gguf_header.read(tmp_path / "m.gguf")
