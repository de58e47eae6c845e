"""What the algorithm's options do to an update: KL in the reward, adaptive and refreshed; curated batches; weights of preference groups."""

import dataclasses

import jax
import learner_cases as cases
import numpy as np
import pytest

from pgrpo_jax import batch_files, batching, checkpoints, parallel, update
from pgrpo_jax.algorithms.preference_weights import PreferenceWeights
from pgrpo_jax.curation import Curation
from pgrpo_jax.kl_control import KLControl
from pgrpo_jax.schedule import Schedule

MESH = parallel.make_mesh(jax.devices()[:1])


pytestmark = pytest.mark.usefixtures("lenient")


@pytest.fixture
def make(tmp_path):
    made = []

    def build(**options):
        made.append(cases.learner(tmp_path / f"checkpoints{options.pop('where', 0)}", **options))
        return made[-1]

    yield build
    for learner in made:
        learner.close()


def units(step: int, version: int | None = None):
    return tuple(cases.rollouts(2 * step + i, version=step if version is None else version, prompts=4, step=step) for i in range(2))


def host(tree):
    return jax.tree.map(np.array, jax.device_get(tree))


def scored(weights, rollouts):
    flat = batching.to_train_batch(rollouts, completions_per_prompt=cases.G, pad_id=cases.PAD)
    sliced = parallel.shard_rows(batching.micro_batches(flat, 1), MESH, axis=1)
    return flat, np.asarray(update.score_slices(parallel.place(weights, parallel.layout(weights, MESH)), cases.MODEL, cases.LOSS.support, sliced))[0]


def test_kl_in_the_reward_is_what_the_history_sees(make):
    loss = dataclasses.replace(cases.LOSS, objective=dataclasses.replace(cases.LOSS.objective, kl_in="reward", kl_estimator="k1"))
    reference = cases.params("reference")
    learner = make(reference=reference, kl=KLControl(coefficient=0.1), loss=loss, preset="grpo")
    flat, own = scored(host(learner.state.trainable), units(0))
    gaps = np.where(flat.completion_mask, own.astype(np.float64) - scored(reference, units(0))[1], 0).sum(axis=1)
    metrics, advantages = learner.update(units(0))
    rewards = flat.rewards - 0.1 * gaps
    np.testing.assert_allclose(metrics["reward_shaped"], rewards.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["reward"], flat.rewards.mean(), rtol=1e-6)
    by_prompt = rewards.reshape(cases.P, cases.G)
    expected = (by_prompt - by_prompt.mean(axis=1, keepdims=True)) / (by_prompt.std(axis=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(advantages, expected.reshape(-1), rtol=1e-3, atol=1e-4)
    ids = flat.preference_ids[flat.prompt_index]
    for p in set(ids):
        np.testing.assert_allclose(learner.state.history.mean[p], rewards[ids == p].mean(), rtol=1e-4)
    assert metrics["kl"] > 0.01 and metrics["kl_coefficient"] == pytest.approx(0.1)


def test_every_preference_group_has_its_own_budget(make):
    """Far above its target a coefficient grows by a fifth in `horizon` updates; one whose preference group is absent stays."""
    only = tuple(
        dataclasses.replace(unit, prompt_records=tuple(dataclasses.replace(p, preference_id=p.preference_id % 2) for p in unit.prompt_records))
        for unit in units(0)
    )
    learner = make(reference=cases.params("reference"), kl=KLControl(coefficient=0.1, target=1e-4, horizon=10.0, scope="preference_group"))
    metrics, _ = learner.update(only)
    np.testing.assert_allclose(learner.state.objective["kl_coefficients"], [0.1 * 1.02, 0.1 * 1.02, 0.1], rtol=1e-6)
    assert np.isnan(metrics["preference_group/2/kl"]) and metrics["preference_group/0/kl"] > 1e-4
    everyone = make(reference=cases.params("reference"), kl=KLControl(coefficient=0.1, target=1e4, horizon=10.0), where=1)
    everyone.update(only)
    np.testing.assert_allclose(everyone.state.objective["kl_coefficients"], np.full(3, 0.1 * 0.98), rtol=1e-6)


def test_the_reference_follows_and_is_state(make):
    kl = KLControl(coefficient=0.1, refresh=2)
    learner = make(kl=kl)
    start = host(learner.state.objective["reference"])
    jax.tree.map(np.testing.assert_array_equal, start, cases.params("policy"))
    learner.update(units(0))
    jax.tree.map(np.testing.assert_array_equal, host(learner.state.objective["reference"]), start)
    learner.update(units(1))
    jax.tree.map(np.testing.assert_array_equal, host(learner.state.objective["reference"]), host(learner.state.trainable))
    learner.save(wait=True)
    again = make(kl=kl)
    assert again.restore() and checkpoints.state_sha256(again.state) == checkpoints.state_sha256(learner.state)
    found, expected = again.update(units(2))[0], learner.update(units(2))[0]
    assert found == pytest.approx(expected, rel=0, abs=0, nan_ok=True)


def test_a_curated_batch_trains_like_its_prompts_alone(make):
    """Twice the prompts, the first half dead: the update is that of the second half, and all rewards enter the history."""
    dead, alive = units(0)
    dead = dataclasses.replace(dead, rewards=np.full_like(dead.rewards, 0.5))
    rules = Curation(prompts_per_step=4, select="raw", max_new_tokens=cases.TC)
    curated = make(preset="grpo", curation=rules, oversample=2)
    metrics, advantages = curated.update((dead, alive))
    alone = make(preset="grpo", curation=dataclasses.replace(rules, select="any"), advantage_kernel=cases.kernel(cases.estimator("grpo"), 1, 4), where=1)
    alone.update((dataclasses.replace(alive, work=dataclasses.replace(alive.work, index=0)),))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), host(curated.state.trainable), host(alone.state.trainable))
    assert metrics["informative_prompts"] == 0.5 and len(advantages) == 8 * cases.G and not advantages[: 4 * cases.G].any()
    assert int(curated.state.history.count.sum()) == 8 * cases.G and curated.next_work == 2


