"""Floor 5: what the numbers of a run mean: unit, healthy range, and the sentences that are drawn from them.

The records themselves are kept by `run_directory.py` and shown by `console.py` and `report.py`; docs/metrics.md holds the same table.
"""

import math
import re
from typing import Any, Mapping, NamedTuple, Sequence

ON_POLICY_LOSS = 1e-3
"""Below this a loss looks like 0 to a person."""
FORMAT_LEARNED_RATE = 0.9
"""A policy that answers this share of prompts has learned the format."""
FORMAT_LEARNED_RISE = 0.1
"""So has one whose answer rate rose by this much."""


class Metric(NamedTuple):
    """One key of a step's record; "{p}" in its name stands for the number of a preference group."""

    name: str
    unit: str
    healthy: str
    meaning: str


METRICS = (
    Metric("step", "updates", "rises by 1", "updates done, the key of the record"),
    Metric("wall_secs", "s", "rises", "wall time since the first start, resumes included"),
    Metric("reward", "reward", "rises, then levels off", "mean reward of the step's completions"),
    Metric("reward_std", "reward", "> 0", "population deviation of the step's rewards"),
    Metric("answered", "share", "rises to >= 0.9", "completions that name exactly one candidate"),
    Metric("preference_group/{p}/reward", "reward", "no preference group falls while others rise", "mean reward of its completions"),
    Metric("preference_group/{p}/count", "completions", "follows the size of the preference group", "its completions in the batch"),
    Metric("preference_group/{p}/advantage_scale", "ratio", "0.5 to 2; 0 while its history is cold",
           "sigma_G / sigma_p of Corollary 3.1, mean over its completions"),
    Metric("preference_group/{p}/bias", "deviations", "-1 to 1, falls back to 0",
           "(mu_G - mu_p) / sigma_p of Corollary 3.1, mean over its completions"),
    Metric("preference_group/{p}/history_count", "rewards", "rises", "past rewards its history holds, this step's not included"),
    Metric("preference_group/{p}/history_mean", "reward", "follows its reward, later", "mean of its history, before this step"),
    Metric("preference_group/{p}/history_std", "reward", "above algorithm.std_floor", "deviation of its history, before this step"),
    Metric("advantage_scale", "ratio", "0.5 to 2", "scale term of Corollary 3.1, mean over completions; under grpo, what p_grpo would do"),
    Metric("advantage_bias", "deviations", "-1 to 1",
           "bias-correction term of Corollary 3.1, mean over completions; under grpo, what p_grpo would do"),
    Metric("advantage_mean", "deviations", "0 under GRPO; positive while reward rises under P-GRPO", "mean advantage of the completions"),
    Metric("advantage_std", "deviations", "0.3 to 2", "deviation of the advantages"),
    Metric("ratio", "ratio", "1 on-policy; 0.9 to 1.1 otherwise", "pi / pi_old of the sampled tokens, mean over tokens"),
    Metric("old_kl", "nats/token", "0 on-policy; below 0.05 otherwise",
           "k3 estimate of KL(old policy, policy): how far the policy moved off its data"),
    Metric("kl", "nats/token", "0 to 0.1; above 1 the policy has left the reference",
           "k3 estimate of KL(policy, reference); none without a reference"),
    Metric("clip_fraction", "share", "0 on-policy; below 0.3 otherwise", "tokens whose gradient the clipped ratio removes"),
    Metric("entropy", "nats/token", "falls slowly; near 0 it has collapsed", "entropy of the policy on sampled tokens"),
    Metric("grad_norm", "norm", "> 0, no spikes of 10x", "global gradient norm before clipping"),
    Metric("loss", "objective", "about minus advantage_mean: near 0 is normal", "value of the loss; its gradient is what trains"),
    Metric("learning_rate", "1", "follows the schedule", "step size of the update"),
    Metric("length", "tokens", "steady; no drift to 1 or to the limit", "mean completion length, stop token included"),
    Metric("truncated", "share", "falls towards 0", "completions that ran out of tokens"),
    Metric("staleness", "updates", "below staleness.accept", "mean of step - weight version over completions"),
    Metric("controller/reissued", "units", "0 without faults", "units of work issued again after a loss, since the record before"),
    Metric("controller/lease_expired", "units", "0; else raise lease_secs",
           "units whose actor took longer than lease_secs, since the record before"),
    Metric("controller/duplicates", "units", "0 without faults",
           "results that came twice or that nothing had asked for, since the record before"),
    Metric("controller/dropped", "units", "0 to a tenth of those trained on",
           "finished units that became too old, since the record before; 0 under deterministic"),
    Metric("controller/version_gap", "updates", "0 on-policy; below staleness.accept otherwise",
           "newest published version minus the oldest one the step trained on"),
    Metric("mismatch/mean", "nats/token", "below 0.01", "mean |log-prob of sampler - log-prob of learner|"),
    Metric("mismatch/max", "nats/token", "below 0.5", "largest |log-prob of sampler - log-prob of learner|"),
    Metric("tokens_per_sec", "tokens/s", "steady after the first step", "tokens sampled for each second generating"),
    Metric("generation_secs", "s", "steady after the first step", "wall time generating and scoring"),
    Metric("update_secs", "s", "steady after the first step", "wall time of the update"),
    Metric("wait_secs", "s", "small beside the update where actors work meanwhile", "wall time the learner waited for rollouts"),
    Metric("publish_secs", "s", "small beside the update", "wall time of handing new weights to the actors"),
    Metric("checkpoint_secs", "s", "small beside the update", "wall time the loop waited for checkpoints"),
    Metric("dead_prompts", "share", "below 0.5 under GRPO", "prompts whose completions all got one reward: no signal under GRPO"),
)

