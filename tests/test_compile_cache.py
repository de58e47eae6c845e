"""Where compiled code is kept: which directory, for which kind of CPU; entries that a kill tore are gone. Whole programs: tests/launch/test_warm_start.py."""

import os
import pathlib
import warnings
import zlib

import jax
import pytest

from pgrpo_jax import compile_cache


@pytest.fixture(autouse=True)
def unchanged():
    """JAX is as it was before: no test here compiles anything."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_persistent_cache_min_entry_size_bytes")
    before = {name: getattr(jax.config, name) for name in names}
    with warnings.catch_warnings():
        jax.config.update(names[0], None)
        yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.parametrize(
    "directory, where",
    [("compile_cache", "{run}/compile_cache"), ("../shared", "{parent}/shared"), ("{parent}/x", "{parent}/x"), ("gs://bucket/x", "gs://bucket/x")],
)
def test_where_it_lies(directory, where, tmp_path):
    names = {"run": tmp_path / "run", "parent": tmp_path}
    used = compile_cache.use(directory.format(**names), workdir=tmp_path / "run")
    assert used == jax.config.jax_compilation_cache_dir == f"{where.format(**names)}/{compile_cache.cpu_kind()}"
    assert list(tmp_path.iterdir()) == [], "nothing is made before something is compiled"


def test_in_a_bucket_it_lies_beside_the_run():
    assert compile_cache.use("compile_cache", workdir="gs://bucket/run") == f"gs://bucket/run/compile_cache/{compile_cache.cpu_kind()}"


def test_a_relative_run_directory_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert compile_cache.use("compile_cache", workdir="run") == f"{tmp_path}/run/compile_cache/{compile_cache.cpu_kind()}"


def test_off_and_the_environment_s_own(tmp_path):
    assert compile_cache.use("", workdir=tmp_path) == "" and jax.config.jax_compilation_cache_dir is None
    jax.config.update("jax_compilation_cache_dir", "/elsewhere")
    assert compile_cache.use("compile_cache", workdir=tmp_path) == jax.config.jax_compilation_cache_dir == "/elsewhere"


def test_another_cpu_has_another_directory(monkeypatch):
    """Code for instructions that a CPU lacks would crash it."""
    info = "processor : 0\ncpu MHz : {}\nmodel name : {}\nflags : fpu {}\n"
    kinds = []
    for values in [(1000, "a", "avx2"), (2000, "a", "avx2"), (1000, "b", "avx2"), (1000, "a", "avx512f")]:
        text = info.format(*values) * 2
        monkeypatch.setattr(pathlib.Path, "read_text", lambda self, text=text: text)
        kinds.append(compile_cache.cpu_kind())
    assert kinds[0] == kinds[1] and len(set(kinds)) == 3 and all(kind.startswith(os.uname().machine) for kind in kinds)


def test_torn_entries_are_deleted_and_whole_ones_stay(tmp_path):
    """Every length of an entry; one that another packer made; an entry of noise; what is no entry."""
    content = zlib.compress(os.urandom(500) + bytes(5000))
    folder = tmp_path / "cache" / compile_cache.cpu_kind()
    folder.mkdir(parents=True)
    for size in range(len(content)):
        (folder / f"{size}-cache").write_bytes(content[:size])
    flipped = bytearray(content)
    flipped[300] ^= 4
    (folder / "flipped-cache").write_bytes(flipped)
    kept = {"whole-cache": content, "zstd-cache": b"\x28\xb5\x2f\xfd" + content, "note": content[:9]}
    for name, bytes_ in kept.items():
        (folder / name).write_bytes(bytes_)
    compile_cache.use("cache", workdir=tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == kept


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"compile_cache = file/x: \S+/file is a file, a directory is needed: give another path, or '' for none"):
        compile_cache.use("file/x", workdir=tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_may_not_be_written_to(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="may not be written to: give another path, or '' for none"):
        compile_cache.use("cache", workdir=tmp_path)