def test_balanced_preference_groups_weigh_the_same(make):
    learner = make(preference_weights=PreferenceWeights("balanced"))
    metrics, _ = learner.update(units(0))
    counts = np.array([metrics[f"preference_group/{p}/count"] for p in range(cases.K)])
    weights = np.array([metrics[f"preference_group/{p}/weight"] for p in range(cases.K)])
    present = counts > 0
    np.testing.assert_allclose((weights * counts)[present], (weights * counts)[present][0], rtol=1e-6)
    np.testing.assert_allclose((weights * counts).sum() / counts.sum(), 1.0, rtol=1e-6)


def test_the_proximal_policy_may_be_the_current_one(make):
    """One update off-policy: against the generator the ratio moves, against the policy itself it is 1 and the correction does the work."""
    schedule = Schedule(accept=2)
    found = {}
    for where, proximal in enumerate(("generator", "current")):
        learner = make(schedule=schedule, proximal=proximal, where=where)
        learner.update(units(0))
        found[proximal] = learner.update(units(1, version=0))[0]
    assert found["generator"]["old_gap/max"] > 1e-4 and found["current"]["old_gap/max"] == 0 and found["current"]["ratio"] == 1
    assert found["current"]["mismatch/max"] != found["generator"]["mismatch/max"]


def test_gradient_shares_are_measured_when_they_are_due(make):
    learner = make(gradients_every=2)
    first, second = (learner.update(units(step))[0] for step in range(2))
    assert "gradient_cosine/mean" not in first
    np.testing.assert_allclose(sum(second[f"preference_group/{p}/gradient_share"] for p in range(cases.K)), 1.0, rtol=1e-5)


def test_a_preference_group_without_a_past_is_not_taken_for_needy(make):
    """Under dro who has no past weighs 1, also beside others whose rewards are above 0; later it is the needy that weigh more."""

    def of_preferences(step, ids):
        return tuple(
            dataclasses.replace(unit, prompt_records=tuple(dataclasses.replace(p, preference_id=ids[i % len(ids)]) for i, p in enumerate(unit.prompt_records)))
            for unit in units(step)
        )

    learner = make(preference_weights=PreferenceWeights("dro", 0.5))
    weights = []
    for step, ids in enumerate(((0, 1), (0, 1, 2), (0, 1, 2))):
        batch = of_preferences(step, ids)
        batch = tuple(dataclasses.replace(unit, rewards=unit.rewards + 2 * np.repeat([p.preference_id for p in unit.prompt_records], cases.G)) for unit in batch)
        metrics, _ = learner.update(batch)
        weights.append([metrics[f"preference_group/{p}/weight"] for p in range(cases.K)])
    assert weights[0] == [1, 1, 1]
    assert weights[1][2] == 1 and weights[1][0] > 2 * weights[1][1]
    assert weights[2][0] > 2 * weights[2][1] and weights[2][1] > 2 * weights[2][2]


