"""A program that starts again compiles nothing, and ends in the same bits: what was compiled lies on the disk (pgrpo_jax/compile_cache.py)."""

import json
import pathlib
import sys

import program
import pytest

COUNT = pathlib.Path(__file__).parent / "count_compilations.py"
SHORT = {"num_steps": 4}


def run(workdir, **changes):
    """Runs to its end with JAX's cache where the configuration puts it; returns (programs JAX asked for, found, compiled)."""
    target = workdir.with_suffix(".json")
    line = [sys.executable, str(COUNT), str(target), *program.command(workdir, **(SHORT | changes))[1:]]
    done = program.run(line)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    found = json.loads(target.read_text())
    return found["compile_requests_use_cache"], found["cache_hits"], found["cache_misses"]


@pytest.fixture(scope="module")
def cold(tmp_path_factory):
    """(run directory, what was counted) of a run that found nothing."""
    workdir = tmp_path_factory.mktemp("cold") / "run"
    return workdir, run(workdir)


def test_the_second_process_compiles_nothing_and_ends_in_the_same_bits(cold, tmp_path):
    workdir, (asked, found, compiled) = cold
    assert asked == compiled > 10 and found == 0
    entries = program.files(workdir / "compile_cache")
    assert len(entries) == compiled
    cache = workdir / "compile_cache"
    assert run(tmp_path / "run", compile_cache=cache) == (asked, asked, 0)
    ours, theirs = program.records(tmp_path / "run"), program.records(workdir)
    for record in (ours, theirs):
        assert record["summary"]["config"].pop("compile_cache")
    assert ours == theirs and len(ours["metrics"]) == SHORT["num_steps"]
    assert program.files(cache) == entries and not (tmp_path / "run" / "compile_cache").exists()


def test_a_run_that_was_stopped_goes_on_without_compiling(cold, tmp_path):
    workdir, cache = tmp_path / "run", cold[0] / "compile_cache"
    line = program.command(workdir, at=["SIGTERM", "after:pgrpo_jax.learner:update", 2], **SHORT, compile_cache=cache)
    stopped = program.run(line)
    assert stopped.returncode == 75, stopped.stderr
    asked, found, compiled = run(workdir, compile_cache=cache)
    assert asked == found > 0 == compiled
    assert program.summary(workdir)["state_sha256"] == program.summary(cold[0])["state_sha256"]


def test_off_is_off(tmp_path):
    assert run(tmp_path / "run", compile_cache="", num_steps=1)[1:] == (0, 0)
    assert not (tmp_path / "run" / "compile_cache").exists()


def test_a_directory_that_can_not_be_used_is_one_line(tmp_path):
    (tmp_path / "file").write_text("kept")
    lines = program.errors(program.run(program.command(tmp_path / "run", compile_cache=tmp_path / "file")))
    file = tmp_path / "file"
    assert lines == [f"compile_cache = {file}: {file} is a file, a directory is needed: give another path, or '' for none"]
    assert not (tmp_path / "run").exists()
