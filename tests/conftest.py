"""Tests run on eight CPU devices, with strict rank and dtype promotion; any warning is an error (setup.cfg)."""

import gc
import os
import pathlib

import jax
import pytest

# Eight devices on a busy machine of two cores: the 40 s that XLA gives them to meet in an exchange would abort the process.
MEETING = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {MEETING}".strip()
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

MAPS = pathlib.Path("/proc/self/maps")  # on Linux
MANY_MAPS = 20_000


@pytest.fixture(autouse=True, scope="module")
def few_compiled_programs():
    """Every compiled program takes some memory maps, of which Linux grants a process 65,530; past that XLA's compiler crashes."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MANY_MAPS:
        jax.clear_caches()
        gc.collect()
