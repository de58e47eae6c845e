"""The learner: what it keeps, what it refuses, what it reports; its old policy, its reference and its devices."""

import dataclasses

import jax
import jax.numpy as jnp
import learner_cases as cases
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pgrpo_jax import batching, checkpoints, parallel, update
from pgrpo_jax import learner as learners
from pgrpo_jax.kl_control import KLControl
from pgrpo_jax.models.mesh import ROWS
from pgrpo_jax.schedule import Schedule
from pgrpo_jax.structs import Work

SCHEDULES = [(1, 1), (1, 2), (2, 4), (4, 8)]
MESH = parallel.make_mesh(jax.devices()[:1])
UNIT = cases.P // 2  # prompts in a unit of work: a step takes two


pytestmark = pytest.mark.usefixtures("lenient")


@pytest.fixture
def make(tmp_path):
    """Makes learners that save in a directory of the test, and closes them."""
    made = []

    def build(**options):
        made.append(cases.learner(tmp_path / "checkpoints", **options))
        return made[-1]

    yield build
    for learner in made:
        learner.close()


@pytest.fixture
def scored(monkeypatch):
    """The weights that `score_slices` was called with."""
    calls = []

    def spy(weights, *rest):
        calls.append(weights)
        return update.score_slices(weights, *rest)

    monkeypatch.setattr(learners, "score_slices", spy)
    return calls


def rollouts(step: int, schedule: Schedule = Schedule()):
    version = schedule.version(step)
    return tuple(cases.rollouts(index, version=version, prompts=UNIT, step=step) for index in (2 * step, 2 * step + 1))


def snapshot(tree):
    """Host copies that share no buffer with the tree: a view would stop JAX from reusing it."""
    return jax.tree.map(lambda x: np.array(jnp.copy(x)), tree)


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def token_means(batch, new, old):
    """Mean ratio and mean KL of tokens, by the log-probs [N, T] of two policies."""
    mask = batch.completion_mask & batch.valid[:, None]
    gap = (np.float64(new) - np.float64(old))[mask]
    return np.exp(gap).mean(), (np.exp(-gap) + gap - 1).mean()


def log_probs(weights, units):
    """Log-probs of rollouts under weights, laid out as the learner does it."""
    flat = batching.to_train_batch(units, completions_per_prompt=cases.G, pad_id=cases.PAD)
    sliced = parallel.shard_rows(batching.micro_batches(flat, 1), MESH, axis=1)
    return flat, np.asarray(update.score_slices(parallel.place(weights, parallel.layout(weights, MESH)), cases.MODEL, cases.LOSS.support, sliced))[0]


@pytest.mark.parametrize("reload, accept", SCHEDULES)
def test_bookkeeping_under_a_schedule(reload, accept, make, scored):
    schedule, num_steps = Schedule(reload=reload, accept=accept), 9
    learner = make(schedule=schedule, num_steps=num_steps, proximal="generator")
    weights, rewards = {0: snapshot(learner.state.trainable)}, [[] for _ in range(cases.K)]
    stale = 0
    for step in range(num_steps):
        assert learner.step == step == int(learner.state.step)
        assert learner.next_work == int(learner.state.next_work) == 2 * step
        assert set(learner.versions) == {v for v in schedule.needed(step, num_steps)}
        for version, kept in learner.versions.items():
            assert_equal(snapshot(kept), weights[version])
        units, before, held = rollouts(step, schedule), len(scored), jax.tree.leaves(learner.state.trainable)
        metrics, _ = learner.update(units)
        version = schedule.version(step)
        stale += version < step
        assert all(leaf.is_deleted() for leaf in held), "the state is donated"
        assert metrics["staleness"] == step - version
        np.testing.assert_allclose(metrics["learning_rate"], cases.OPTIMISER.learning_rate * (1 - step / 60), rtol=1e-6)
        weights[step + 1] = snapshot(learner.state.trainable)
        if version == step:
            assert len(scored) == before and metrics["ratio"] == 1 and metrics["old_kl"] == 0
        else:
            assert len(scored) == before + 1
            flat, new = log_probs(weights[step], units)
            ratio, _ = token_means(flat, new, log_probs(weights[version], units)[1])
            np.testing.assert_allclose(metrics["ratio"], ratio, rtol=1e-5)
            assert metrics["ratio"] != 1
        for unit in units:
            for i, reward in enumerate(unit.rewards):
                rewards[unit.prompt_records[unit.prompt_index[i]].preference_id].append(float(reward))
        np.testing.assert_array_equal(learner.state.history.count, [len(r) for r in rewards])
        np.testing.assert_allclose(learner.state.history.mean, [np.mean(r) if r else 0 for r in rewards], rtol=1e-5)
        assert int(learner.state.next_work) == 2 * (step + 1)
    assert learner.step == num_steps and set(learner.versions) == {num_steps}, "the trained policy is still to be evaluated"
    assert_equal(snapshot(learner.versions[num_steps]), weights[num_steps])
    assert (stale > 0) == (accept > 1)


