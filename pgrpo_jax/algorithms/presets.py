"""Floor 0: the named algorithms, as data: an estimator's two choices, an objective, beta, and how much is sampled for one batch.

| preset | aggregation | importance | baseline / scale | policy term | regulariser |
|---|---|---|---|---|---|
| grpo | 1/(G·len) | 1 | μ_G / σ_G | M·r, ε 0.2 | k3, β 0.04 |
| p_grpo | as grpo | 1 | μ_p / σ_p | as grpo | as grpo |
| dr_grpo | 1/(G·L_max) | 1 | μ_G / 1 | M·r | none |
| dapo | 1/Σlen of the batch | 1 | as grpo | M·r, ε_high 0.28 | none; informative prompts from twice as many |
| rloo | 1/G, sum over tokens | 1 | mean of the others / 1 | log π | none |
| reinforce | 1/G, sum over tokens | Π r | μ_G / 1 | log π | none |
| reinforce_pp | 1/Σlen of the batch | 1 | batch / batch | M·r | k2, β 0.01 |
| cispo | 1/Σlen of the prompt | clip(r) | as grpo | log π | none |
| gspo | 1/(G·len) | 1 | as grpo | M·r of the completion | none |
"""

import dataclasses
import math

from pgrpo_jax.algorithms import advantages, aggregation, policy_terms, regularisers
from pgrpo_jax.algorithms.objective import Objective


@dataclasses.dataclass(frozen=True)
class Preset:
    """One algorithm.

    Attributes:
        baseline: one of `advantages.BASELINES`.
        scale: one of `advantages.SCALES`.
        objective: the loss around the advantages; its `max_length` and `correction` are the run's.
        kl_coefficient: β of the KL to the reference policy, at least 0.
        oversample: prompts that a step consumes, as a multiple of those it trains on.
    """

    baseline: str = "cohort"
    scale: str = "cohort"
    objective: Objective = Objective()
    kl_coefficient: float = 0.0
    oversample: int = 1


PRESETS: dict[str, Preset] = {
    # arXiv:2402.03300, eq. 3 and 4
    "grpo": Preset(kl_coefficient=0.04),
    # arXiv:2603.10009: GRPO with another advantage
    "p_grpo": Preset(baseline="history", scale="history", kl_coefficient=0.04),
    # arXiv:2503.20783, §3.2: neither the length nor the deviation divides
    "dr_grpo": Preset(scale="none", objective=Objective(aggregation="max_length")),
    # arXiv:2503.14476, §3: clip-higher, token-level loss, dynamic sampling; RLAX reads 1/Σlen of the prompt (aggregation prompt_tokens)
    "dapo": Preset(objective=Objective(aggregation="batch_tokens", clip_high=0.28), oversample=2),
    # arXiv:2402.14740, eq. 6; RLAX scales it by (G − 1)/G, which is R − μ_G
    "rloo": Preset(baseline="leave_one_out", scale="none", objective=Objective(aggregation="sum", policy_term="log_prob")),
    # RLAX, arXiv:2512.06392, App. A: Σ log π at the last token, weighted by the completion's ratio
    "reinforce": Preset(scale="none", objective=Objective(aggregation="sum", importance="sequence_ratio", policy_term="log_prob")),
    # arXiv:2501.03262, §3: normalised over the batch, k2
    "reinforce_pp": Preset(
        baseline="batch", scale="batch", objective=Objective(aggregation="batch_tokens", kl_estimator="k2"), kl_coefficient=0.01
    ),
    # MiniMax-M1, arXiv:2506.13585, eq. 4 and 5: no token is dropped, its weight is bounded from above (ε_low 1 bounds nothing below)
    "cispo": Preset(
        objective=Objective(aggregation="prompt_tokens", importance="clipped_ratio", policy_term="log_prob", clip_low=1.0, clip_high=0.2)
    ),
    # arXiv:2507.18071, eq. 5 and 7, clip range of its §5.1
    "gspo": Preset(objective=Objective(policy_term="sequence_ratio", clip_low=3e-4, clip_high=4e-4)),
}

_CHOICES = {
    "baseline": advantages.BASELINES,
    "scale": advantages.SCALES,
    "aggregation": tuple(aggregation.AGGREGATIONS),
    "importance": tuple(policy_terms.IMPORTANCE),
    "policy_term": tuple(policy_terms.POLICY_TERMS),
    "kl_estimator": tuple(regularisers.ESTIMATORS),
    "kl_in": ("loss", "reward"),
}
_BOUNDS = {
    "clip_low": ("in (0, 1]", lambda value: 0 < value <= 1),
    "clip_high": ("positive and finite", lambda value: 0 < value < math.inf),
    "dual_clip": ("0 (off) or above 1, and finite", lambda value: value == 0 or 1 < value < math.inf),
    "entropy_coefficient": ("at least 0 and finite", lambda value: 0 <= value < math.inf),
    "kl_coefficient": ("at least 0 and finite", lambda value: 0 <= value < math.inf),
    "oversample": ("a whole number of at least 1", lambda value: value >= 1 and value == int(value)),
}


def resolve(name: str, **overrides: float | str | None) -> Preset:
    """Returns a preset with some of its parts replaced.

    Args:
        name: key of `PRESETS`.
        **overrides: values by the names of the parts: those of `Preset` and of its objective; None keeps the preset's own.

    Returns:
        The `Preset`, all of its values within bounds.

    Raises:
        ValueError: where the preset or an override is unknown, or a value out of bounds.
    """
    if name not in PRESETS:
        raise ValueError(f"preset is '{name}', must be one of {', '.join(sorted(PRESETS))}: set config.preset")
    known = (*_CHOICES, *_BOUNDS)
    unknown = sorted(set(overrides) - set(known))
    if unknown:
        raise ValueError(f"override '{unknown[0]}' is unknown, must be one of {', '.join(known)}: remove it")
    given = {key: value for key, value in overrides.items() if value is not None}
    own = {field.name for field in dataclasses.fields(Preset)}
    preset = dataclasses.replace(PRESETS[name], **{key: value for key, value in given.items() if key in own})
    objective = dataclasses.replace(preset.objective, **{key: value for key, value in given.items() if key not in own})
    preset = dataclasses.replace(preset, objective=objective)
    for key in known:
        value = getattr(preset if key in own else objective, key)
        section = "curation" if key == "oversample" else "algorithm"
        if key in _CHOICES and value not in _CHOICES[key]:
            raise ValueError(f"{key} is '{value}', must be one of {', '.join(_CHOICES[key])}: set config.{section}.{key}")
        if key in _BOUNDS and not _BOUNDS[key][1](value):
            raise ValueError(f"{key} is {value}, must be {_BOUNDS[key][0]}: set config.{section}.{key}")
    return preset
