"""The advantage kernel gives the oracle's numbers however it is run: eager, jit, sharded jit, shard_map, pmap, two processes."""

import dataclasses
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
from pgrpo_jax.algorithms import advantages, memory, reward_history
from pgrpo_jax.algorithms.advantages import AdvantageSettings
from pgrpo_jax.algorithms.memory import Memory
from pgrpo_jax.structs import RewardHistory

TOLERANCE = {np.float32: 1e-5, np.float64: 1e-10}
OPTIONS = {"epsilon": 1e-3, "std_floor": 1e-2, "min_count": 8}
SEEDS = range(4)
P_GRPO = oracle.settings_of("p_grpo", **OPTIONS)


def history_of(case: oracle.Case) -> RewardHistory:
    dtype = case.rewards.dtype
    count, mean, deviation = np.array([oracle.moments(values) for values in case.past]).T
    moments = {"mean": mean.astype(dtype), "m2": (count * deviation**2).astype(dtype)}
    return RewardHistory(count=count.astype(np.int32), weight=np.ones(len(count), dtype), **moments)


def arguments(case: oracle.Case):
    ids = case.preference_ids
    return case.rewards, case.prompt_index, ids, ids, np.zeros_like(ids), case.mask, history_of(case)


def eager(settings: AdvantageSettings, num_prompts: int):
    return functools.partial(advantages.estimate, settings=settings, num_prompts=num_prompts)


def jitted(settings, num_prompts):
    return jax.jit(eager(settings, num_prompts))


def sharded_jit(settings, num_prompts):
    mesh = Mesh(np.array(jax.devices()), ("rows",))
    rows, everywhere = NamedSharding(mesh, PartitionSpec("rows")), NamedSharding(mesh, PartitionSpec())
    compiled = jitted(settings, num_prompts)

    def run(*args):
        args = jax.device_put(args, (rows,) * 6 + (everywhere,))
        assert len(args[0].sharding.device_set) == 8
        return compiled(*args)

    return run


def shard_mapped(settings, num_prompts):
    mesh = Mesh(np.array(jax.devices()), ("rows",))
    rows, everywhere = PartitionSpec("rows"), PartitionSpec()
    per_device = functools.partial(eager(settings, num_prompts), axis_name="rows")
    # check_vma (on by default) proves that history and diagnostics are the same on every device.
    return jax.jit(
        jax.shard_map(per_device, mesh=mesh, in_specs=(rows,) * 6 + (everywhere,), out_specs=(rows, everywhere, everywhere))
    )


def pmapped(settings, num_prompts):
    """The learner's kernel."""
    return parallel.advantage_kernel(settings, jax.devices(), num_prompts=num_prompts)


MODES = [eager, jitted, sharded_jit, shard_mapped, pmapped]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", oracle.PARTS)
def test_equals_the_loops(name, mode, dtype):
    run = None
    with jax.enable_x64(dtype == np.float64):
        for seed in SEEDS:
            case = oracle.random_case(seed, dtype)
            run = run or mode(oracle.settings_of(name, **OPTIONS), case.num_prompts)
            result = run(*arguments(case))
            assert all(x.dtype == dtype for x in (result[0], result[1].mean, result[1].m2, result[2].bias))
            oracle.assert_matches(result, case, name, tolerance=TOLERANCE[dtype], **OPTIONS)


# Every option at least once, and those that touch the same numbers together.
EVERY_OPTION = {
    "cohort, none": {"baseline": "cohort", "scale": "none"},
    "leave one out, batch": {"baseline": "leave_one_out", "scale": "batch"},
    "batch, batch, sample": {"baseline": "batch", "scale": "batch", "deviation": "sample"},
    "none, cohort, sample": {"baseline": "none", "scale": "cohort", "deviation": "sample"},
    "ema and the rest": {
        "memory": Memory("ema", 9.0), "shrinkage": 2.0, "blend": 0.3, "staleness_half_life": 3.0, "staleness_limit": 4, "timing": "after",
    },
    "window": {"memory": Memory("window", 2.0), "cold_start": "pooled", "deviation": "sample", "min_count": 12.0, "staleness_limit": 3},
    "discounted": {"baseline": "cohort", "memory": Memory("discounted", 1.5), "cold_start": "zero", "min_count": 12.0, "timing": "after"},
    "components": {"component_weights": (1.0, -0.5), "memory": Memory("window", 3.0), "shrinkage": 5.0, "staleness_half_life": 2.0},
}  # fmt: skip