def test_published_versions_survive_later_updates(make):
    learner = make()
    held = learner.versions[0]
    expected = snapshot(held)
    for step in range(3):
        learner.update(rollouts(step))
    assert 0 not in learner.versions
    assert_equal(held, expected)
    assert not np.array_equal(learner.state.trainable["embedding"], held["embedding"])


def test_several_passes_over_a_batch(make, scored):
    """Old log-probs once, before the first pass; rewards count once; the schedule counts passes."""
    learner = make(passes_per_batch=3)
    start = snapshot(learner.state.trainable)
    units = rollouts(0)
    metrics, _ = learner.update(units)
    assert len(scored) == 1 and metrics["ratio"] != 1
    assert int(learner.state.optimiser[1][0].count) == 3 and learner.step == 1
    assert int(np.sum(learner.state.history.count)) == cases.P * cases.G
    np.testing.assert_allclose(metrics["learning_rate"], cases.OPTIMISER.learning_rate * (1 - 2 / 60), rtol=1e-6)
    again = make()
    again.update(units)
    one_pass = snapshot(again.state.trainable)
    change = np.abs(learner.state.trainable["embedding"] - start["embedding"]).max()
    assert change > 1.5 * np.abs(one_pass["embedding"] - start["embedding"]).max()


def test_the_reference_is_scored_only_for_a_kl(make, scored):
    units, reference = rollouts(0), cases.params("reference")
    assert np.isnan(make().update(units)[0]["kl"])
    assert scored == []
    learner = make(reference=reference, kl=KLControl(coefficient=0.1))
    flat, new = log_probs(snapshot(learner.state.trainable), units)
    metrics, _ = learner.update(units)
    assert len(scored) == 1
    assert_equal(scored[0], reference)
    np.testing.assert_allclose(metrics["kl"], token_means(flat, new, log_probs(reference, units)[1])[1], rtol=1e-4)
    assert metrics["kl"] > 0.01
    learner.update(rollouts(1))
    assert_equal(scored[1], reference)


def no_kernel(*_):
    raise AssertionError("rollouts that are refused must not reach a device")


def spoil_reward(units):
    units[1].rewards[3] = np.nan
    return units


def spoil_preference(units):
    records = (dataclasses.replace(units[1].prompt_records[0], preference_id=cases.K), *units[1].prompt_records[1:])
    return units[0], dataclasses.replace(units[1], prompt_records=records)


def spoil_version(units):
    return units[0], dataclasses.replace(units[1], work=Work(index=1, step=0, version=1))


@pytest.mark.parametrize(
    "spoil, match",
    [
        (spoil_reward, "reward nan of prompt prompt-1-0"),
        (spoil_preference, r"preference id 3, outside \[0, 3\)"),
        (spoil_version, "weight version 1"),
    ],
)
def test_what_is_refused_leaves_no_trace(spoil, match, make):
    learner = make(advantage_kernel=no_kernel)
    state, versions, digest = learner.state, learner.versions, checkpoints.state_sha256(learner.state)
    with pytest.raises(ValueError, match=match) as caught:
        learner.update(spoil(rollouts(0)))
    assert "\n" not in str(caught.value)
    assert learner.state is state and learner.versions is versions and learner.step == 0
    assert checkpoints.state_sha256(learner.state) == digest


def test_a_loss_that_is_no_number_stops_the_run_and_is_not_saved(make):
    """Rewards near the largest float32 are finite; their sum is not."""
    learner = make()
    learner.update(rollouts(0))
    learner.save(wait=True)
    digest = checkpoints.state_sha256(learner.state)
    units = rollouts(1)
    units[0].rewards[:] = 3e38
    with pytest.raises(FloatingPointError, match=r"^loss = nan at step 2 is not finite: the last checkpoint is good; [^\n]*$"):
        learner.update(units)
    resumed = make()
    assert resumed.restore() and resumed.step == 1
    assert checkpoints.state_sha256(resumed.state) == digest


