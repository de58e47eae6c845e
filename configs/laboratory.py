"""The laboratory: its regimes, arms and numbers, fixed before the seeds that are reported were looked at (docs/experiments.md).

    python launch/laboratory.py arms

Not a configuration of a run: the other files of this folder are. Options and learning rates were chosen on `CHOICE_SEEDS` by
`python launch/laboratory.py choose`; the table is of `REPORT_SEEDS`, once.
"""

import dataclasses
import math

from pgrpo_jax.algorithms.advantages import AdvantageSettings
from pgrpo_jax.algorithms.importance import Correction
from pgrpo_jax.algorithms.memory import Memory
from pgrpo_jax.algorithms.objective import Objective
from pgrpo_jax.algorithms.preference_weights import PreferenceWeights
from pgrpo_jax.algorithms.presets import PRESETS
from pgrpo_jax.laboratory import staleness, truncation
from pgrpo_jax.laboratory.staleness import Treatment
from pgrpo_jax.laboratory.training import Arm, Budget

CHOICE_SEEDS = range(0, 200)
REPORT_SEEDS = range(1000, 1200)
FOLLOW_UP_SEEDS = range(2000, 2200)
TOLERANCE = 0.01  # of normalised reward, by which an option may lower the mean

BUDGET = Budget(num_steps=100, early_step=20, prompts_per_step=8, completions_per_prompt=8, num_contexts=8, num_actions=8)

_BASE = {
    "shares": (0.50, 0.35, 0.15), "offsets": (0.0, 0.0, 0.0), "scales": (1.0, 1.0, 1.0), "noise": (0.2, 0.2, 0.2),
    "disagreement": 0.75, "visibility": 1.0, "difficulty": 0.0, "exponent": 1.0, "binary": 0.0,
}
REGIMES = {
    "base": _BASE,
    "minority of 5 %": _BASE | {"shares": (0.55, 0.40, 0.05)},
    "minority with an offset": _BASE | {"offsets": (0.0, 0.0, -1.0)},
    "minority of small scale": _BASE | {"scales": (1.0, 1.0, 0.2)},
    "noisy rewards": _BASE | {"noise": (1.0, 1.0, 1.0)},
    "noisy minority": _BASE | {"noise": (0.2, 0.2, 1.0)},
    "partly visible": _BASE | {"visibility": 0.3},
    "invisible": _BASE | {"visibility": 0.0},
    "difficulty varies": _BASE | {"difficulty": 0.9},
    "rare success": _BASE | {"binary": 1.0, "exponent": 6.0, "noise": (0.0, 0.0, 0.0)},
    "same taste (control)": _BASE | {"disagreement": 0.0, "visibility": 0.0},
}

_GRPO = AdvantageSettings(baseline="cohort", scale="cohort")
_P_GRPO = AdvantageSettings(baseline="history", scale="history")


def _changed(**changes) -> Arm:
    return Arm(settings=dataclasses.replace(_P_GRPO, **changes))


def _on_both(name: str, options: dict[str, dict]) -> dict[str, dict[str, Arm]]:
    """The same options on top of GRPO and of P-GRPO."""
    return {
        f"{name}, {base}": {label: Arm(settings=settings, **changes) for label, changes in options.items()}
        for base, settings in (("grpo", _GRPO), ("p_grpo", _P_GRPO))
    }


# arm -> option -> Arm; the arms of the paper and of its peers have one option each
OPTIONS: dict[str, dict[str, Arm]] = {
    "grpo": {"": Arm(settings=_GRPO)},
    "dr_grpo": {"": Arm(settings=AdvantageSettings(baseline="cohort", scale="none"))},
    "rloo": {"": Arm(settings=AdvantageSettings(baseline="leave_one_out", scale="none"))},
    "reinforce_pp": {"": Arm(settings=AdvantageSettings(baseline="batch", scale="batch"))},
    "p_grpo": {"": Arm(settings=_P_GRPO)},
    "p_grpo, after": {"": _changed(timing="after")},
    "p_grpo, ema": {f"half-life {n} rewards": _changed(memory=Memory("ema", float(n))) for n in (32, 128, 512)},
    "p_grpo, window": {f"{n} batches": _changed(memory=Memory("window", float(n))) for n in (4, 8, 16)},
    "p_grpo, discounted": {f"half-life {n} updates": _changed(memory=Memory("discounted", float(n))) for n in (4, 16, 64)},
    "p_grpo, blend": {f"lambda {x}": _changed(blend=x) for x in (0.25, 0.5, 0.75)},
    "scale only": {"": Arm(settings=AdvantageSettings(baseline="cohort", scale="history"))},
    "p_grpo, shrinkage": {f"{n} pseudo-rewards": _changed(shrinkage=float(n)) for n in (16, 64, 256)},
    "pooled (control)": {"": Arm(settings=_P_GRPO, rows="pooled")},
    "placebo (control)": {"": Arm(settings=_P_GRPO, rows="placebo")},
    **_on_both("dro", {f"temperature {t}": {"weights": PreferenceWeights("dro", t)} for t in (0.1, 0.3, 1.0)}),
    **_on_both("balanced", {"": {"weights": PreferenceWeights("balanced")}}),
    **_on_both("stratified", {f"floor {x}": {"share_floor": x} for x in (0.2, 0.25, 0.33)}),
    **_on_both("kl budget", {f"{x} nats": {"kl_target": x} for x in (1.0, 1.5, 2.0)}),
}
LEARNING_RATES = (1.0, 2.0, 4.0, 8.0)

