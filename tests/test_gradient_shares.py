"""Parts of the gradient: they add up to the whole, give the shares NumPy gives, and do not see the mesh or the slices."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import learner_cases as cases
import numpy as np
import pytest

from pgrpo_jax import batching, gradient_shares, parallel, update as updates
from pgrpo_jax.algorithms import aggregation, objective
from pgrpo_jax.algorithms.objective import Objective
from pgrpo_jax.generation.sampler import Support
from pgrpo_jax.models import transformer

QUICK = {"xla_backend_optimization_level": 0}  # compiles in half the time; the arithmetic of a program is the same
LOSS = updates.LossSettings(objective=Objective(clip_high=0.3), support=Support(), num_preference_groups=cases.K)
BETA = np.array([0.3, 0.1, 0.5])
MODEL = transformer.Transformer(cases.CONFIG, dtype=jnp.dtype(np.float64))


def example(dtype):
    """(params, batch, advantages, old, reference); preference group 2 is absent; garbage as padding."""
    params, batch = cases.params("policy", dtype), cases.batch("batch", dtype)
    batch = dataclasses.replace(batch, preference_ids=np.array([0, 1, 0, 0, 1, 0, 1, 0], np.int32))
    rng = cases.named("gradient shares")
    old, reference = -rng.exponential(2.0, (2, *batch.completion_mask.shape)).astype(dtype)
    advantages = rng.normal(0.3, 1.0, len(batch.rewards)).astype(dtype)
    old[~(batch.completion_mask & batch.valid[:, None])] = np.nan
    advantages[~batch.valid] = np.nan
    return params, batch, advantages, old, reference


def parts_of(mesh, slices, dtype=np.float64):
    params, batch, advantages, old, reference = example(dtype)
    cut = lambda x: x.reshape(slices, -1, *x.shape[1:])  # noqa: E731
    rows = batching.micro_batches(batch, slices), cut(advantages), cut(old), cut(reference)
    return parallel.place(params, parallel.layout(params, mesh)), parallel.shard_rows(rows, mesh, axis=1)


def flat(tree):
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


@pytest.fixture(scope="module")
def measured():
    """(Gram matrix, the parts' gradients [K, size] over the count, the batch's gradient) on one device, in two slices."""
    with jax.enable_x64(True):
        params, parts = parts_of(parallel.make_mesh(jax.devices()[:1]), 2)
        gram = gradient_shares.gradient_shares(params, MODEL, LOSS, *parts[:2], BETA, *parts[2:])
        own = [gradient_shares.preference_gradient(params, MODEL, LOSS, BETA, parts, p) for p in range(cases.K)]
        program = jax.jit(updates.accumulate, static_argnums=(1, 2), compiler_options=QUICK)
        whole = flat(program(params, MODEL, LOSS, *parts[:2], BETA, *parts[2:])[0])
        count = float(parts[0].valid.sum())
        assert sum(float(c) for _, c in own) == count
        return gram, np.stack([flat(g) for g, _ in own]) / count, whole


def test_the_parts_add_up_to_the_gradient(measured):
    _, parts, whole = measured
    np.testing.assert_allclose(parts.sum(axis=0), whole, rtol=0, atol=1e-12 * np.linalg.norm(whole))
    assert np.linalg.norm(parts[2]) == 0 and min(np.linalg.norm(parts[:2], axis=1)) > 0.05 * np.linalg.norm(whole)


def test_shares_and_cosines_are_those_of_the_gradients(measured):
    gram, parts, whole = measured
    np.testing.assert_allclose(gram, parts @ parts.T, rtol=1e-10, atol=1e-14)
    metrics = gradient_shares.describe(gram)
    norms = [np.linalg.norm(part) for part in parts]
    for p in range(cases.K):
        assert metrics[f"preference_group/{p}/gradient_share"] == pytest.approx(parts[p] @ whole / (whole @ whole), rel=1e-9, abs=1e-12)
        assert metrics[f"preference_group/{p}/gradient_norm_share"] == pytest.approx(norms[p] / sum(norms), rel=1e-9)
    cosine = parts[0] @ parts[1] / norms[0] / norms[1]
    assert metrics["gradient_cosine/min"] == metrics["gradient_cosine/mean"] == pytest.approx(cosine, rel=1e-9)
    assert metrics["gradient_cosine/matrix"][1][0] == pytest.approx(cosine) and math.isnan(metrics["gradient_cosine/matrix"][2][2])
    assert sum(metrics[f"preference_group/{p}/gradient_share"] for p in range(cases.K)) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("fsdp, tp, slices", [(2, 2, 1)])
def test_the_mesh_and_the_slices_are_invisible(measured, fsdp, tp, slices):
    with jax.enable_x64(True):
        params, parts = parts_of(parallel.make_mesh(jax.devices(), fsdp=fsdp, tp=tp), slices)
        gram = gradient_shares.gradient_shares(params, MODEL, LOSS, *parts[:2], BETA, *parts[2:])
        gradient, _ = gradient_shares.preference_gradient(params, MODEL, LOSS, BETA, parts, 0)
    np.testing.assert_allclose(gram, measured[0], rtol=1e-9, atol=1e-14)
    assert jax.tree.map(lambda g, x: g.sharding == x.sharding, gradient, params) == jax.tree.map(lambda _: True, params)


@pytest.mark.parametrize("name", aggregation.AGGREGATIONS)
def test_the_parts_add_up_under_every_aggregation(name):
    """Sums and divisors both do, whatever weighs a token: the rows of the others are only masked."""
    _, batch, advantages, old, reference = example(np.float32)
    ids = batch.preference_ids[batch.prompt_index]
    shape = batch.completion_mask.shape
    log_probs, entropies = cases.named("log-probs").normal(-2, 0.3, (2, *shape)).astype(np.float32)

    def loss_of(valid):
        values = log_probs, old, old, reference, entropies, advantages, BETA[ids].astype(np.float32), batch.completion_mask, valid
        chosen = Objective(aggregation=name, entropy_coefficient=0.1, max_length=cases.TC)
        return objective.policy_loss(*values, batch.prompt_index, objective=chosen, num_prompts=cases.P)[:2]

    whole, parts = loss_of(batch.valid), [loss_of(batch.valid & (ids == p)) for p in range(cases.K)]
    np.testing.assert_allclose(np.sum(parts, axis=0), whole, rtol=1e-5)
    assert parts[2] == (0, 0) and parts[0][1] > 0 < parts[1][1]


@pytest.mark.parametrize("rounding", [0.0, 3e-7, -3e-7])
def test_opposite_gradients_cancel_and_have_no_share(rounding):
    metrics = gradient_shares.describe(np.array([[4.0, -4.0], [-4.0, 4.0 + rounding]]))
    assert math.isnan(metrics["preference_group/0/gradient_share"])
    assert metrics["preference_group/0/gradient_norm_share"] == pytest.approx(0.5)
    assert metrics["gradient_cosine/min"] == pytest.approx(-1.0) and metrics["gradient_cosine/min"] >= -1.0


def test_a_preference_group_that_is_pushed_back_has_a_negative_share():
    parts = np.array([[3.0, 0.0], [-1.0, 1.0], [0.0, 0.0]])
    metrics = gradient_shares.describe(parts @ parts.T)  # the whole: (2, 1)
    shares = [metrics[f"preference_group/{p}/gradient_share"] for p in range(3)]
    assert shares == pytest.approx([6 / 5, -1 / 5, 0])
    assert metrics["gradient_cosine/mean"] == pytest.approx(-math.sqrt(0.5))


@pytest.mark.parametrize("gram", [np.zeros((3, 3)), np.array([[2.0]])])
def test_without_pairs_there_are_no_angles(gram):
    metrics = gradient_shares.describe(gram)
    assert math.isnan(metrics["gradient_cosine/min"]) and math.isnan(metrics["gradient_cosine/mean"])
    assert metrics["preference_group/0/gradient_share"] == 1.0 if gram.any() else math.isnan(metrics["preference_group/0/gradient_share"])