def assert_follows(run, s: AdvantageSettings, dtype) -> None:
    """Several batches, the history handed from one to the next."""
    components = len(s.component_weights)
    steps = list(oracle.random_steps(len(s.baseline), 4, dtype=dtype, components=components))
    history = memory.init(s.memory, oracle.K, dtype, num_components=components or None)
    close = functools.partial(oracle.assert_close, tolerance=TOLERANCE[dtype])
    for step, (expected, counts, remembered) in zip(steps, oracle.every_step(steps, s), strict=True):
        found, history, diagnostics = run(*step, history)
        assert {x.dtype for x in (found, history.weight, history.mean, history.m2, diagnostics.bias)} == {np.dtype(dtype)}
        close(found, expected, what="advantages")
        assert np.all(np.asarray(found)[~step.mask] == 0)
        close(diagnostics.effective_count, counts, what="effective count")
        first = jax.tree.map(lambda x: x[0], history) if components else history
        past = memory.read(s.memory, first)
        for values, column in zip((reward_history.effective_count(past), past.mean, past.m2), remembered.T, strict=True):
            close(values, column, what="history")
        mine = [int(np.sum(step.preference_ids[step.mask] == k)) for k in range(oracle.K)]
        np.testing.assert_array_equal(diagnostics.batch_count, mine)


# Each mode in one dtype: what a mode does to a dtype is tested above, and compiling takes seconds.
@pytest.mark.parametrize("mode, dtype", [(eager, np.float32), (jitted, np.float64), (shard_mapped, np.float64), (pmapped, np.float32)])
@pytest.mark.parametrize("name", EVERY_OPTION)
def test_every_option_equals_the_loops_over_several_batches(name, mode, dtype):
    s = dataclasses.replace(AdvantageSettings(epsilon=1e-3, std_floor=1e-2, min_count=4.0), **EVERY_OPTION[name])
    with jax.enable_x64(dtype == np.float64):
        assert_follows(mode(s, oracle.P), s, dtype)


def test_every_option_is_there():
    seen = {field: {changes[field] for changes in EVERY_OPTION.values() if field in changes} for field in vars(P_GRPO)}
    for field, known in (("baseline", advantages.BASELINES), ("scale", advantages.SCALES), ("cold_start", advantages.COLD_STARTS)):
        assert seen[field] | {getattr(AdvantageSettings(), field)} == set(known), field
    assert {m.kind for m in seen["memory"]} | {"cumulative"} == set(memory.KINDS)
    assert [field for field, values in seen.items() if not values] == ["epsilon", "std_floor"]


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
    result = pmapped(P_GRPO, case.num_prompts)(*arguments(case))
    assert result[0].shape == (rows,)
    oracle.assert_matches(result, case, "p_grpo", tolerance=1e-5, **OPTIONS)


def test_pmap_over_fewer_devices_and_device_arrays():
    case = oracle.random_case(2, np.float32)
    for num_devices in (1, 3):
        kernel = parallel.advantage_kernel(P_GRPO, jax.devices()[:num_devices], num_prompts=case.num_prompts)
        result = kernel(*jax.device_put(arguments(case)))
        oracle.assert_matches(result, case, "p_grpo", tolerance=1e-5, **OPTIONS)


def test_history_is_equal_on_every_device():
    case = oracle.random_case(3, np.float32)
    per_device = functools.partial(eager(P_GRPO, case.num_prompts), axis_name=parallel.AXIS)
    run = parallel.pmapped(per_device, devices=jax.devices(), in_axes=(0,) * 6 + (None,))
    *rows, past = arguments(case)
    _, history, diagnostics = run(*(x.reshape(8, -1) for x in rows), past)
    for leaf in jax.tree.leaves((history, diagnostics)):
        assert leaf.shape == (8, 5) and np.array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))


def test_no_device_of_this_process_is_an_error():
    elsewhere = types.SimpleNamespace(process_index=jax.process_index() + 1)
    with pytest.raises(ValueError, match="0 of 1 devices .* must be at least 1"):
        parallel.advantage_kernel(P_GRPO, [elsewhere], num_prompts=1)


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
