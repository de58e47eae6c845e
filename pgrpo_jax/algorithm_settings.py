"""Floor 5: from a configuration to the algorithm: preset and overrides, estimator, objective, curation."""

import dataclasses
import math
from typing import Any

from pgrpo_jax.algorithms import advantages, importance, memory, presets
from pgrpo_jax.algorithms.advantages import AdvantageSettings
from pgrpo_jax.algorithms.importance import Correction
from pgrpo_jax.algorithms.memory import Memory
from pgrpo_jax.algorithms.objective import Objective
from pgrpo_jax.algorithms.preference_weights import KINDS, PreferenceWeights
from pgrpo_jax.curation import Curation, SELECT
from pgrpo_jax.kl_control import SCOPES
from pgrpo_jax.learner_settings import PROXIMAL
from pgrpo_jax.tasks import arms, curated, mixture

_OVERRIDES = (
    "baseline", "scale", "aggregation", "importance", "policy_term", "clip_low", "clip_high", "dual_clip",
    "entropy_coefficient", "kl_estimator", "kl_in", "kl_coefficient",
)  # fmt: skip

_ONE_OF = {
    "algorithm.baseline": advantages.BASELINES,
    "algorithm.scale": advantages.SCALES,
    "algorithm.deviation": advantages.DEVIATIONS,
    "algorithm.cold_start": advantages.COLD_STARTS,
    "algorithm.timing": advantages.TIMINGS,
    "algorithm.memory": memory.KINDS,
    "algorithm.arm": arms.ARMS,
    "algorithm.preference_weights": KINDS,
    "algorithm.correction": tuple(importance.LEVELS),
    "algorithm.correction_bound": tuple(importance.BOUNDS),
    "algorithm.proximal": PROXIMAL,
    "algorithm.kl_scope": SCOPES,
    "curation.select": SELECT,
    "curation.order": curated.ORDERS,
}
_POSITIVE = ("positive and finite", lambda value: 0 < value < math.inf)
_AT_LEAST_0 = ("at least 0 and finite", lambda value: 0 <= value < math.inf)
_BOUNDS = {
    "algorithm.epsilon": _AT_LEAST_0,
    "algorithm.std_floor": _AT_LEAST_0,
    "algorithm.min_count": _AT_LEAST_0,
    "algorithm.blend": ("in [0, 1]", lambda value: 0 <= value <= 1),
    "algorithm.shrinkage": _AT_LEAST_0,
    "algorithm.memory_length": _AT_LEAST_0,
    "algorithm.staleness_half_life": _AT_LEAST_0,
    "algorithm.staleness_limit": _AT_LEAST_0,
    "algorithm.preference_temperature": _POSITIVE,
    "algorithm.kl_target": _AT_LEAST_0,
    "algorithm.kl_horizon": _POSITIVE,
    "algorithm.reference_refresh": _AT_LEAST_0,
    "algorithm.correction_low": ("in [0, 1]", lambda value: 0 <= value <= 1),
    "algorithm.correction_high": ("at least 1", lambda value: value >= 1),
    "curation.min_information": _AT_LEAST_0,
    "curation.overlong_buffer": _AT_LEAST_0,
    "curation.overlong_penalty": _AT_LEAST_0,
    "curation.min_std": _AT_LEAST_0,
    "curation.strata_floor": _AT_LEAST_0,
}


def faults(config: Any) -> list[str]:
    """Returns what is wrong with the keys of `preset`, `algorithm` and `curation`, a line each."""
    errors = []
    for key, known in _ONE_OF.items():
        if (value := value_of(config, key)) is not None and value not in known:
            errors.append(f"{key} = {value!r} is unknown: use one of {', '.join(known)}")
    for key, (bound, holds) in _BOUNDS.items():
        if (value := value_of(config, key)) is not None and not holds(value):
            errors.append(f"{key} = {value} is not {bound}: set it within")
    builders = [preset, components]
    if config.task.preference_groups:  # else the task's own: whether there is such a task is checked with its name
        builders.append(lambda c: mixture.check_preference_groups(c.task.name, c.task.preference_groups))
    for build in builders:
        try:
            build(config)
        except ValueError as error:
            errors.append(str(error))
    return errors + ([] if errors else _contradictions(config))


