"""The update: its gradient against finite differences, its slices against the whole, its optimiser against NumPy."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import learner_cases as cases
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pgrpo_jax import batching, parallel
from pgrpo_jax import update as updates
from pgrpo_jax.algorithms import reward_history
from pgrpo_jax.generation.scoring import score
from pgrpo_jax.models import transformer
from pgrpo_jax.optimiser import make_optimiser
from pgrpo_jax.structs import TrainState
from pgrpo_jax.train_state import initial_state

QUICK = {"xla_backend_optimization_level": 0}  # compiles in half the time; the arithmetic of a program is the same
CLIP_LOW, CLIP_HIGH = 0.2, 0.3
WITH_KL = dataclasses.replace(cases.LOSS, objective=dataclasses.replace(cases.LOSS.objective, clip_low=CLIP_LOW, clip_high=CLIP_HIGH))
BETAS = np.array([0.3, 0.1, 0.5])  # one for each preference group


def model(dtype) -> transformer.Transformer:
    return transformer.Transformer(cases.CONFIG, dtype=jnp.dtype(dtype))


@functools.cache
def example(dtype=np.float32):
    """(params, batch, advantages, old log-probs, reference log-probs): ratios on both sides of both clip bounds, garbage as padding."""
    with jax.enable_x64(True):
        params, batch = cases.params("policy", np.float64), cases.batch("batch", np.float64)
        scored = jax.jit(functools.partial(score, model(np.float64)), static_argnums=2, compiler_options=QUICK)
        log_probs, entropies = jax.device_get(scored(params, batch, WITH_KL.support))
        rng = cases.named("noise")
        old, reference = (log_probs + rng.normal(0, scale, log_probs.shape) for scale in (0.4, 0.5))
        advantages = rng.normal(0.3, 1.0, len(batch.rewards))
        counted = batch.completion_mask & batch.valid[:, None]
        for values in (old, reference):
            values[~counted] = rng.choice([np.nan, np.inf, 1e9], (~counted).sum())
        advantages[~batch.valid] = np.nan
        to = lambda tree: jax.tree.map(lambda x: x.astype(dtype) if x.dtype == np.float64 else x, tree)  # noqa: E731
        return *to((params, batch, advantages, old, reference)), log_probs, entropies


@functools.cache
def accumulated(count: int, dtype=np.float32, settings=WITH_KL, on_policy=False, reference=True):
    """`update.accumulate` over `count` slices of the example, on the host."""
    params, batch, advantages, old, fixed, *_ = example(dtype)
    cut = lambda x: x.reshape(count, -1, *x.shape[1:])  # noqa: E731
    with jax.enable_x64(dtype == np.float64):
        program = jax.jit(updates.accumulate, static_argnums=(1, 2), compiler_options=QUICK)
        betas = BETAS.astype(dtype) if reference else np.zeros(cases.K, dtype)
        parts = batching.micro_batches(batch, count), cut(advantages), betas, None if on_policy else cut(old), cut(fixed) if reference else None
        return jax.device_get(program(params, model(dtype), settings, *parts))


def loop() -> tuple[float, dict[str, float]]:
    """Loss and token sums of the example from its log-probs, token by token."""
    _, batch, advantages, old, reference, log_probs, entropies = example(np.float64)
    names = ("token_count", "clipped", "ratio", "kl", "entropy", "old_kl")
    loss, sums = 0.0, {name: np.zeros(len(batch.valid)) for name in names}
    gaps = {"mismatch": [], "old_gap": []}
    for i in np.flatnonzero(batch.valid):
        length, p = int(batch.completion_mask[i].sum()), batch.preference_ids[batch.prompt_index[i]]
        for t in range(length):
            ratio, advantage, d = math.exp(log_probs[i, t] - old[i, t]), float(advantages[i]), reference[i, t] - log_probs[i, t]
            bounded = min(max(ratio, 1 - CLIP_LOW), 1 + CLIP_HIGH)
            surrogate, kl = min(ratio * advantage, bounded * advantage), math.exp(d) - d - 1
            loss -= (surrogate - BETAS[p] * kl) / length
            gaps["mismatch"].append(abs(old[i, t] - batch.behaviour_log_probs[i, t]))
            gaps["old_gap"].append(abs(log_probs[i, t] - old[i, t]))
            old_kl = ratio - 1 - math.log(ratio)
            values = 1, surrogate != ratio * advantage, ratio, kl, entropies[i, t], old_kl
            for name, value in zip(names, values, strict=True):
                sums[name][i] += value
    tokens = sums["token_count"]
    sums |= {"correction": tokens, "correction_squared": tokens, "correction_bounded": 0 * tokens}
    return loss / batch.valid.sum(), sums, gaps


def test_loss_and_sums_equal_the_loop():
    _, loss, sums, gaps = accumulated(2, np.float64)
    expected, expected_sums, expected_gaps = loop()
    assert 10 < expected_sums["clipped"].sum() < expected_sums["token_count"].sum() - 10, "the clip is active on some tokens only"
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    assert sums.keys() == expected_sums.keys()
    for name, value in expected_sums.items():
        np.testing.assert_allclose(sums[name].reshape(-1), value, rtol=1e-11, err_msg=name)
    for place, (name, values) in enumerate(expected_gaps.items()):
        found = gaps[:, :, place]
        np.testing.assert_allclose(found[found >= 0], values, rtol=1e-10, err_msg=name)


def directions(params):
    """Random directions over all parameters, over one leaf at a time, and single parameters of every leaf."""
    leaves, tree = jax.tree.flatten(params)
    rng = cases.named("directions")
    for seed in range(3):
        yield f"direction {seed}", tree.unflatten([rng.normal(size=x.shape) for x in leaves])
    for number, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(params)):
        for place in rng.integers(0, leaf.size, 3):
            one = [np.zeros(x.shape) for x in leaves]
            one[number].reshape(-1)[place] = 1.0
            yield f"{jax.tree_util.keystr(path)}[{place}]", tree.unflatten(one)
        leaf_only = [rng.normal(size=x.shape) if i == number else np.zeros(x.shape) for i, x in enumerate(leaves)]
        yield jax.tree_util.keystr(path), tree.unflatten(leaf_only)


def test_gradient_equals_finite_differences():
    with jax.enable_x64(True):
        params, batch, advantages, *fixed, _, _ = example(np.float64)

        def loss(at):
            total, (divisor, *_) = updates.loss_sums(at, model(np.float64), WITH_KL, batch, advantages, BETAS, *fixed)
            return total / divisor

        loss = jax.jit(loss, compiler_options=QUICK)
        gradient, *_ = accumulated(2, np.float64)
        moved = 0
        for name, direction in directions(params):
            step = 1e-5 / math.sqrt(sum(float(np.sum(x * x)) for x in jax.tree.leaves(direction)))
            up, down = (jax.tree.map(lambda x, d: x + sign * step * d, params, direction) for sign in (1, -1))
            numeric = float(loss(up) - loss(down)) / (2 * step)
            exact = sum(float(np.sum(g * d)) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction)))
            np.testing.assert_allclose(exact, numeric, rtol=1e-6, atol=1e-9 / step * 1e-5, err_msg=name)
            moved += abs(numeric) > 1e-6
    assert moved >= 40, "most directions change the loss"


def relative(a, b) -> float:
    """|a - b| / |b| of two trees, in the norm over all leaves."""
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    return math.sqrt(sum(float(np.sum((x - y) ** 2)) for x, y in pairs) / sum(float(np.sum(y**2)) for _, y in pairs))


@pytest.mark.parametrize("count", [2, 4])
def test_slicing_is_invisible(count):
    """In float64, where rounding hides nothing."""
    batch = example()[1]
    per_slice = batch.valid.reshape(count, -1).sum(axis=1), batch.completion_mask.reshape(count, -1).sum(axis=1)
    assert all(len(set(values)) > 1 for values in per_slice), "means of means would differ: the slices are uneven"
    (gradient, *rest), (expected, *others) = accumulated(count, np.float64), accumulated(1, np.float64)
    assert relative(gradient, expected) < 1e-12
    for found, wanted in zip(jax.tree.leaves(tuple(rest)), jax.tree.leaves(tuple(others)), strict=True):
        np.testing.assert_allclose(np.reshape(found, np.shape(wanted)), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fsdp, tp", [(8, 1), (2, 2)])
def test_the_mesh_is_invisible(fsdp, tp):
    """In float64, to 1e-12 of the gradient; clip, KL and masks active."""
    params, batch, advantages, old, fixed, *_ = example(np.float64)
    mesh = parallel.make_mesh(jax.devices(), fsdp=fsdp, tp=tp)
    with jax.enable_x64(True):
        parts = parallel.shard_rows((batching.micro_batches(batch, 1), advantages[None], old[None], fixed[None]), mesh, axis=1)
        placed = parallel.place(params, parallel.layout(params, mesh))
        program = jax.jit(updates.accumulate, static_argnums=(1, 2), compiler_options=QUICK)
        sliced, weights, *fixed = parts
        gradient, *rest = jax.device_get(program(placed, model(np.float64), WITH_KL, sliced, weights, BETAS, *fixed))
    expected, *others = accumulated(1, np.float64)
    assert relative(gradient, expected) < 1e-12
    for found, wanted in zip(jax.tree.leaves(tuple(rest)), jax.tree.leaves(tuple(others)), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-12)


def test_the_policy_that_generated_is_its_own_old_policy():
    """Without old log-probs the ratio is exactly 1; the gradient is the one with the policy's own log-probs as the old ones."""
    params, batch, advantages, *_, log_probs, _ = example()
    settings = cases.LOSS
    gradient, _, sums, _ = accumulated(1, settings=settings, on_policy=True, reference=False)
    assert not sums["clipped"].any() and (sums["ratio"] == sums["token_count"]).all() and "kl" not in sums
    scored = updates.score_slices(params, cases.MODEL, settings.support, batching.micro_batches(batch, 2)).reshape(log_probs.shape)
    np.testing.assert_allclose(scored, log_probs, atol=5e-5)

    def loss(at):
        new = score(cases.MODEL, at, batch, settings.support)[0]
        mask = batch.completion_mask & batch.valid[:, None]
        per_token = jnp.where(mask, jnp.exp(new - scored) * np.where(batch.valid, advantages, 0)[:, None], 0)
        lengths = np.maximum(mask.sum(axis=1), 1).astype(np.float32)
        return -jnp.sum(per_token.sum(axis=1) / lengths) / float(batch.valid.sum())

    assert relative(gradient, jax.jit(jax.grad(loss), compiler_options=QUICK)(params)) < 1e-5


