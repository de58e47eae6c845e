"""Layouts: the table against the model, arrays that come together, and two real processes that train as one."""

import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import learner_cases as cases
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from pgrpo_jax import parallel
from pgrpo_jax.checkpoints import Checkpoints, state_sha256
from pgrpo_jax.generation.engine import generate, GenerationSettings
from pgrpo_jax.generation.sampler import Support
from pgrpo_jax.models import lora
from pgrpo_jax.models.parameters import parameter_shapes, sharding_faults, SHARDED_AXES

MOE = dataclasses.replace(cases.CONFIG, qk_norm=True, num_experts=4, experts_per_token=2, normalised_experts=True)
MESHES = [(8, 1), (4, 2), (2, 2), (1, 2), (1, 1)]  # fsdp, tp, of 8 devices
UNTIED = cases.CONFIG.__class__(**{**vars(cases.CONFIG), "tied_embeddings": False})


def equal(found, expected) -> bool:
    return jax.tree.all(jax.tree.map(np.array_equal, jax.device_get(found), jax.device_get(expected)))


# --- the mesh and the table


@pytest.mark.parametrize("fsdp, tp", MESHES)
def test_a_mesh_has_every_device_once(fsdp, tp):
    mesh = parallel.make_mesh(jax.devices(), fsdp=fsdp, tp=tp)
    assert dict(mesh.shape) == {"data": 8 // (fsdp * tp), "fsdp": fsdp, "expert": 1, "tp": tp}
    assert sorted(d.id for d in mesh.devices.flat) == sorted(d.id for d in jax.devices())


@pytest.mark.parametrize("fsdp, expert, tp", [(3, 1, 1), (4, 1, 4), (0, 1, 1), (1, 1, -1), (2, 3, 1), (1, 0, 1)])
def test_a_mesh_that_does_not_divide_is_refused(fsdp, expert, tp):
    with pytest.raises(ValueError, match=rf"^8 devices do not divide into fsdp {fsdp} x expert {expert} x tp {tp}: set learner.mesh.fsdp[^\n]*$"):
        parallel.make_mesh(jax.devices(), fsdp=fsdp, expert=expert, tp=tp)


def test_the_table_names_every_axis_of_every_parameter():
    every = dataclasses.replace(UNTIED, qkv_bias=True, qk_norm=True, post_norms=True)
    adapters = lora.Lora(rank=2, alpha=4.0, targets=tuple(lora.TARGETS))
    changes = ({}, {"num_experts": 4, "experts_per_token": 2}, {"lora": adapters})
    trees = [parameter_shapes(dataclasses.replace(every, **change)) for change in changes]
    flat = {path[-1].key: leaf for shapes in trees for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    assert flat.keys() == SHARDED_AXES.keys()
    for name, leaf in flat.items():
        axes = SHARDED_AXES[name]
        assert len(axes) == leaf.ndim, name
        cut = [axis for axis in axes if axis]
        if lora.is_adapter(name):
            continue  # as their matrices: tests/models/test_lora.py
        expected = [] if "norm" in name else ["tp"] if "bias" in name else ["fsdp"] if name == "router" else ["fsdp", "tp"]
        expected = ["expert", *expected] if name.startswith("expert") else expected
        assert sorted(cut) == expected, f"{name}: matrices are cut once by each, biases by heads, norms are whole"


@pytest.mark.parametrize("fsdp, tp", MESHES)
def test_each_device_holds_its_share(fsdp, tp):
    """Parameters and both moments: 1 / (fsdp tp) of each matrix on every device; counters, histories and norms everywhere."""
    mesh = parallel.make_mesh(jax.devices(), fsdp=fsdp, tp=tp)
    params = cases.params("policy", np.float32, UNTIED)
    state = {"trainable": params, "moments": ({"mu": params, "nu": params}, jnp.int32(3)), "history": cases.reward_history.init(cases.K)}
    placed = parallel.place(state, parallel.layout(state, mesh))
    assert equal(placed, state)
    for path, leaf in jax.tree_util.tree_leaves_with_path(placed):
        key = jax.tree_util.keystr(path)
        cut = "['trainable']" in key or "['mu']" in key or "['nu']" in key
        share = leaf.size // (fsdp * tp) if cut and "norm" not in key else leaf.size
        assert [shard.data.size for shard in leaf.addressable_shards] == [share] * 8, key


def test_sizes_that_do_not_divide_are_named_with_what_would():
    assert sharding_faults(cases.CONFIG, of="learner.mesh", fsdp=4, tp=2) == []
    assert sharding_faults(cases.CONFIG, of="learner.mesh", fsdp=5, tp=4) == [
        "the model's width = 16 is not divisible by learner.mesh.fsdp = 5: set it to a divisor, 1, 2, 4, 8, 16",
        "the model's num_kv_heads = 2 is not divisible by learner.mesh.tp = 4: set it to a divisor, 1, 2",
    ]
    assert len(sharding_faults(cases.CONFIG, of="actor", fsdp=1, tp=3)) == 4, "heads, key and value heads, hidden units, vocabulary"
    assert sharding_faults(MOE, of="learner.mesh", fsdp=2, tp=1, expert=4) == []
    assert sharding_faults(MOE, of="learner.mesh", fsdp=1, tp=1, expert=8) == [
        "the model's num_experts = 4 is not divisible by learner.mesh.expert = 8: set it to a divisor, 1, 2, 4"
    ]
    assert sharding_faults(cases.CONFIG, of="learner.mesh", fsdp=1, tp=1, expert=2) == [
        "learner.mesh.expert = 2, but the model is dense, it has no experts to deal out: set it to 1, and learner.mesh.fsdp to more"
    ]


@pytest.mark.parametrize("expert, tp", [(1, 2), (2, 1)])
def test_rows_are_split_over_all_axes_but_tp(expert, tp):
    mesh = parallel.make_mesh(jax.devices(), fsdp=2, expert=expert, tp=tp)
    rows = np.arange(2 * 8 * 3).reshape(2, 8, 3)
    split = parallel.shard_rows({"x": rows}, mesh, axis=1)["x"]
    assert split.sharding.spec == PartitionSpec(None, ("data", "fsdp", "expert")) and equal(split, rows)
    assert {shard.data.shape for shard in split.addressable_shards} == {(2, tp, 3)}


def test_each_device_holds_its_experts():
    mesh = parallel.make_mesh(jax.devices(), fsdp=2, expert=2, tp=2)
    params = cases.params("policy", np.float32, MOE)
    placed = parallel.place(params, parallel.layout(params, mesh))["layers"]
    assert {name: placed[name].sharding.shard_shape(placed[name].shape) for name in placed if "expert" in name or name == "router"} == {
        "router": (2, 8, 4), "expert_gate": (2, 2, 8, 10), "expert_up": (2, 2, 8, 10), "expert_down": (2, 2, 10, 8)
    }  # fmt: skip


def test_a_compiled_function_keeps_its_layout_and_is_compiled_once():
    mesh = parallel.make_mesh(jax.devices(), fsdp=4, tp=2)
    params = cases.params("policy")
    shardings = parallel.layout(params, mesh)
    placed = parallel.place(params, shardings)
    programs = [parallel.compiled(_scaled, shardings, factor=2.0) for _ in range(2)]
    assert programs[0] is programs[1] and parallel.compiled(_scaled, shardings, factor=3.0) is not programs[0]
    scaled = programs[0](programs[0](placed))
    assert programs[0]._cache_size() == 1
    assert jax.tree.map(lambda x: x.sharding, scaled) == shardings
    assert equal(scaled, jax.tree.map(lambda x: x * 4, params))


def _scaled(tree, *, factor):
    return jax.tree.map(lambda x: x * jnp.asarray(factor, x.dtype), tree)


# --- actors


@pytest.mark.parametrize("fsdp, tp", MESHES)
@pytest.mark.parametrize("actors", [slice(3, 4), slice(6, 8)])
def test_weights_come_to_an_actors_devices(fsdp, tp, actors):
    devices = jax.devices()[actors]
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), cases.params("policy"))
    placed = parallel.place(params, parallel.layout(params, parallel.make_mesh(jax.devices(), fsdp=fsdp, tp=tp)))
    local = parallel.localise(placed, model=cases.CONFIG, devices=devices)
    like = parallel.actor_shardings(params, model=cases.CONFIG, devices=devices)
    assert jax.tree.structure(like) == jax.tree.structure(params)
    for path, found in jax.tree_util.tree_leaves_with_path(local):
        name, expected = path[-1].key, cases.leaf_at(like, path)
        assert (found.shape, found.dtype, found.sharding) == (expected.shape, expected.dtype, expected.sharding), name
        share = found.size // (len(devices) if "tp" in SHARDED_AXES[name] else 1)
        assert {shard.device for shard in found.addressable_shards} == set(devices)
        assert {shard.data.size for shard in found.addressable_shards} == {share}, name
    assert equal(local, params)