def _contradictions(config: Any) -> list[str]:
    """Values that are fine by themselves and not together."""
    a, c, chosen = config.algorithm, config.curation, preset(config)
    paid_in_reward = chosen.objective.kl_in == "reward" and chosen.kl_coefficient > 0
    rules = [
        (a.epsilon + a.std_floor != 0, f"algorithm.epsilon + algorithm.std_floor = {a.epsilon + a.std_floor} is 0: a preference history "
         "of equal rewards would divide by 0; set one above 0"),
        (a.memory == "cumulative" or a.memory_length > 0, f"algorithm.memory = {a.memory!r} needs algorithm.memory_length above 0, it is "
         f"{a.memory_length}: set a half-life, or a number of batches"),
        (a.memory != "window" or a.memory_length == int(a.memory_length), f"algorithm.memory_length = {a.memory_length} is no whole number "
         "of batches: round it"),
        (not (paid_in_reward and a.components), "algorithm.kl_in = 'reward' has no component to be taken off with algorithm.components set: "
         "use kl_in = 'loss'"),
        (chosen.kl_coefficient > 0 or (a.kl_target == 0 and a.reference_refresh == 0), "algorithm.kl_target and algorithm.reference_refresh "
         "need a reference: set algorithm.kl_coefficient above 0"),
        (c.overlong_buffer <= config.generation.max_new_tokens, f"curation.overlong_buffer = {c.overlong_buffer} is above "
         f"generation.max_new_tokens = {config.generation.max_new_tokens}: every answer would be punished; lower it"),
        (c.order == "shuffled" or c.difficulty, f"curation.order = {c.order!r} needs estimates: set curation.difficulty"),
    ]  # fmt: skip
    return [message for holds, message in rules if not holds]


def value_of(config: Any, key: str) -> Any:
    """Returns the value of a dotted key."""
    for part in key.split("."):
        config = config[part]
    return config


def preset(config: Any) -> presets.Preset:
    """Returns the preset with the overrides of `algorithm` and `curation.oversample` applied."""
    overrides = {name: config.algorithm[name] for name in _OVERRIDES}
    return presets.resolve(config.preset, **overrides, oversample=config.curation.oversample)


def advantage_settings(config: Any) -> AdvantageSettings:
    """Returns how advantages come from rewards."""
    a, chosen = config.algorithm, preset(config)
    return AdvantageSettings(
        baseline=chosen.baseline,
        scale=chosen.scale,
        blend=a.blend,
        timing=a.timing,
        cold_start=a.cold_start,
        min_count=float(4 * config.completions_per_prompt if a.min_count is None else a.min_count),
        epsilon=a.epsilon,
        std_floor=a.std_floor,
        deviation=a.deviation,
        shrinkage=a.shrinkage,
        memory=Memory(kind=a.memory, length=a.memory_length),
        component_weights=tuple(components(config).values()),
        staleness_half_life=a.staleness_half_life,
        staleness_limit=a.staleness_limit,
    )


def components(config: Any) -> dict[str, float]:
    """Reads `algorithm.components`.

    Returns:
        name -> weight, in the order given; empty where the total is standardised.

    Raises:
        ValueError: an entry is not NAME:WEIGHT, a weight is not finite, or a name comes twice.
    """
    weights: dict[str, float] = {}
    for part in config.algorithm.components.split():
        name, _, number = part.partition(":")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not name or not math.isfinite(weight) or name in weights:
            raise ValueError(
                f"algorithm.components = {config.algorithm.components!r} has {part!r}: write NAME:WEIGHT for each component once, "
                "for example 'rating:1 answered:0.2'"
            )
        weights[name] = weight
    return weights


def objective(config: Any) -> Objective:
    """Returns the loss around the advantages."""
    a = config.algorithm
    level = ("none" if strictly_on_policy(config) else "token") if a.correction is None else a.correction
    correction = Correction(level=level, bound=a.correction_bound, low=a.correction_low, high=a.correction_high)
    return dataclasses.replace(preset(config).objective, max_length=config.generation.max_new_tokens, correction=correction)


def strictly_on_policy(config: Any) -> bool:
    """Returns whether every batch is generated by the very weights that it updates."""
    return config.staleness.policy == "deterministic" and config.staleness.accept == 1


def preference_weights(config: Any) -> PreferenceWeights:
    """Returns how much each preference group weighs in the loss."""
    a = config.algorithm
    return PreferenceWeights(kind=a.preference_weights, temperature=a.preference_temperature)


def oversample(config: Any) -> int:
    """Returns how many times prompts_per_step a step consumes."""
    return preset(config).oversample


def curation(config: Any) -> Curation:
    """Returns which prompts and completions are trained on."""
    c, chosen = config.curation, preset(config)
    by_history = "history" in (chosen.baseline, chosen.scale)
    unset = "any" if chosen.oversample == 1 else ("information" if by_history else "raw")
    return Curation(
        prompts_per_step=config.prompts_per_step,
        select=unset if c.select is None else c.select,
        metric=c.metric,
        min_information=c.min_information,
        max_new_tokens=config.generation.max_new_tokens,
        overlong_buffer=c.overlong_buffer,
        overlong_penalty=c.overlong_penalty,
        mask_truncated=c.mask_truncated,
    )
