"""The advantage kernel gives the oracle's numbers however it is run: eager, jit, sharded jit, shard_map, pmap, two processes."""

import functools
import os
import pathlib
import socket
import subprocess
import sys
import types

import advantage_oracle as oracle
import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pgrpo_jax import parallel
from pgrpo_jax.algorithms import advantages
from pgrpo_jax.structs import RewardHistory

TOLERANCE = {np.float32: 1e-5, np.float64: 1e-10}
OPTIONS = {"epsilon": 1e-3, "std_floor": 1e-2, "min_count": 8}
SEEDS = range(4)


def history_of(case: oracle.Case) -> RewardHistory:
    dtype = case.rewards.dtype
    count, mean, deviation = np.array([oracle.moments(values) for values in case.past]).T
    moments = {"mean": mean.astype(dtype), "m2": (count * deviation**2).astype(dtype)}
    return RewardHistory(count=count.astype(np.int32), weight=np.ones(len(count), dtype), **moments)


def arguments(case: oracle.Case):
    return *case[:4], history_of(case)


def eager(estimator, case):
    return functools.partial(estimator, num_prompts=case.num_prompts, **OPTIONS)


def jitted(estimator, case):
    return jax.jit(eager(estimator, case))


def sharded_jit(estimator, case):
    mesh = Mesh(np.array(jax.devices()), ("rows",))
    rows, everywhere = NamedSharding(mesh, PartitionSpec("rows")), NamedSharding(mesh, PartitionSpec())
    compiled = jitted(estimator, case)

    def run(*args):
        args = jax.device_put(args, (rows, rows, rows, rows, everywhere))
        assert len(args[0].sharding.device_set) == 8
        return compiled(*args)

    return run


def shard_mapped(estimator, case):
    mesh = Mesh(np.array(jax.devices()), ("rows",))
    rows, everywhere = PartitionSpec("rows"), PartitionSpec()
    per_device = functools.partial(eager(estimator, case), axis_name="rows")
    # check_vma (on by default) proves that history and diagnostics are the same on every device.
    return jax.jit(
        jax.shard_map(per_device, mesh=mesh, in_specs=(rows, rows, rows, rows, everywhere), out_specs=(rows, everywhere, everywhere))
    )


def kernel_of(name, devices, case):
    """The learner's kernel, as a function of the same arguments as the estimators."""
    kernel = parallel.advantage_kernel(oracle.settings_of(name, **OPTIONS), devices, num_prompts=case.num_prompts)

    def run(rewards, prompt_index, preference_ids, mask, history):
        return kernel(rewards, prompt_index, preference_ids, preference_ids, np.zeros_like(preference_ids), mask, history)

    return run


def pmapped(estimator, case):
    name = next(name for name, known in oracle.ESTIMATORS.items() if known is estimator)
    return kernel_of(name, jax.devices(), case)


MODES = [eager, jitted, sharded_jit, shard_mapped, pmapped]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", oracle.ESTIMATORS)
def test_equals_the_loops(name, mode, dtype):
    run = None
    with jax.enable_x64(dtype == np.float64):
        for seed in SEEDS:
            case = oracle.random_case(seed, dtype)
            run = run or mode(oracle.ESTIMATORS[name], case)
            result = run(*arguments(case))
            assert all(x.dtype == dtype for x in (result[0], result[1].mean, result[1].m2, result[2].bias))
            oracle.assert_matches(result, case, name, tolerance=TOLERANCE[dtype], **OPTIONS)


def test_the_cases_hold_what_they_promise():
    for seed in SEEDS:
        case = oracle.random_case(seed, np.float64)
        devices_of = [set(np.flatnonzero(case.mask & (case.prompt_index == p)) // 6) for p in range(case.num_prompts)]
        assert max(len(devices) for devices in devices_of) >= 3 and not devices_of[-1] and len(devices_of[0]) == 1
        seen = set(case.preference_ids[case.mask])
        assert 3 in seen and not case.past[3] and 4 not in seen and not case.mask.all() and np.isnan(case.rewards).any()


@pytest.mark.parametrize("rows", [1, 5, 8, 13])
def test_pmap_pads_any_number_of_rows(rows):
    whole = oracle.random_case(1, np.float32)
    case = whole._replace(**{name: getattr(whole, name)[:rows] for name in ("rewards", "prompt_index", "preference_ids", "mask")})
    result = pmapped(oracle.p_grpo, case)(*arguments(case))
    assert result[0].shape == (rows,)
    oracle.assert_matches(result, case, "p_grpo", tolerance=1e-5, **OPTIONS)


def test_pmap_over_fewer_devices_and_device_arrays():
    case = oracle.random_case(2, np.float32)
    for num_devices in (1, 3):
        result = kernel_of("p_grpo", jax.devices()[:num_devices], case)(*jax.device_put(arguments(case)))
        oracle.assert_matches(result, case, "p_grpo", tolerance=1e-5, **OPTIONS)


def test_history_is_equal_on_every_device():
    case = oracle.random_case(3, np.float32)
    per_device = functools.partial(eager(oracle.p_grpo, case), axis_name=parallel.AXIS)
    run = parallel.pmapped(per_device, devices=jax.devices(), in_axes=(0, 0, 0, 0, None))
    _, history, diagnostics = run(*(x.reshape(8, -1) for x in case[:4]), history_of(case))
    for leaf in jax.tree.leaves((history, diagnostics)):
        assert leaf.shape == (8, 5) and np.array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))


def test_no_device_of_this_process_is_an_error():
    elsewhere = types.SimpleNamespace(process_index=jax.process_index() + 1)
    with pytest.raises(ValueError, match="0 of 1 devices .* must be at least 1"):
        parallel.advantage_kernel(oracle.settings_of("p_grpo", **OPTIONS), [elsewhere], num_prompts=1)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_pmap_over_two_processes(dtype, tmp_path):
    case = oracle.random_case(5, dtype, rows=46)  # 23 rows a process, 12 a device: padded
    history = history_of(case)
    fields = {**case._asdict(), **vars(history), **OPTIONS}
    del fields["past"]
    np.savez(tmp_path / "case.npz", **fields)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    here = pathlib.Path(__file__).resolve()
    command = [sys.executable, str(here.with_name("advantage_worker.py")), str(tmp_path), str(port)]
    environment = {**os.environ, "PYTHONPATH": str(here.parents[2])}
    workers = [
        subprocess.Popen([*command, str(process), "2"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for process in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)
    results = []
    for process in range(2):
        with np.load(tmp_path / f"out{process}.npz") as saved:
            results.append({name: saved[name] for name in saved.files})
    together = np.concatenate([result.pop("advantages") for result in results])
    for name, values in results[0].items():
        assert np.array_equal(values, results[1][name]), name
    merged = RewardHistory(**{name: results[0].pop(name) for name in ("count", "weight", "mean", "m2")})
    diagnostics = advantages.Diagnostics(**results[0])
    oracle.assert_matches((together, merged, diagnostics), case, "p_grpo", tolerance=TOLERANCE[dtype], **OPTIONS)
