"""The objective by its definitions, in plain Python: one token after the other, no arrays, no masks, no gradient."""

import math

from pgrpo_jax.algorithms.importance import Correction
from pgrpo_jax.algorithms.objective import Objective

NAMES = ("token_count", "clipped", "ratio", "old_kl", "entropy", "kl", "correction")


def loop(o: Objective, current, old, behaviour, reference, entropies, advantages, betas, mask, valid, prompts) -> tuple[float, float, dict]:
    """loss_sum, count, and for each valid completion its sums by name; without a reference there is no KL."""
    tokens = {i: [t for t in range(len(mask[i])) if mask[i][t]] for i in range(len(valid)) if valid[i]}
    total, rows = 0.0, {}
    for i, places in tokens.items():
        rows[i] = dict.fromkeys(NAMES, 0.0)
        log_r = {t: float(current[i][t] - old[i][t]) for t in places}
        behind = {t: float(old[i][t] - behaviour[i][t]) for t in places}
        together = sum(len(tokens[j]) for j in tokens if prompts[j] == prompts[i])
        for t in places:
            agg = {
                "completion": 1 / len(places), "prompt_tokens": 1 / together, "batch_tokens": 1.0,
                "max_length": 1 / (o.max_length or 1), "sum": 1.0,
            }[o.aggregation]  # fmt: skip
            weight, bounded = importance(o, log_r, t)
            gain, clipped = policy_term(o, current[i][t], log_r, t, advantages[i])
            w = correction(o.correction, behind, t)
            d = 0.0 if reference is None else reference[i][t] - current[i][t]
            kl = {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - 1 - d}
            gain += o.entropy_coefficient * entropies[i][t] - (betas[i] * kl[o.kl_estimator] if o.kl_in == "loss" else 0.0)
            total -= agg * weight * w * gain
            r = math.exp(log_r[t])
            for name, value in zip(NAMES, (1, bounded or clipped, r, r - 1 - log_r[t], entropies[i][t], kl["k3"], w), strict=True):
                rows[i][name] += value
    present = {prompts[i] for i in tokens}
    counts = {"prompt_tokens": len(present), "batch_tokens": sum(map(len, tokens.values()))}
    return total, counts.get(o.aggregation, len(tokens)), rows


def importance(o: Objective, log_r: dict, t: int) -> tuple[float, bool]:
    """The objective's own weight of token t, and whether it is bounded."""
    r = math.exp(log_r[t])
    held = min(max(r, 1 - o.clip_low), 1 + o.clip_high)
    weight = {"none": 1.0, "ratio": r, "sequence_ratio": math.exp(sum(log_r.values())), "clipped_ratio": held}[o.importance]
    return weight, o.importance == "clipped_ratio" and held != r


def policy_term(o: Objective, log_prob: float, log_r: dict, t: int, advantage: float) -> tuple[float, bool]:
    """A·Grad1 of token t as PPO writes it, with `min`, and whether it is clipped."""
    if o.policy_term == "log_prob":
        return advantage * log_prob, False
    s = math.exp(log_r[t] if o.policy_term == "ratio" else sum(log_r.values()) / len(log_r))
    gain = min(s * advantage, min(max(s, 1 - o.clip_low), 1 + o.clip_high) * advantage)
    if o.dual_clip and advantage < 0:
        gain = max(gain, o.dual_clip * advantage)
    return gain, gain != s * advantage


def correction(c: Correction, behind: dict, t: int) -> float:
    """The weight of π_old against the sampler."""
    level = {"none": 0.0, "token": behind[t], "sequence": sum(behind.values()), "geometric": sum(behind.values()) / len(behind)}
    w = math.exp(level[c.level])
    if c.level == "none":
        return 1.0
    return min(w, c.high) if c.bound == "truncate" else (w if c.low <= w <= c.high else 0.0)