_BY_NAME = {metric.name: metric for metric in METRICS}


def describe(key: str) -> Metric:
    """Returns the meaning of one key of a step's record.

    Args:
        key: a name such as "kl" or "preference_group/3/reward".

    Returns:
        The `Metric` that describes it.

    Raises:
        ValueError: the key has no description.
    """
    name = re.sub(r"^preference_group/\d+/", "preference_group/{p}/", key)
    if name not in _BY_NAME:
        raise ValueError(f"metric {key!r} has no description; add it to METRICS in pgrpo_jax/metrics.py and to docs/metrics.md")
    return _BY_NAME[name]


def finite(value: Any) -> float | None:
    """Returns a number as a float, and None for everything else: missing, null, text, NaN, infinite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def number(value: Any, digits: int = 3, signed: bool = False) -> str:
    """Returns a number as text with `digits` decimals; "n/a" where there is none."""
    value = finite(value)
    if value is None:
        return "n/a"
    return f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"


def interval(value: Mapping[str, Any] | None, signed: bool = True) -> str:
    """Returns {"low", "high"} as "[low, high]"; "" where either end is missing."""
    low, high = finite((value or {}).get("low")), finite((value or {}).get("high"))
    if low is None or high is None:
        return ""
    return f"[{number(low, signed=signed)}, {number(high, signed=signed)}]"


def duration(secs: float) -> str:
    """Returns seconds as "42s", "3m05s" or "2h07m"."""
    secs = max(int(round(secs)), 0)
    if secs < 60:
        return f"{secs}s"
    return f"{secs // 60}m{secs % 60:02d}s" if secs < 3600 else f"{secs // 3600}h{secs % 3600 // 60:02d}m"


def preference_groups(record: Mapping[str, Any]) -> list[str]:
    """Returns the numbers of the preference groups a step's record mentions, in numeric order, as text."""
    found = {match[1] for key in record if (match := re.match(r"preference_group/(\d+)/", key))}
    return sorted(found, key=int)


def evaluation_rows(evaluation: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Returns an evaluation as labelled rows: all prompts first, then each preference group in numeric order.

    Args:
        evaluation: an evaluation record (docs/metrics.md).

    Returns:
        (label, values) for each row; a preference group's label is its number and, where it has one, its name.
    """
    parts = evaluation.get("per_preference_group") or {}
    rows = [("all", evaluation)]
    for key in sorted(parts, key=int):
        name = parts[key].get("name")
        rows.append((f"{key} {name}" if name not in (None, "", key) else key, parts[key]))
    return rows


def spread(samples: Sequence[Mapping[str, Any]], limit: int) -> list[Mapping[str, Any]]:
    """Returns at most `limit` samples evenly spaced from the highest advantage to the lowest, both ends included."""
    ranked = sorted(samples, key=lambda sample: -(finite(sample.get("advantage")) or 0.0))
    if len(ranked) <= limit:
        return ranked
    if limit == 1:
        return ranked[:1]
    return [ranked[round(i * (len(ranked) - 1) / (limit - 1))] for i in range(limit)]


def health(record: Mapping[str, Any]) -> str | None:
    """Answers "the loss is 0, is it broken?" in one sentence.

    With one on-policy pass every probability ratio is 1, so the loss is minus the mean advantage: 0 under GRPO, whatever is learned.

    Args:
        record: a step's metrics.

    Returns:
        The sentence, or None where the loss does not look like 0.
    """
    loss, norm = finite(record.get("loss")), finite(record.get("grad_norm"))
    if loss is None or abs(loss) >= ON_POLICY_LOSS:
        return None
    if norm == 0.0:
        dead = number(record.get("dead_prompts"), digits=2)
        return f"loss and gradient are 0: this step taught nothing (share of prompts whose completions all got one reward: {dead})"
    return ("a loss near 0 is expected, not broken: with one on-policy pass its value is only minus the mean advantage; "
            "watch grad_norm (above 0) and reward (rising)")


def verdict(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> str:
    """Says in one sentence what a run learned beyond the format of an answer.

    The evidence is the reward given an answer minus that of a random choice, with its 95 % interval over held-out prompts.

    Args:
        before: evaluation record of the untrained policy, or None.
        after: evaluation record of the trained policy, or None.

    Returns:
        The sentence; it contains "format learned, preference not resolved" where the interval covers 0 and the format was learned.
    """
    before, after = before or {}, after or {}
    gain, old = after.get("advantage_over_random") or {}, before.get("advantage_over_random") or {}
    low, high, mean = (finite(gain.get(key)) for key in ("low", "high", "mean"))
    if low is None or high is None or mean is None:
        known = "fewer than 2 held-out prompts were answered" if after else "not evaluated after training"
        return f"nothing can be said: {known}"
    evidence = f"an answer earns {number(mean, signed=True)} {interval(gain)} over a random choice"
    if low > 0.0:
        old_low, old_high = finite(old.get("low")), finite(old.get("high"))
        if old_low is not None and old_high is not None and old_low > 0.0 and mean <= old_high:
            return f"preference resolved, but no better than before training: {evidence}, before {interval(old)}"
        return f"preference learned: {evidence}"
    if high < 0.0:
        return f"preference missed: {evidence}"
    rate, old_rate = finite(after.get("answer_rate")), finite(before.get("answer_rate"))
    rose = rate is not None and old_rate is not None and rate - old_rate >= FORMAT_LEARNED_RISE
    learned = rose or (rate is not None and rate >= FORMAT_LEARNED_RATE)
    rates = f"answer rate {number(old_rate, digits=2)} to {number(rate, digits=2)}"
    return f"{'format learned' if learned else 'format not learned'}, preference not resolved ({rates}; {evidence})"
