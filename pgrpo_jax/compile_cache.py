"""What JAX compiles, kept on disk: a process that starts again reaches its first step without compiling. Not a bit depends on it."""

import hashlib
import os
import pathlib
import platform
import warnings
import zlib

import jax
from etils import epath

_ZLIB = b"\x78"  # the first byte of what JAX packs with zlib
_SAME_CODE = ("model name", "flags", "Features")  # lines of /proc/cpuinfo that tell which instructions a CPU has, and how they are chosen


def use(directory: str, *, workdir: epath.PathLike) -> str:
    """Makes JAX keep and find what it compiles, in this process from now on; call it before anything is compiled.

    A directory that JAX_COMPILATION_CACHE_DIR names stays as it is. Compiled code is of one kind of CPU: each kind has a directory of its own below.
    Entries that were torn by a kill are deleted, as JAX would neither use nor replace them.

    Args:
        directory: `compile_cache` of the configuration: relative to `workdir`, absolute, or in a bucket; "" = off.
        workdir: the run directory.

    Returns:
        Where it lies; "" where it is off. Nothing is made there before the first compilation.

    Raises:
        PermissionError: nothing could be written there.
        NotADirectoryError: it, or a part of its path, is a file.
    """
    if not directory or jax.config.jax_compilation_cache_dir:
        return jax.config.jax_compilation_cache_dir or ""
    path = (epath.Path(directory) if "://" in directory else epath.Path(workdir) / directory) / cpu_kind()
    where = os.fspath(path) if "://" in os.fspath(path) else os.path.abspath(path)
    if "://" not in where:
        _check(pathlib.Path(where), directory)
        _sweep(pathlib.Path(where))
    jax.config.update("jax_compilation_cache_dir", where)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # all of it: the many small programs add up to seconds
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # An entry that another process is just writing, or that can not be read or written: then it is compiled, no more.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache entry")
    return where


def cpu_kind() -> str:
    """Returns a name for machines whose CPUs take the same compiled code: the kind of machine, and a digest of the CPU's model and instructions."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = [f"model name: {platform.processor()}"]
    told = sorted({line for line in lines if line.startswith(_SAME_CODE)})
    return f"{platform.machine()}-{hashlib.sha256(repr(told).encode()).hexdigest()[:12]}"


def _check(path: pathlib.Path, directory: str) -> None:
    existing = next(p for p in (path, *path.parents) if p.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"compile_cache = {directory}: {existing} is a file, a directory is needed: give another path, or '' for none")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"compile_cache = {directory}: {existing} may not be written to: give another path, or '' for none")


def _sweep(path: pathlib.Path) -> None:
    """Deletes entries that end too early. Of those not packed with zlib that can not be told: JAX then compiles what it can not read."""
    for entry in path.glob("*-cache"):
        try:
            content = entry.read_bytes()
        except FileNotFoundError:  # another process swept it
            continue
        if not content or (content.startswith(_ZLIB) and not _whole(content)):
            entry.unlink(missing_ok=True)


def _whole(content: bytes) -> bool:
    unpacked = zlib.decompressobj()
    try:
        while content:
            unpacked.decompress(content, 1 << 24)
            content = unpacked.unconsumed_tail
    except zlib.error:
        return False
    return unpacked.eof
