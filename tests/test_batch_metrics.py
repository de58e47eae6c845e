"""The metrics of a batch against plain loops, down to batches with nothing in them."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import learner_cases as cases
import numpy as np
import pytest

from pgrpo_jax import batch_metrics
from pgrpo_jax.algorithms.advantages import Diagnostics

NAN = float("nan")


def diagnostics(batch):
    """What an estimator reports, by loops; the rest random."""
    rng = cases.named("diagnostics")
    preference = batch.preference_ids[batch.prompt_index]
    own = [[float(batch.rewards[i]) for i in np.flatnonzero(batch.valid) if preference[i] == p] for p in range(cases.K)]
    names = ("batch_std", "advantage_scale", "bias", "history_mean", "history_std")
    floats = {name: rng.random(cases.K).astype(np.float32) for name in names}
    counts = {"batch_count": np.array([len(r) for r in own], np.int32), "history_count": np.array([5, 0, 9], np.int32)}
    return Diagnostics(batch_mean=np.array([np.mean(r) if r else 0 for r in own], np.float32), **counts, **floats)


def example():
    """Preference group 2 is absent, prompt 2 has one reward, prompt 4 no completion; equal answers in and across prompts; garbage."""
    rng = cases.named("batch metrics")
    batch = cases.batch("describe")
    valid, completions, mask = batch.valid.copy(), batch.completions.copy(), batch.completion_mask.copy()
    rewards = np.where(valid, batch.rewards, 1e9).astype(np.float32)
    valid[16:20] = False
    rewards[8:12] = 0.25
    completions[13], mask[13] = completions[12], mask[12]
    completions[15], mask[15] = completions[12], mask[12]
    completions[13][~mask[13]] = 31  # behind the mask they differ
    completions[20], mask[20] = completions[12], mask[12]  # the same answer to another prompt
    completions[9], mask[9] = completions[8], mask[8]
    mask[9, -1], mask[8, -1], completions[9, -1] = True, True, completions[8, -1] % 31 + 1  # differ in the last token only
    batch = dataclasses.replace(
        batch, preference_ids=np.array([0, 1, 1, 0, 0, 1, 0, 1], np.int32), valid=valid, completions=completions, completion_mask=mask,
        rewards=rewards,
    )  # fmt: skip
    return batch, np.where(valid, rng.normal(size=len(valid)), 77.0).astype(np.float32)


def test_describe_equals_a_loop():
    batch, advantages = example()
    found = diagnostics(batch)
    metrics = batch_metrics.describe(batch, advantages, found)
    rows = [i for i in range(len(batch.valid)) if batch.valid[i]]
    preference = {i: int(batch.preference_ids[batch.prompt_index[i]]) for i in rows}
    said = lambda i: tuple(int(t) for t, m in zip(batch.completions[i], batch.completion_mask[i]) if m)  # noqa: E731
    answers = {i: (int(batch.prompt_index[i]), said(i)) for i in rows}
    signal = lambda some: sum(abs(float(advantages[i])) for i in some)  # noqa: E731
    repeated = {i: any(answers[j] == answers[i] for j in rows if j < i) for i in rows}
    assert repeated[13] and repeated[15] and not repeated[12] and not repeated[20] and not repeated[9]
    mean = lambda values: sum(values) / len(values) if len(values) else NAN  # noqa: E731
    prompts = [[float(batch.rewards[i]) for i in rows if batch.prompt_index[i] == p] for p in range(cases.P)]
    means = sorted(mean(r) for r in prompts if r)  # 7 prompts: 1.4 of them are the worst fifth
    expected = {
        "reward": mean([float(batch.rewards[i]) for i in rows]),
        "reward_std": np.std([float(batch.rewards[i]) for i in rows]),
        "advantage_mean": mean([float(advantages[i]) for i in rows]),
        "advantage_std": np.std([float(advantages[i]) for i in rows]),
        "advantage_scale": mean([float(found.advantage_scale[preference[i]]) for i in rows]),
        "advantage_bias": mean([float(found.bias[preference[i]]) for i in rows]),
        "dead_prompts": sum(len(set(r)) <= 1 for r in prompts) / cases.P,
        "length": mean([batch.completion_mask[i].sum() for i in rows]),
        "duplicates": mean(list(repeated.values())),
        "cvar": (means[0] + 0.4 * means[1]) / 1.4,
    }
    for p in range(cases.K):
        own = [i for i in rows if preference[i] == p]
        expected |= {
            f"preference_group/{p}/reward": mean([float(batch.rewards[i]) for i in own]),
            f"preference_group/{p}/count": len(own),
            f"preference_group/{p}/signal_share": signal(own) / signal(rows),
            f"preference_group/{p}/length": mean([batch.completion_mask[i].sum() for i in own]),
            f"preference_group/{p}/duplicates": mean([repeated[i] for i in own]),
            f"preference_group/{p}/history_count": [5, 0, 9][p],
            f"preference_group/{p}/effective_history_count": [5, 0, 9][p],
        }
        for name in ("advantage_scale", "bias", "history_mean", "history_std"):
            expected[f"preference_group/{p}/{name}"] = float(getattr(found, name)[p])
    rewarded = [expected[f"preference_group/{p}/reward"] for p in (0, 1)]
    expected |= {"worst_preference_group": rewarded.index(min(rewarded)), "worst_reward": min(rewarded)}
    expected["gap"] = abs(rewarded[0] - rewarded[1])
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6, err_msg=name)
    assert math.isnan(metrics["preference_group/2/reward"]) and metrics["preference_group/2/signal_share"] == 0
    assert all(type(value) is float for value in metrics.values())


def test_discounted_histories_count_for_less():
    batch, advantages = example()
    metrics = batch_metrics.describe(batch, advantages, diagnostics(batch), effective_history_count=np.array([2.5, 0.0, 9.0]))
    assert [metrics[f"preference_group/{p}/effective_history_count"] for p in range(3)] == [2.5, 0.0, 9.0]
    assert [metrics[f"preference_group/{p}/history_count"] for p in range(3)] == [5.0, 0.0, 9.0]


def test_a_step_whose_completions_were_all_dropped_has_no_numbers():
    batch, advantages = example()
    batch = dataclasses.replace(batch, valid=np.zeros_like(batch.valid))
    metrics = batch_metrics.describe(batch, advantages, diagnostics(batch))
    missing = {name for name, value in metrics.items() if math.isnan(value)}
    general = {"reward", "reward_std", "advantage_mean", "advantage_std", "length", "duplicates", "cvar", "worst_preference_group", "gap"}
    of_each = {f"preference_group/{p}/{name}" for p in range(3) for name in ("reward", "signal_share", "length", "duplicates")}
    assert missing == general | of_each | {"worst_reward"} and metrics["dead_prompts"] == 1.0


def test_no_signal_has_no_shares():
    batch, advantages = example()
    metrics = batch_metrics.describe(batch, np.zeros_like(advantages), diagnostics(batch))
    assert math.isnan(metrics["preference_group/0/signal_share"])


@pytest.mark.parametrize("rewards, expected", [
    ([0.5, 0.2, 0.9], (1, 0.2, 0.7)), ([0.5, NAN, 0.5], (0, 0.5, 0.0)), ([NAN, 0.3, NAN], (1, 0.3, NAN)), ([NAN], (NAN, NAN, NAN)),
    ([], (NAN, NAN, NAN)), ([1e9 + 1, 1e9], (1, 1e9, 1.0)),
])
def test_worst(rewards, expected):
    np.testing.assert_array_equal(list(batch_metrics.worst(rewards).values()), expected)


@pytest.mark.parametrize("rewards, share, expected", [
    ([3.0, 1.0, 2.0, 5.0, 4.0], 0.2, 1.0), ([3.0, 1.0, 2.0, 5.0, 4.0], 0.4, 1.5), ([3.0, 1.0, 2.0, 5.0, 4.0], 0.3, (1 + 0.5 * 2) / 1.5),
    ([2.0, 1.0], 0.2, 1.0), ([7.0], 0.2, 7.0), ([1.0, 2.0, 6.0], 1.0, 3.0), ([4.0] * 9, 0.2, 4.0), ([], 0.2, NAN),
])
def test_cvar(rewards, share, expected):
    np.testing.assert_allclose(batch_metrics.cvar(np.array(rewards), share), expected, rtol=1e-12)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5, NAN])
def test_cvar_of_an_impossible_share(share):
    with pytest.raises(ValueError, match=r"share = \S+ is outside \(0, 1\]: "):
        batch_metrics.cvar(np.ones(3), share)


def test_cvar_is_the_least_over_all_thresholds():
    """Rockafellar and Uryasev's definition, for losses −r: the minimum over z of z + mean(max(−r − z, 0)) / share."""
    rewards = cases.named("cvar").normal(size=37)
    losses = -rewards
    assert batch_metrics.cvar(rewards) == pytest.approx(-min(z + np.maximum(losses - z, 0).mean() / 0.2 for z in losses), rel=1e-12)


