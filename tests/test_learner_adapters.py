"""A learner that trains adapters: what it steps, holds, publishes, saves and compares with."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import learner_cases as cases
import numpy as np
import pytest

from pgrpo_jax import batching, kl_control, parallel
from pgrpo_jax.algorithms import reward_history
from pgrpo_jax.checkpoints import Checkpoints
from pgrpo_jax.generation.scoring import score
from pgrpo_jax.kl_control import KLControl
from pgrpo_jax.learner import Learner
from pgrpo_jax.models import lora, transformer
from pgrpo_jax.models.lora import Lora
from pgrpo_jax.models.parameters import trainable_shapes
from pgrpo_jax.parameter_server import publish_shards
from pgrpo_jax.train_state import initial_state
from tests.parameter_server.folder_store import FolderStore

pytestmark = pytest.mark.usefixtures("lenient")

ADAPTERS = Lora(rank=2, alpha=4.0, targets=("query", "value", "output", "up", "down"), num_adapters=cases.K)


def adapted(num_adapters=cases.K) -> transformer.Transformer:
    return transformer.Transformer(dataclasses.replace(cases.CONFIG, lora=dataclasses.replace(ADAPTERS, num_adapters=num_adapters)))


def learner(directory, *, num_adapters=cases.K, num_devices=1, fsdp=1, tp=1, **changes) -> Learner:
    """As `cases.learner`, of adapters on the model "policy"."""
    model, base = adapted(num_adapters), jax.tree.map(np.asarray, cases.params("policy"))
    mesh = parallel.make_mesh(jax.devices()[:num_devices], fsdp=fsdp, tp=tp)
    untrained = functools.partial(lora.initial, model.config.lora, trainable_shapes(model.config), jax.random.key(5))
    optimiser = dataclasses.replace(cases.OPTIMISER, num_adapters=num_adapters)
    settings = dataclasses.replace(cases.SETTINGS, optimiser=optimiser, **changes)
    refreshed = settings.kl.refresh > 0
    return Learner(
        model,
        initial_state(
            untrained(), reward_history.init(cases.K, np.float32), optimiser, mesh,
            objective=kl_control.initial(settings.kl, cases.K), keep_reference=refreshed,
        ),
        advantage_kernel=cases.kernel(num_devices=num_devices),
        settings=settings,
        reference=base if settings.kl.coefficient > 0 and not refreshed else None,
        load_base=untrained,
        mesh=mesh,
        checkpoints=Checkpoints(directory, identity={"of": "tests"}),
        frozen=base,
    )  # fmt: skip


def rollouts(index, *, ids=None, step=None):
    """A unit whose prompts belong to some preference groups only."""
    made = cases.rollouts(index, step=index if step is None else step, version=index if step is None else step)
    if ids is None:
        return [made]
    records = tuple(dataclasses.replace(p, preference_id=ids[n % len(ids)]) for n, p in enumerate(made.prompt_records))
    return [dataclasses.replace(made, prompt_records=records)]


def adapter(tree, k):
    """One adapter's part of a tree of arrays with the axis of adapters, as {path: array}; counts [K] as well."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
    return {jax.tree_util.keystr(path): x[:, k] if x.ndim > 1 else x[k] for path, x in leaves if x.ndim}


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_an_absent_preference_group_is_not_stepped_decayed_or_moved_by_momentum(tmp_path):
    made = learner(tmp_path)
    base = jax.device_get(made.frozen)
    made.update(rollouts(0, ids=[0, 1, 2]))
    for step, ids in [(1, [0, 2]), (2, [1]), (3, [0, 1])]:
        before = jax.device_get((made.state.trainable, made.state.optimiser))
        made.update(rollouts(step, ids=ids))
        for k in range(cases.K):
            parts = [same(adapter(tree, k), adapter(old, k)) for tree, old in zip((made.state.trainable, made.state.optimiser), before, strict=True)]
            assert parts == [k not in ids] * 2, f"step {step}, preference group {k}"
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(made.frozen), base)


def test_a_preference_group_trains_its_adapter_as_if_it_had_the_base_to_itself(tmp_path):
    """One learner of three adapters against one of one adapter that sees that preference group alone; the norm limit is by adapter."""
    together = learner(tmp_path / "together")
    alone = learner(tmp_path / "alone", num_adapters=1)
    for step in range(3):
        together.update(rollouts(step, ids=[1]))
        alone.update(rollouts(step, ids=[1]))
    for name, x in adapter(alone.state.trainable, 0).items():
        np.testing.assert_allclose(adapter(together.state.trainable, 1)[name], x, rtol=1e-4, atol=1e-6, err_msg=name)
    assert any(np.abs(x).max() > 1e-3 for name, x in adapter(alone.state.trainable, 0).items() if "_lora_b" in name)