def test_the_model_runs_as_an_actor_holds_it():
    """Logits over tp 2 against one device."""
    params, tokens = cases.params("policy"), np.arange(10, dtype=np.int32).reshape(2, 5)
    logits = jax.jit(lambda p: cases.transformer.logits(p, cases.transformer.forward(cases.MODEL, p, tokens, tokens % 5)[0]))
    both = [logits(parallel.localise(params, model=cases.CONFIG, devices=jax.devices()[:n])) for n in (1, 2)]
    np.testing.assert_allclose(both[1], both[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", [cases.CONFIG, MOE], ids=["dense", "experts"])
@pytest.mark.parametrize("storage, slots", [("model", 0), ("bfloat16", 4), ("int8", 4)])
def test_an_actor_generates_over_its_devices_what_it_generates_on_one(storage, slots, model):
    """However matrices and caches are stored, with and without refill: the same tokens over tp 2, log-probs to rounding."""
    prompts, key = np.arange(1, 7, dtype=np.int32).reshape(3, 2), jax.random.key(3)
    what = GenerationSettings(
        max_new_tokens=20, support=Support(), stop_ids=(0,), pad_id=cases.PAD, prompt_buckets=(2,), slots=slots, weights=storage, cache=storage
    )
    out = []
    for count in (1, 2):
        params = parallel.localise(cases.params("policy", np.float32, model), model=model, devices=jax.devices()[:count])
        out.append(generate(cases.transformer.Transformer(model), params, prompts, np.array([2, 1, 2], np.int32), key, completions_per_prompt=4, settings=what))
    np.testing.assert_array_equal(out[1].tokens, out[0].tokens)
    # of experts a key or a value stored in bfloat16 rounds to its other neighbour once
    np.testing.assert_allclose(out[1].log_probs, out[0].log_probs, atol=1e-3 if (storage, model) == ("bfloat16", MOE) else 1e-4)
    assert 1 < out[0].lengths.max() and np.abs(out[0].log_probs).max() > 1


def test_an_actor_that_can_not_hold_the_model_is_refused():
    with pytest.raises(ValueError, match=r"^the model's num_heads = 4 is not divisible by actor.tp = 3: set it to a divisor, 1, 2, 4$"):
        parallel.actor_shardings(cases.params("policy"), model=cases.CONFIG, devices=jax.devices()[:3])


# --- two processes


def test_rows_of_one_process_are_its_own():
    """Without other processes the kernel is called as it is."""
    kernel = cases.kernel()
    assert parallel.over_processes(kernel, 1) is kernel


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes of one device each found, and the run of one process that they are measured against."""
    folder = tmp_path_factory.mktemp("two")
    with jax.numpy_dtype_promotion("standard"), socket.socket() as probe:
        alone = cases.learner(folder / "alone", schedule=cases.Schedule(accept=2))
        steps = [alone.update((cases.rollouts(0),))]
        alone.save(wait=True)
        saved = {"alone": alone.digest(), "alone's versions": state_sha256(alone.versions)}
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    here = pathlib.Path(__file__).resolve().parent
    # Quick to compile: what is compared to the bit is compared among programs of these processes.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    environment = os.environ | {"PYTHONPATH": f"{here.parent}{os.pathsep}{here}", "XLA_FLAGS": flags}
    command = [sys.executable, str(here / "parallel_worker.py"), str(folder), str(port)]
    options = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    workers = [subprocess.Popen([*command, str(process), "2"], **options) for process in range(2)]
    try:
        with jax.numpy_dtype_promotion("standard"):  # meanwhile
            whole = cases.learner(folder / "one", num_steps=2)
            steps = [whole.update((cases.rollouts(step, version=step, step=step),)) for step in range(2)]
        outputs = [worker.communicate(timeout=240)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)
    found = [json.loads((folder / f"out{process}.json").read_text()) for process in range(2)]
    yield {"folder": folder, "found": found, "steps": steps, "saved": saved, "weights": whole.state.trainable}
    alone.close()
    whole.close()


@pytest.mark.parametrize("mesh", ["data", "fsdp", "tp"])
def test_two_processes_train_as_one(two, mesh):
    """Sums in another order. Both processes hold the same to the bit; parameters end within 1e-4 of the way they went."""
    first, second = (found[mesh] for found in two["found"])
    assert first == second or repr(first) == repr(second)  # NaN differs from itself
    assert first["laid_out"]
    for (metrics, advantages), step in zip(two["steps"], first["steps"], strict=True):
        np.testing.assert_allclose(step["advantages"], advantages, rtol=1e-5, atol=1e-6)
        assert step["metrics"].keys() == metrics.keys()
        for name, value in metrics.items():
            np.testing.assert_allclose(step["metrics"][name], value, rtol=2e-5, atol=2e-6, err_msg=name)
    with np.load(two["folder"] / f"{mesh}.npz") as saved:
        expected = {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(two["weights"])}
        start = {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(cases.params("policy"))}
        distance = lambda a, b: np.sqrt(sum(np.sum((a[name] - b[name]) ** 2) for name in expected))  # noqa: E731
        assert distance(saved, expected) < 1e-4 * distance(expected, start)


@pytest.mark.parametrize("mesh", ["data", "fsdp", "tp"])
def test_spread_weights_come_together_in_every_process(two, mesh):
    for found in two["found"]:
        digests = found[mesh]["digests"]
        assert digests["local"] == digests["by layer"] == digests["whole"]
        assert digests["state"] == digests["state by layer"] != digests["whole"]


def test_advantages_do_not_depend_on_the_layout(two):
    """The kernel runs over the devices, however they are arranged."""
    first = [[step["advantages"] for step in two["found"][0][mesh]["steps"]] for mesh in ("data", "fsdp", "tp")]
    assert first[0] == first[1] == first[2]


def test_checkpoints_cross_meshes_and_numbers_of_processes(two, tmp_path):
    """One process → two over tp; two over fsdp → one; what comes back is what was saved, to the bit, and goes on."""
    crossing = two["found"][0]["crossing"]
    assert two["found"][1]["crossing"] == crossing
    assert crossing["restored"] and {name: crossing[name] for name in two["saved"]} == two["saved"]
    assert not crossing["nothing there"] and crossing["versions"] == [0, 1] and crossing["restored again"] == [True, True]
    assert (crossing["read"], crossing["read versions"]) == (crossing["saved"], crossing["saved versions"])
    assert crossing["resumed"] == crossing["uninterrupted"], "on the same mesh it goes on to the bit"
    with jax.numpy_dtype_promotion("standard"):
        here = cases.learner(two["folder"] / "together", num_steps=2, schedule=cases.Schedule())
        assert here.restore() and here.step == 1 and here.digest() == crossing["saved"]
        metrics, _ = here.update((cases.rollouts(1, version=1, step=1),))
    expected = two["steps"][1][0]
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-5, atol=2e-6, err_msg=name)
    weights, whole = (jax.tree.leaves(jax.device_get(tree)) for tree in (here.state.trainable, two["weights"]))
    start = jax.tree.leaves(jax.device_get(cases.params("policy")))
    distance = lambda a, b: np.sqrt(sum(np.sum((x - y) ** 2) for x, y in zip(a, b, strict=True)))  # noqa: E731
    assert distance(weights, whole) < 1e-4 * distance(whole, start)
    here.close()


def test_processes_store_a_weight_version_once(two):
    first, second, third, last = two["found"][0]["stored once"]
    assert first and first == second == third, "written by the first step, and kept while the second is"
    assert last == {}
    assert [path.name for path in (two["folder"] / "together" / "versions").iterdir()] == ["0"]


def test_what_processes_do_not_agree_on_is_refused_by_name(two):
    first, second = (found["refusals"] for found in two["found"])
    for refusals in (first, second):
        assert refusals["drifted"].startswith("CheckpointError: step 0 is not saved: state of processes 1 differ from those of process 0")
        assert "(process 0 7, process 1 None): --workdir must be a directory that all processes share" in refusals["not shared"]
    assert first["late"].startswith("TimeoutError: processes 1 of 2 did not come") and "step 4" in first["late"] and "late" not in second
    assert Checkpoints(two["folder"] / "refusals", identity={"of": "tests"}, read_only=True).latest_step() is None
