"""Tests run on eight CPU devices, with strict rank and dtype promotion; any warning is an error (setup.cfg)."""

import gc
import pathlib

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
# An exchange between devices holds a thread until all have met, and a program on a mesh of several axes is in several exchanges at once: with no
# more threads than devices, as XLA has on few cores, they wait for each other for ever.
with pytest.MonkeyPatch.context() as environment:  # of this process alone, which reads it now
    environment.setenv("PJRT_NPROC", "64")
    jax.devices()

# Tracing makes many objects and no cycles to speak of: looking for these as often as Python does by default takes a tenth of the time.
gc.set_threshold(200_000, 20, 20)

MAPS = pathlib.Path("/proc/self/maps")  # on Linux
MANY_MAPS = 20_000


@pytest.fixture(autouse=True, scope="module")
def few_compiled_programs():
    """Every compiled program takes some memory maps, of which Linux grants a process 65,530; past that XLA's compiler crashes."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MANY_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def standard_promotion():
    """As `lenient`, for a whole module of runs; that of this package is tested strictly, module by module."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def lenient():
    """Lets dtypes be promoted: optax does so implicitly."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def pytest_terminal_summary(terminalreporter):
    """What tests measured: their property "measured", of those that passed and of those that failed."""
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, value in report.user_properties if getattr(report, "when", None) == "call" else ():
            if name == "measured":
                terminalreporter.write_line(value)