# --- the compiled update


MESH = parallel.make_mesh(jax.devices()[:1])


def fresh() -> TrainState:
    return initial_state(cases.params("policy"), reward_history.init(cases.K), cases.OPTIMISER, MESH)


def whole(batch, advantages):
    """One slice, laid out as the learner does it."""
    return parallel.shard_rows((batching.micro_batches(batch, 1), advantages[None]), MESH, axis=1)


def test_update_makes_one_step_and_donates_its_state(lenient):
    params, batch, advantages, *_ = example()
    before = fresh()
    held = jax.tree.leaves((before.trainable, before.optimiser))
    parts = whole(batch, advantages)
    state, scalars = updates.update(before, cases.MODEL, cases.LOSS, cases.OPTIMISER, *parts, None, None)
    assert all(leaf.is_deleted() for leaf in held), "the buffers of the state are reused: memory for one state, not two"

    gradient, loss, sums, gaps = accumulated(1, settings=cases.LOSS, on_policy=True, reference=False)
    optimiser = make_optimiser(cases.OPTIMISER)
    changes, _ = jax.jit(optimiser.update)(gradient, optimiser.init(params), params)
    assert relative(jax.tree.map(lambda new, old: new - old, state.trainable, params), changes) < 1e-2  # m / sqrt(v) near g = 0 is rounding
    moments = state.optimiser[1][0].mu
    norm = float(optax.tree.norm(gradient))
    assert norm > cases.OPTIMISER.clip_norm
    assert relative(jax.tree.map(lambda m: m / (1 - cases.OPTIMISER.b1) * norm, moments), gradient) < 1e-5, "clipped to norm 1"
    mismatch = np.sort(gaps[:, :, 0][gaps[:, :, 0] >= 0])
    ids = batch.preference_ids[batch.prompt_index]
    by_preference = [np.bincount(ids, sums[name].reshape(-1), cases.K) for name in ("entropy", "token_count")]
    expected = {"loss": loss, "grad_norm": norm, "ratio": 1.0, "clip_fraction": 0.0, "old_gap/max": 0.0}
    expected |= {"mismatch/mean": mismatch.mean(), "mismatch/max": mismatch[-1], "mismatch/p95": mismatch[math.ceil(0.95 * len(mismatch)) - 1]}
    expected |= {"entropy": sums["entropy"].sum() / sums["token_count"].sum(), "by_preference/entropy": by_preference[0] / by_preference[1]}
    for name, value in expected.items():
        np.testing.assert_allclose(scalars[name], value, rtol=1e-5, err_msg=name)
    assert int(state.step) == 0 and not np.any(state.history.count), "steps and rewards are counted by the learner"