def test_what_is_published_and_saved_is_the_adapters(tmp_path):
    made = learner(tmp_path)
    made.update(rollouts(0))
    names = {"query", "value", "output", "up", "down"}
    expected = {f"{name}_lora_{letter}" for name in names for letter in "ab"}
    assert made.versions.keys() == {1} and made.versions[1].keys() == {"layers"} and made.versions[1]["layers"].keys() == expected
    size, whole = [sum(x.nbytes for x in jax.tree.leaves(tree)) for tree in (made.versions[1], made.frozen)]
    made.save(wait=True)
    written = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert size < whole / 2 and "embedding" not in str(jax.tree.structure(made.state))
    made.update(rollouts(1))
    again = learner(tmp_path)
    assert again.restore() and again.step == 1
    again.update(rollouts(1))
    assert again.digest() == made.digest(), "goes on to the bit"
    assert written < 4 * size + 60_000, "adapters and two moments"
    made.offer(2), again.offer(0)
    np.testing.assert_array_equal(again.versions[0]["layers"]["up_lora_b"], 0)


def test_what_is_sent_is_the_adapters(tmp_path):
    """Counted where bytes leave the learner."""
    made, store = learner(tmp_path / "run"), FolderStore(tmp_path)
    publish_shards(store, made.versions[0], version=0, epoch=1)
    sent = sum((tmp_path / name).stat().st_size for name in store.puts)
    assert sent == sum(x.nbytes for x in jax.tree.leaves(made.state.trainable)) > 0


def test_the_reference_is_the_base_without_adapters(tmp_path):
    """KL at the first update is 0; later it is that of base and adapted policy, as scored apart."""
    made = learner(tmp_path, kl=KLControl(coefficient=0.1))
    assert made._reference is made.frozen, "no second copy"
    first, _ = made.update(rollouts(0))
    assert abs(first["kl"]) < 1e-6
    policy = lora.joined(jax.device_get(made.frozen), jax.device_get(made.state.trainable))
    units = rollouts(1)
    second, _ = made.update(units)
    batch = cases_batch(units)
    counted = batch.completion_mask & batch.valid[:, None]
    run = jax.jit(lambda model, p: score(model, p, batch, cases.LOSS.support)[0], static_argnums=0)
    gap = np.asarray(run(cases.MODEL, jax.device_get(made.frozen)), np.float64) - np.asarray(run(adapted(), policy), np.float64)
    expected = (np.exp(gap) - 1 - gap)[counted].mean()
    assert expected > 1e-6
    np.testing.assert_allclose(second["kl"], expected, rtol=1e-2)


def cases_batch(units):
    return batching.to_train_batch(units, completions_per_prompt=cases.G, pad_id=cases.PAD)


def test_a_refreshed_reference_is_adapters(tmp_path):
    made = learner(tmp_path, kl=KLControl(coefficient=0.1, refresh=2))
    assert jax.tree.structure(made.state.objective["reference"]) == jax.tree.structure(made.state.trainable)
    for step in range(2):
        made.update(rollouts(step))
    jax.tree.map(np.testing.assert_array_equal, made.state.objective["reference"], made.state.trainable)
    metrics, _ = made.update(rollouts(2))
    assert abs(metrics["kl"]) < 1e-6


@pytest.mark.parametrize("fsdp, tp, packing", [(8, 1, False), (4, 2, True)])
def test_over_devices_the_update_is_the_same(tmp_path, fsdp, tp, packing):
    one, many = learner(tmp_path / "one"), learner(tmp_path / "many", num_devices=8, fsdp=fsdp, tp=tp, packing=packing)
    for step, ids in enumerate([None, [0, 2]]):
        one.update(rollouts(step, ids=ids))
        many.update(rollouts(step, ids=ids))
    moved = 0.0
    for k in range(cases.K):
        for name, x in adapter(one.state.trainable, k).items():
            np.testing.assert_allclose(adapter(many.state.trainable, k)[name], x, rtol=0, atol=3e-5, err_msg=name)
            moved = max(moved, np.abs(x).max() if "_lora_b" in name else 0)
    assert moved > 1e-3


def test_gradients_of_preference_groups_with_their_own_adapters_are_at_right_angles(tmp_path):
    made = learner(tmp_path, gradients_every=1)
    metrics, _ = made.update(rollouts(0, ids=[0, 1, 2]))
    cosines = np.array(metrics["gradient_cosine/matrix"])
    np.testing.assert_array_equal(cosines[~np.eye(cases.K, dtype=bool)], 0)
    shares = [metrics[f"preference_group/{p}/gradient_share"] for p in range(cases.K)]
    assert min(shares) > 0 and abs(sum(shares) - 1) < 1e-5


def test_a_frozen_base_in_half_precision_computes_what_it_would_in_single():
    """A bfloat16 model rounds its matrices as it computes: held rounded, they take half the room and change nothing."""
    batch, params = cases_batch(rollouts(0)), cases.params("policy")
    rounded = jax.tree_util.tree_map_with_path(lambda path, x: x if "norm" in path[-1].key else x.astype(jnp.bfloat16), params)
    model = dataclasses.replace(cases.MODEL, dtype=jnp.bfloat16)
    run = jax.jit(lambda p: score(model, p, batch, cases.LOSS.support)[0])
    np.testing.assert_array_equal(run(rounded), run(params))
