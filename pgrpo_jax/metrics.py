"""Floor 5: what the numbers of a run mean: unit, healthy range, and the sentences that are drawn from them.

The records themselves are kept by `run_directory.py` and shown by `console.py` and `report.py`; `metric_table.py` lists their keys.
"""

import math
import re
from typing import Any, Mapping, Sequence

ON_POLICY_LOSS = 1e-3
"""Below this a loss looks like 0 to a person."""
MOSTLY = 0.99
"""From this share of tokens on a clip or a mask leaves almost nothing."""
FORMAT_LEARNED_RATE = 0.9
"""A policy that answers this share of prompts has learned the format."""
FORMAT_LEARNED_RISE = 0.1
"""So has one whose answer rate rose by this much."""


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

    A gradient of 0 teaches nothing, whatever the loss; the sentence names the first cause that the record shows. A loss near 0 with a
    gradient is normal: with one on-policy pass every probability ratio is 1, so the loss is minus the mean advantage, which is 0 where
    advantages add up to 0 for each prompt (grpo, dr_grpo, rloo, scale-only) or over the batch (reinforce_pp), whatever is learned.

    Args:
        record: a step's metrics.

    Returns:
        The sentence, or None where the loss does not look like 0 and there is a gradient, or where neither is known.
    """
    loss, norm = finite(record.get("loss")), finite(record.get("grad_norm"))
    if norm == 0.0:
        what = "the gradient is" if loss is not None and abs(loss) >= ON_POLICY_LOSS else "loss and gradient are"
        return f"{what} 0: this step taught nothing ({_why_nothing(record)})"
    if loss is None or abs(loss) >= ON_POLICY_LOSS:
        return None
    clipped = finite(record.get("clip_fraction")) or 0.0
    if clipped >= MOSTLY:
        return (f"the loss is near 0 and {clipped:.0%} of the tokens are clipped: almost nothing is left to learn from; "
                "lower optimiser.learning_rate or learner.passes_per_batch")
    return ("a loss near 0 is expected, not broken: with one on-policy pass its value is only minus the mean advantage; "
            "watch grad_norm (above 0) and reward (rising)")


def _why_nothing(record: Mapping[str, Any]) -> str:
    """The first cause of a gradient of 0 that a record shows, and what to do about it."""
    def at(key: str, value: float) -> bool:
        return (known := finite(record.get(key))) is not None and abs(known - value) < 1e-6

    dead = f"share of prompts whose completions all got one reward: {number(record.get('dead_prompts'), digits=2)}"
    causes = (
        ("reward" in record and finite(record["reward"]) is None, "no completion was left: every reward failed; read verdicts.jsonl"),
        (at("length", 0.0), "every completion is empty: see the prompts and the stop tokens"),
        (at("truncated", 1.0), "every completion ran out of tokens, and truncated ones may be masked: raise generation.max_new_tokens"),
        (at("informative_prompts", 0.0), f"no prompt was informative; {dead}; give easier or more varied prompts"),
        (at("correction/weight", 0.0), "the importance correction dropped every token: sampler and learner disagree, see mismatch/p95"),
        (at("clip_fraction", 1.0), "every token is clipped: lower optimiser.learning_rate or learner.passes_per_batch"),
        (at("reward_std", 0.0), f"every reward of the step is {number(record.get('reward'))}: see whether the task tells answers apart"),
        (at("advantage_std", 0.0) and at("advantage_mean", 0.0), f"every advantage is 0; {dead}"),
    )
    return next((said for holds, said in causes if holds), dead)


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
