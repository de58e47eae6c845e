"""Floor 0: the named algorithms, as data. A preset chooses the estimator and the numbers of the objective, nothing else."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Preset:
    """One algorithm.

    Attributes:
        advantage: key of `advantages.ESTIMATORS`.
        clip_low: ε below 1 of the probability ratio, in (0, 1].
        clip_high: ε above 1, greater than 0.
        kl_coefficient: β of the k3 KL to the reference policy, at least 0.
    """

    advantage: str
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coefficient: float = 0.04


PRESETS: dict[str, Preset] = {
    "grpo": Preset(advantage="grpo"),  # arXiv:2402.03300
    "p_grpo": Preset(advantage="p_grpo"),  # arXiv:2603.10009: GRPO with another advantage
}

_BOUNDS = {
    "clip_low": ("in (0, 1]", lambda value: 0 < value <= 1),
    "clip_high": ("positive and finite", lambda value: 0 < value < math.inf),
    "kl_coefficient": ("at least 0 and finite", lambda value: 0 <= value < math.inf),
}


def resolve(name: str, **overrides: float | None) -> Preset:
    """Returns a preset with some of its numbers replaced.

    Args:
        name: key of `PRESETS`.
        **overrides: values for `clip_low`, `clip_high` and `kl_coefficient`; None keeps the preset's own.

    Returns:
        The `Preset`, all of its values within bounds.

    Raises:
        ValueError: where the preset or an override is unknown, or a value out of bounds.
    """
    if name not in PRESETS:
        raise ValueError(f"preset is '{name}', must be one of {', '.join(sorted(PRESETS))}: set config.preset")
    unknown = sorted(set(overrides) - set(_BOUNDS))
    if unknown:
        raise ValueError(f"override '{unknown[0]}' is unknown, must be one of {', '.join(_BOUNDS)}: remove it")
    preset = dataclasses.replace(PRESETS[name], **{key: value for key, value in overrides.items() if value is not None})
    for key, (bound, holds) in _BOUNDS.items():
        value = getattr(preset, key)
        if not holds(value):
            raise ValueError(f"{key} is {value}, must be {bound}: set config.algorithm.{key}")
    return preset