def test_advantages_come_back_in_canonical_order(make):
    """GRPO by a loop, for units whose completions lie in mixed order and are fewer than G for one prompt."""
    rng = np.random.default_rng(0)
    units = [dropped(unit, rng.permutation(len(unit.rewards))[:-1]) for unit in rollouts(0)]
    metrics, advantages = make(preset="grpo").update(tuple(units))
    expected = []
    for unit in units:
        for i, reward in enumerate(unit.rewards):
            own = np.float64(unit.rewards[unit.prompt_index == unit.prompt_index[i]])
            expected.append((reward - own.mean()) / (own.std() + 1e-6))
    np.testing.assert_allclose(advantages, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metrics["reward"], np.concatenate([u.rewards for u in units]).mean(), rtol=1e-6)


# --- versions: their dtype, and those that are asked for


def test_versions_in_half_precision(make):
    """The state stays float32; stale rollouts are scored with the rounded weights that generated them, a restored run with the same."""
    schedule = Schedule(reload=1, accept=2)
    learner = make(schedule=schedule, weights_dtype="bfloat16", proximal="generator")
    start = snapshot(learner.state.trainable)
    learner.update(rollouts(0, schedule))
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), start)
    assert_equal(snapshot(learner.versions[0]), rounded)
    assert {leaf.dtype for leaf in jax.tree.leaves(learner.state.trainable)} == {np.dtype(np.float32)}
    learner.save(wait=True)
    units = rollouts(1, schedule)
    flat, new = log_probs(learner.state.trainable, units)
    metrics, _ = learner.update(units)
    np.testing.assert_allclose(metrics["ratio"], token_means(flat, new, log_probs(rounded, units)[1])[0], rtol=1e-5)
    assert abs(metrics["ratio"] / token_means(flat, new, log_probs(start, units)[1])[0] - 1) > 1e-4, "rounding shows"
    resumed = make(schedule=schedule, weights_dtype="bfloat16", proximal="generator")
    assert resumed.restore()
    assert_equal(snapshot(resumed.versions[0]), rounded)
    resumed.update(units)
    assert resumed.digest() == learner.digest()


def test_a_version_that_is_asked_for(make, tmp_path):
    """Version 0 is loaded again once no step needs it, and let go with the next update; so is the current one where j is above 1."""
    schedule = Schedule(reload=2, accept=2)
    learner = make(schedule=schedule)
    base = snapshot(learner.versions[0])
    learner.update(rollouts(0, schedule))
    current = snapshot(learner.state.trainable)
    assert set(learner.versions) == {0}
    learner.offer(1)
    assert_equal(snapshot(learner.versions[1]), current)
    learner.update(rollouts(1, schedule))
    assert set(learner.versions) == {2}
    learner.offer(0)
    learner.offer(2)
    assert set(learner.versions) == {0, 2}
    assert_equal(snapshot(learner.versions[0]), base)
    with pytest.raises(ValueError, match=r"^weight version 1 is gone: version 0, the newest 2 and those [^\n]*\(\[0, 2\]\) can be offered$"):
        learner.offer(1)
    learner.save(wait=True)
    saved = {path.name for path in (tmp_path / "checkpoints" / "2").iterdir() if path.is_dir()}
    assert saved == {"state", "record"}, "what was only asked for is not saved"
    assert not (tmp_path / "checkpoints" / "versions").exists()
    learner.update(rollouts(2, schedule))
    assert set(learner.versions) == {2}


# --- the freshest schedule: units of several versions


def test_units_of_several_versions(make, scored):
    """Around the generator the old policy is what the sampler reported; nothing is scored; staleness is the mean over units."""
    learner = make(schedule=Schedule(accept=4, policy="freshest"), proximal="generator")
    for step in range(2):
        learner.update(tuple(cases.rollouts(2 * step + i, version=step, prompts=UNIT, step=step) for i in range(2)))
    assert set(learner.versions) == {2}
    units = tuple(cases.rollouts(9 + i, version=2 * i, prompts=UNIT, step=2) for i in range(2))
    flat, new = log_probs(snapshot(learner.state.trainable), units)
    metrics, _ = learner.update(units, next_work=30)
    assert scored == [] and metrics["staleness"] == (2 + 0) / 2
    np.testing.assert_allclose(metrics["ratio"], token_means(flat, new, flat.behaviour_log_probs)[0], rtol=1e-5)
    assert learner.next_work == int(learner.state.next_work) == 30
    learner.save(wait=True)
    resumed = make(schedule=Schedule(accept=4, policy="freshest"))
    assert resumed.restore() and (resumed.step, resumed.next_work) == (3, 30) and set(resumed.versions) == {3}