def test_the_weights_multiply_the_advantages(make, tmp_path):
    learner = make(preference_weights=PreferenceWeights("balanced"), dump_batches=(1,))
    metrics, advantages = learner.update(units(0))
    read = batch_files.load_batch(tmp_path / "batches" / "step_000001.npz")
    ids = np.take(read.batch.preference_ids[0], read.batch.prompt_index[0])
    weights = np.array([metrics[f"preference_group/{p}/weight"] for p in range(cases.K)], np.float32)
    assert len(set(weights[ids])) > 1
    np.testing.assert_allclose(read.advantages[0], advantages * weights[ids], rtol=1e-6)


def test_around_the_current_policy_nothing_is_clipped_whatever_generated(make):
    """Units of several versions: the policy before the update is the old one, at no cost; the sampler's log-probs are the correction's."""
    learner = make(schedule=Schedule(accept=4, policy="freshest"))
    learner.update(units(0))
    mixed = (units(1, version=0)[0], units(1, version=1)[1])
    metrics, _ = learner.update(mixed, next_work=4)
    assert metrics["ratio"] == 1 and metrics["clip_fraction"] == 0 and metrics["old_gap/max"] == 0 and metrics["mismatch/max"] > 0.1


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_batch_of_a_step_is_written_when_asked(make, tmp_path, micro_batches):
    learner = make(reference=cases.params("reference"), kl=KLControl(coefficient=0.1), dump_batches=(2,), micro_batches=micro_batches)
    advantages = [learner.update(units(step))[1] for step in range(2)]
    assert [path.name for path in (tmp_path / "batches").iterdir()] == ["step_000002.npz"]
    read = batch_files.load_batch(tmp_path / "batches" / "step_000002.npz")
    flat = batching.to_train_batch(units(1), completions_per_prompt=cases.G, pad_id=cases.PAD)
    expected = batching.micro_batches(flat, micro_batches)
    jax.tree.map(np.testing.assert_array_equal, read.batch, expected)
    np.testing.assert_array_equal(read.advantages.reshape(-1), advantages[1])
    assert read.old_log_probs is None
    _, reference = scored(cases.params("reference"), units(1))
    np.testing.assert_allclose(
        np.where(expected.completion_mask, read.reference_log_probs, 0).reshape(reference.shape), np.where(flat.completion_mask, reference, 0), rtol=1e-5
    )


def short(step: int):
    """Units of `step` whose completions have two tokens at most: a row of the model holds two of them, or more."""
    return tuple(dataclasses.replace(unit, completion_lengths=np.minimum(unit.completion_lengths, 2)) for unit in units(step))


@pytest.mark.parametrize("options", [{}, {"micro_batch_tokens": 32}, {"num_devices": 2}, {"num_devices": 4, "fsdp": 2, "micro_batch_tokens": 16}])
def test_packing_changes_an_update_by_rounding_only(make, tmp_path, options):
    kept = {"reference": cases.params("reference"), "kl": KLControl(coefficient=0.1), "dump_batches": (1, 2)}
    plain, packed = make(where=0, **kept), make(where=1, packing=True, **kept, **options)
    for step in range(2):
        (expected, advantages), (found, of_packed) = (learner.update(short(step)) for learner in (plain, packed))
        np.testing.assert_allclose(of_packed, advantages, atol=1e-6)
        assert found.keys() == expected.keys()
        for name in ("loss", "grad_norm", "entropy", "kl", "ratio", "preference_group/1/entropy", "mismatch/max"):
            np.testing.assert_allclose(found[name], expected[name], rtol=2e-5, atol=1e-6, err_msg=name)
    for ours, its in zip(jax.tree.leaves(host(packed.state.trainable)), jax.tree.leaves(host(plain.state.trainable)), strict=True):
        np.testing.assert_allclose(ours, its, atol=2e-5)
    rows = batch_files.load_batch(tmp_path / "batches" / "step_000002.npz").batch.packing
    assert rows.shape[2:] == (1, 2 * cases.TC) and rows.shape[0] == {0: 1, 32: 4, 16: 2}[options.get("micro_batch_tokens", 0)]


def test_rewards_pay_for_the_kl_of_packed_completions_too(make):
    paying = dataclasses.replace(cases.LOSS, objective=dataclasses.replace(cases.LOSS.objective, kl_in="reward"))
    kept = {"reference": cases.params("reference"), "kl": KLControl(coefficient=0.3), "loss": paying}
    plain, packed = make(where=0, **kept), make(where=1, packing=True, micro_batch_tokens=32, **kept)
    (expected, advantages), (found, of_packed) = (learner.update(short(0)) for learner in (plain, packed))
    np.testing.assert_allclose(of_packed, advantages, atol=1e-5)
    np.testing.assert_allclose(found["reward_shaped"], expected["reward_shaped"], rtol=1e-5)
    assert abs(found["reward_shaped"] - found["reward"]) > 0.1