def test_token_sums_add_up_over_slices_and_equal_a_loop():
    batch, _ = example()
    rng = cases.named("tokens")
    entropy, kl = rng.random((2, *batch.completion_mask.shape)).astype(np.float32)
    counted = batch.completion_mask & batch.valid[:, None]
    expected = {name: [0.0] * cases.K for name in ("entropy", "kl", "token_count")}
    for i, t in zip(*np.nonzero(counted)):
        p = batch.preference_ids[batch.prompt_index[i]]
        for name, value in (("entropy", entropy[i, t]), ("kl", kl[i, t]), ("token_count", 1.0)):
            expected[name][p] += float(value)
    entropy[~counted] = np.nan
    sums = jax.jit(lambda b, e, k: batch_metrics.token_sums(b, {"entropy": e, "kl": k}, num_preference_groups=cases.K))(batch, entropy, kl)
    halves = [slice(0, 4), slice(4, 8)]
    rows = [slice(0, 16), slice(16, 32)]
    values = [{"entropy": jnp.array(entropy[r]), "kl": jnp.array(kl[r])} for r in rows]
    slices = [cut(batch, p, r) for p, r in zip(halves, rows)]
    parts = [batch_metrics.token_sums(s, v, num_preference_groups=cases.K) for s, v in zip(slices, values)]
    for name, value in expected.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(sum(part[name] for part in parts), value, rtol=1e-5, err_msg=name)
    means = batch_metrics.token_means(jax.device_get(sums))
    assert means.keys() == {f"preference_group/{p}/{name}" for p in range(3) for name in ("entropy", "kl")}
    assert means["preference_group/1/kl"] == pytest.approx(expected["kl"][1] / expected["token_count"][1], rel=1e-5)
    assert math.isnan(means["preference_group/2/kl"])


def cut(batch, prompts, rows):
    by_prompt = {name: getattr(batch, name)[prompts] for name in ("prompts", "prompt_lengths", "preference_ids")}
    by_row = {f.name: getattr(batch, f.name)[rows] for f in dataclasses.fields(batch) if f.name not in by_prompt}
    return type(batch)(**by_prompt, **by_row | {"prompt_index": by_row["prompt_index"] - prompts.start})


def test_no_gradient_goes_through_token_sums():
    batch, _ = example()
    ones = jnp.ones(batch.completion_mask.shape)
    gradient = jax.grad(lambda x: batch_metrics.token_sums(batch, {"entropy": x}, num_preference_groups=3)["entropy"].sum())(ones)
    assert not np.any(gradient)