# --- completions that a reward policy dropped


def dropped(unit, keep):
    """A unit of which only the completions `keep` are left."""
    per_row = ("completions", "completion_lengths", "prompt_index", "behaviour_log_probs", "truncated", "rewards")
    changes = {name: getattr(unit, name)[keep] for name in per_row} | {"texts": tuple(unit.texts[i] for i in keep)}
    return dataclasses.replace(unit, **changes)


def test_a_prompt_and_a_unit_without_completions(make):
    """The rows that are left count as if the others had never been: loss, history and metrics."""
    first, second = rollouts(0)
    keep = np.array([1, 2, 3, 8, 9])  # of prompt 0 three, of prompt 1 none, of prompt 2 two, of prompt 3 none
    learner = make(preset="grpo")
    metrics, advantages = learner.update((dropped(first, keep), dropped(second, np.zeros(0, int))))
    assert len(advantages) == 5 and int(learner.state.history.count.sum()) == 5
    for rows in ([0, 1, 2], [3, 4]):
        own = np.float64(first.rewards[keep[rows]])
        np.testing.assert_allclose(advantages[rows], (own - own.mean()) / (own.std() + 1e-6), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metrics["reward"], np.float64(first.rewards[keep]).mean(), rtol=1e-6)
    assert metrics["dead_prompts"] == 6 / 8 and metrics["ratio"] == 1 and metrics["grad_norm"] > 0


def test_a_step_without_completions(make):
    """No reward, so no metric of one; the parameters only decay."""
    learner = make()
    start = snapshot(learner.state.trainable)
    metrics, advantages = learner.update(tuple(dropped(unit, np.zeros(0, int)) for unit in rollouts(0)))
    assert advantages.shape == (0,) and learner.step == 1 and metrics["loss"] == 0
    assert all(np.isnan(metrics[name]) for name in ("reward", "reward_std", "advantage_mean", "advantage_std", "length"))
    assert metrics["dead_prompts"] == 1 and metrics["preference_group/0/count"] == 0
    np.testing.assert_array_equal(learner.state.trainable["final_norm"], start["final_norm"])
    assert int(learner.state.history.count.sum()) == 0


# --- meshes