# arm -> (option, learning rate), what `choose` put first on 2026-11-25
CHOSEN: dict[str, tuple[str, float]] = {
    'grpo': ('', 2.0),
    'dr_grpo': ('', 2.0),
    'rloo': ('', 2.0),
    'reinforce_pp': ('', 2.0),
    'p_grpo': ('', 2.0),
    'p_grpo, after': ('', 2.0),
    'p_grpo, ema': ('half-life 512 rewards', 2.0),
    'p_grpo, window': ('16 batches', 2.0),
    'p_grpo, discounted': ('half-life 64 updates', 2.0),
    'p_grpo, blend': ('lambda 0.75', 2.0),
    'scale only': ('', 2.0),
    'p_grpo, shrinkage': ('16 pseudo-rewards', 2.0),
    'pooled (control)': ('', 2.0),
    'placebo (control)': ('', 2.0),
    'dro, grpo': ('temperature 1.0', 2.0),
    'dro, p_grpo': ('temperature 1.0', 2.0),
    'balanced, grpo': ('', 2.0),
    'balanced, p_grpo': ('', 2.0),
    'stratified, grpo': ('floor 0.33', 2.0),
    'stratified, p_grpo': ('floor 0.33', 2.0),
    'kl budget, grpo': ('1.5 nats', 2.0),
    'kl budget, p_grpo': ('1.5 nats', 2.0),
}
DRAWN = ("grpo", "p_grpo", "dr_grpo", "stratified, grpo")  # in the chart of learning curves
ARMS: dict[str, Arm] = {
    name: dataclasses.replace(OPTIONS[name][option], learning_rate=rate) for name, (option, rate) in CHOSEN.items()
}

# Two questions that the report raised, asked of seeds it had not seen: does stratified sampling with a lower floor keep the mean, and does
# dro still help where the minority's ratings are high rather than low?
FOLLOW_UP_REGIMES = REGIMES | {"minority that rates high": _BASE | {"offsets": (0.0, 0.0, 1.0)}}
FOLLOW_UP_ARMS: dict[str, Arm] = {name: ARMS[name] for name in ("grpo", "p_grpo", "dro, grpo", "dro, p_grpo")} | {
    f"{name}, {option}": dataclasses.replace(OPTIONS[name][option], learning_rate=CHOSEN[name][1])
    for name in ("stratified, grpo", "stratified, p_grpo") for option in ("floor 0.2", "floor 0.25")
}

# Off-policy: the bias of every truncation, and staleness x learning rate (`python launch/laboratory.py off_policy`)
CORRECTION_SEEDS = range(3000, 3032)
DISTANCES = (0.05, 0.2, 0.5, 1.0)  # deviation of the noise on the sampler's logits
TRUNCATION_SIZES = truncation.Sizes(length=5, num_tokens=4, spread=1.0)
CORRECTIONS: dict[str, Correction] = {"none": Correction()} | {
    f"{level}, {label}": correction
    for level in ("token", "sequence", "geometric")
    for label, correction in {
        "unbounded": Correction(level, high=math.inf),
        **{f"truncated at {high}": Correction(level, "truncate", high=high) for high in (1.5, 2.0, 5.0)},
        **{f"masked outside 1/{high} to {high}": Correction(level, "mask", low=1 / high, high=high) for high in (1.5, 2.0, 5.0)},
    }.items()
}
STALENESS_SEEDS = range(3000, 3064)
STALENESSES = (0, 1, 2, 4, 8, 16, 32)
STALENESS_LEARNING_RATES = (1.0, 2.0, 4.0, 8.0, 16.0)
STALENESS_BUDGET = staleness.Budget(
    num_steps=100, prompts_per_step=8, completions_per_prompt=8, num_contexts=8, length=8, num_tokens=4, num_features=256
)


def _corrected(*correction) -> Treatment:
    """Decoupled: the ratio is against the policy before the update, and the correction's weight against the one that sampled."""
    return Treatment(Objective(policy_term="log_prob", correction=Correction(*correction)))


TREATMENTS: dict[str, Treatment] = {
    "nothing": _corrected(),
    "grpo's clip around the sampler": Treatment(Objective(), proximal="generator"),
    "gspo's clip around the sampler": Treatment(PRESETS["gspo"].objective, proximal="generator"),
    "cispo's weight against the sampler": Treatment(PRESETS["cispo"].objective, proximal="generator"),
    "token, truncated at 2": _corrected("token", "truncate", 0.5, 2.0),
    "token, masked outside 1/2 to 2": _corrected("token", "mask", 0.5, 2.0),
    "sequence, truncated at 2": _corrected("sequence", "truncate", 0.5, 2.0),
    "sequence, masked outside 1/2 to 2": _corrected("sequence", "mask", 0.5, 2.0),
    "sequence, unbounded": _corrected("sequence", "truncate", 0.5, math.inf),
    "geometric, masked outside 1/2 to 2": _corrected("geometric", "mask", 0.5, 2.0),
}
