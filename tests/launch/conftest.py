"""One undisturbed run of the small configuration, for every test that compares with it or reads it."""

import program
import pytest


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """What JAX compiles, kept between processes; it does not change a bit (the matrices in test_resume.py compare with runs without it)."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, cache):
    """The directory of a finished run; leave it as it is."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    done = program.run(program.command(workdir, **program.LONG), cache=cache)
    assert (done.returncode, done.stderr) == (0, "")
    return workdir