MESHES = {"data 8": (8, 1, 1), "fsdp 4 x tp 2": (8, 4, 2), "data 2 x fsdp 2 x tp 2": (8, 2, 2)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Three updates on one device: what each returned, and the state after them."""
    with jax.numpy_dtype_promotion("standard"):
        learner = cases.learner(tmp_path_factory.mktemp("alone"))
        found = [learner.update(rollouts(step)) for step in range(3)]
        yield found, snapshot(learner.state)
        learner.close()


@pytest.mark.parametrize("mesh", MESHES)
def test_the_mesh_does_not_change_the_update(mesh, make, alone):
    """Float32 sums in another order: three updates stay within 1e-5 of the gradient and 2e-5 of the way the parameters went.

    Counts of the history are exact; advantages and moments depend on the number of devices, not on how they are arranged.
    """
    num_devices, fsdp, tp = MESHES[mesh]
    expected, one = alone
    many = make(num_devices=num_devices, fsdp=fsdp, tp=tp)
    step_program = parallel.compiled(
        update._step, (jax.tree.map(lambda x: x.sharding, many.state), None, NamedSharding(many._mesh, PartitionSpec(None, ROWS))),
        donate_argnums=(0,),
        model=many._model, settings=cases.LOSS, optimiser_settings=cases.OPTIMISER,
    )  # fmt: skip
    layout = parallel.layout(many.state, many._mesh)
    history = cases.reward_history.init(cases.K)
    for step in range(3):
        metrics, advantages = many.update(rollouts(step))
        flat = batching.to_train_batch(rollouts(step), completions_per_prompt=cases.G, pad_id=cases.PAD)
        ids = flat.preference_ids[flat.prompt_index]
        rows = flat.rewards, flat.prompt_index, ids, ids, np.zeros_like(ids), flat.valid
        exact, history, _ = cases.kernel(cases.estimator(), num_devices)(*rows, history)
        np.testing.assert_array_equal(advantages, exact)
        np.testing.assert_allclose(advantages, expected[step][1], rtol=1e-5, atol=1e-6)
        for name, value in expected[step][0].items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
        assert jax.tree.map(lambda x: x.sharding, many.state) == layout, "the layout does not drift"
    assert step_program._cache_size() == 1, "one program for each mesh, not one for each step"
    assert_equal(snapshot(many.state.history), history)
    np.testing.assert_array_equal(many.state.history.count, one.history.count)
    moments, expected_moments = (state.optimiser[1][0].mu for state in (snapshot(many.state), one))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()), moments, expected_moments)
    start = cases.params("policy")
    distance = lambda a, b: np.sqrt(sum(np.sum((x - y) ** 2) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))))  # noqa: E731
    assert distance(snapshot(many.state.trainable), one.trainable) < 2e-5 * distance(one.trainable, start)
    for path, leaf in jax.tree_util.tree_leaves_with_path((many.state.trainable, many.state.optimiser, many.versions)):
        cut = fsdp * tp if leaf.ndim > 1 and "norm" not in jax.tree_util.keystr(path) else 1
        assert {shard.data.nbytes * cut for shard in leaf.addressable_shards} == {leaf.nbytes}, path


def test_a_mesh_does_not_change_the_update_of_experts(make):
    """As above, over fsdp 2 x expert 2 (x data 2), with a model of experts, whose matrices the actors get whole."""
    sizes = dict(qk_norm=True, num_experts=4, experts_per_token=2, normalised_experts=True)
    model = dataclasses.replace(cases.MODEL, config=dataclasses.replace(cases.CONFIG, **sizes))
    one, many = make(model=model), make(model=model, num_devices=8, fsdp=2, expert=2)
    for step in range(2):
        (expected, advantages), (metrics, found) = one.update(rollouts(step)), many.update(rollouts(step))
        np.testing.assert_allclose(found, advantages, rtol=1e-5, atol=1e-6)
        for name, value in expected.items():
            np.testing.assert_allclose(metrics[name], value, rtol=2e-5, atol=2e-6, err_msg=name)
    assert jax.tree.map(lambda x: x.sharding, many.state) == parallel.layout(many.state, many._mesh)
    start, ours, theirs = (jax.tree.leaves(jax.device_get(x)) for x in (cases.params("policy", config=model.config), many.versions[2], one.versions[2]))
    distance = lambda a, b: np.sqrt(sum(np.sum((x - y) ** 2) for x, y in zip(a, b, strict=True)))  # noqa: E731
    assert distance(ours, theirs) < 1e-4 * distance(theirs, start)
    experts = many.state.trainable["layers"]["expert_up"]
    assert {shard.data.shape for shard in experts.addressable_shards} == {(2, 2, 8, 20)}


def test_a_checkpoint_goes_on_on_another_mesh(make):
    """Saved on fsdp 4 x tp 2, restored there to the bit, and on one device to the same values."""
    schedule = Schedule(accept=2)
    saving = make(num_devices=8, fsdp=4, tp=2, schedule=schedule)
    saving.update(rollouts(0, schedule))
    saving.save(wait=True)
    same, other = make(num_devices=8, fsdp=4, tp=2, schedule=schedule), make(schedule=schedule)
    for learner in (same, other):
        assert learner.restore() and learner.digest() == saving.digest()
        assert checkpoints.state_sha256(learner.versions) == checkpoints.state_sha256(saving.versions)
        layout = parallel.layout(learner.state, learner._mesh)
        assert jax.tree.map(lambda x: x.sharding, learner.state) == layout


def test_a_restored_learner_goes_on_to_the_bit(make):
    schedule = Schedule(reload=2, accept=4)
    whole = make(schedule=schedule)
    for step in range(3):
        whole.update(rollouts(step, schedule))
    whole.save(wait=True)
    resumed = make(schedule=schedule)
    assert resumed.restore() and resumed.step == 3
    assert set(resumed.versions) == set(whole.versions) == {0, 2}
    for step in range(3, 7):
        (expected, _), (metrics, _) = whole.update(rollouts(step, schedule)), resumed.update(rollouts(step, schedule))
        assert metrics == pytest.approx(expected, rel=0, abs=0, nan_ok=True)
    assert checkpoints.state_sha256(resumed.state) == checkpoints.state_sha256(whole.state)
    for version in (2, 4, 6):
        assert (version in resumed.versions) == (version in whole.versions)
    assert checkpoints.state_sha256(resumed.versions) == checkpoints.state_sha256(whole.versions)


def test_nothing_to_restore(make):
    learner = make()
    assert learner.restore() is False and learner.step == 0