def test_measurements_are_means_over_tokens():
    """Two micro-batches of two prompts with two completions; the third preference group has no prompt, the last completion no token."""
    rng = np.random.default_rng(0)
    counts = np.float32([[3, 1, 2, 4], [1, 1, 5, 0]])
    sums = {"token_count": counts} | {name: rng.random((2, 4)).astype(np.float32) * counts for name in ("clipped", "ratio", "entropy")}
    gaps = rng.random((2, 4, 2, 5)).astype(np.float32)
    gaps = np.where(np.arange(5) < counts[:, :, None, None], gaps, np.float32(-1))
    ids = np.int32([[0, 1], [1, 1]])
    everywhere = NamedSharding(parallel.make_mesh(jax.devices()[:1]), PartitionSpec())
    found = jax.jit(functools.partial(updates._measure, everywhere=everywhere, num_preference_groups=3))(sums, gaps, ids)
    rows = np.repeat(ids.reshape(-1), 2)
    expected = {"clip_fraction": sums["clipped"].sum() / 17, "ratio": sums["ratio"].sum() / 17, "entropy": sums["entropy"].sum() / 17}
    expected["by_preference/entropy"] = [sums["entropy"].reshape(-1)[rows == k].sum() / counts.reshape(-1)[rows == k].sum() for k in (0, 1)] + [np.nan]
    for place, name in enumerate(("mismatch", "old_gap")):
        values = np.sort(gaps[:, :, place][gaps[:, :, place] >= 0])
        assert len(values) == 17
        expected |= {f"{name}/mean": values.mean(), f"{name}/p95": values[math.ceil(0.95 * 17) - 1], f"{name}/max": values[-1]}
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)


def test_a_batch_that_only_pads_changes_nothing(lenient):
    """All rows masked: gradient 0 and no division by 0."""
    batch = dataclasses.replace(cases.batch("batch"), valid=np.zeros(cases.P * cases.G, bool))
    before = fresh()
    kept = cases.params("policy")
    parts = whole(batch, np.full(cases.P * cases.G, np.nan, np.float32))
    state, scalars = updates.update(before, cases.MODEL, cases.LOSS, cases.OPTIMISER, *parts, None, None)
    assert scalars["loss"] == 0 and scalars["grad_norm"] == 0
    decay = 1 - cases.OPTIMISER.learning_rate * cases.OPTIMISER.weight_decay
    np.testing.assert_allclose(state.trainable["embedding"], decay * kept["embedding"], rtol=1e-6)
    np.testing.assert_array_equal(state.trainable["final_norm"], kept["final_norm"])
