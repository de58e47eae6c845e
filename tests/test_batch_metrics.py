"""The metrics of a batch against plain loops, down to batches with nothing in them."""

import dataclasses
import math

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
    effective = np.array([4.5, 0.0, 8.0], np.float32)
    counts = {"batch_count": np.array([len(r) for r in own], np.int32), "history_count": np.array([5, 0, 9], np.int32)}
    means = np.array([np.mean(r) if r else 0 for r in own], np.float32)
    return Diagnostics(batch_mean=means, effective_count=effective, **counts, **floats)


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
            f"preference_group/{p}/effective_history_count": [4.5, 0.0, 8.0][p],
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
    found = diagnostics(batch).replace(effective_count=np.array([2.5, 0.0, 9.0], np.float32))
    metrics = batch_metrics.describe(batch, advantages, found)
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


def measured():
    """What an update of a policy with a reference gives; preference group 2 has no token."""
    scalars = {"loss": -0.1, "grad_norm": 1.5, "kl": 0.02, "clip_fraction": 0.0, "mismatch/p95": 0.01, "correction": 0.75}
    by_preference = {"entropy": np.array([1.0, 2.0, NAN], np.float32), "kl": np.array([0.5, 0.25, NAN], np.float32)}
    return (scalars | {"correction_squared": 0.9, "correction_bounded": 0.25}
            | {f"by_preference/{name}": values for name, values in by_preference.items()})  # fmt: skip


def test_what_the_update_measured_is_named():
    found = batch_metrics.of_update(measured(), np.array([0.1, 0.2, 0.6], np.float32))
    expected = {
        "loss": -0.1, "grad_norm": 1.5, "kl": 0.02, "clip_fraction": 0.0, "mismatch/p95": 0.01, "correction/weight": 0.75,
        "correction/bounded": 0.25, "effective_sample_size": 0.75**2 / 0.9, "kl_coefficient": 0.3,
    }  # fmt: skip
    for p, (entropy, kl, beta) in enumerate([(1.0, 0.5, 0.1), (2.0, 0.25, 0.2), (NAN, NAN, 0.6)]):
        expected |= {f"preference_group/{p}/{name}": value for name, value in (("entropy", entropy), ("kl", kl), ("kl_coefficient", beta))}
    assert found.keys() == expected.keys() and all(type(value) is float for value in found.values())
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)


def test_the_effective_sample_size_is_the_share_of_equal_weights_that_count():
    weights = np.array([0.0, 0.0, 2.0, 2.0])
    sums = measured() | {"correction": weights.mean(), "correction_squared": (weights**2).mean()}
    assert batch_metrics.of_update(sums, np.zeros(3))["effective_sample_size"] == 0.5
    nothing = batch_metrics.of_update(measured() | {"correction": 0.0, "correction_squared": 0.0}, np.zeros(3))
    assert nothing["effective_sample_size"] == nothing["correction/weight"] == 0.0


def test_without_a_reference_no_kl_was_measured():
    sums = {name: value for name, value in measured().items() if not name.endswith("kl")}
    assert math.isnan(batch_metrics.of_update(sums, np.zeros(3))["kl"])


@pytest.mark.parametrize("rewards, expected", [
    ([1.0, 2.0, 1e9], 1.5), ([[1.0, 3.0], [2.0, 4.0], [1e9, 1e9]], 2.5),
])
def test_mean_reward_leaves_padding_out(rewards, expected):
    assert batch_metrics.mean_reward(np.array(rewards, np.float32), np.array([True, True, False])) == expected
    assert math.isnan(batch_metrics.mean_reward(np.array(rewards, np.float32), np.zeros(3, bool)))
