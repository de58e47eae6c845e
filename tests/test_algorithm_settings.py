"""Every key of the algorithm: one line with value, bound and remedy, before anything runs; and what the keys become."""

import math

import pytest
import small_config

from pgrpo_jax import algorithm_settings, settings
from pgrpo_jax.algorithms.importance import Correction
from pgrpo_jax.algorithms.preference_weights import PreferenceWeights


def found(**changes) -> list[str]:
    return algorithm_settings.faults(small_config.config(**changes))


def keyword(key: str) -> str:
    return key.replace(".", "__")


def test_the_small_configuration_has_none():
    assert found() == []


@pytest.mark.parametrize("key", sorted(algorithm_settings._ONE_OF))
def test_every_choice_is_checked(key):
    known = algorithm_settings._ONE_OF[key]
    line = f"{key} = 'nonsense' is unknown: use one of {', '.join(known)}"
    with pytest.raises(settings.ConfigError) as error:
        settings.check(small_config.config(**{keyword(key): "nonsense"}))
    assert line in str(error.value).splitlines()
    for value in known:
        assert not any("is unknown" in line for line in found(**{keyword(key): value}))


AT_LEAST_0 = [(-0.5, 0.0, 3.0), (math.inf, None, None), (math.nan, None, None)]
POSITIVE = [(0.0, 1e-6, 3.0), (math.inf, None, None), (math.nan, None, None)]
SHARE = [(-0.1, 0.0, 1.0), (1.1, 0.5, 1.0), (math.nan, None, None)]
COUNT = [(-1, 0, 3)]
EDGES = {  # key -> [(refused, accepted, accepted)]
    "algorithm.epsilon": AT_LEAST_0, "algorithm.std_floor": AT_LEAST_0, "algorithm.min_count": COUNT, "algorithm.blend": SHARE,
    "algorithm.shrinkage": AT_LEAST_0, "algorithm.memory_length": AT_LEAST_0, "algorithm.staleness_half_life": AT_LEAST_0,
    "algorithm.staleness_limit": COUNT, "algorithm.preference_temperature": POSITIVE, "algorithm.kl_target": AT_LEAST_0,
    "algorithm.kl_horizon": POSITIVE, "algorithm.reference_refresh": COUNT, "algorithm.correction_low": SHARE,
    "algorithm.correction_high": [(0.9, 1.0, 5.0), (math.nan, None, None)], "curation.min_information": AT_LEAST_0,
    "curation.overlong_buffer": [(-1, 0, 1)], "curation.overlong_penalty": AT_LEAST_0, "curation.min_std": AT_LEAST_0,
    "curation.strata_floor": [(-1, 0, 1)],
}  # fmt: skip


def test_the_edges_are_those_of_every_bound():
    assert sorted(EDGES) == sorted(algorithm_settings._BOUNDS)


@pytest.mark.parametrize("key, edge", [(key, edge) for key, edges in EDGES.items() for edge in edges])
def test_every_bound_is_checked(key, edge):
    refused, *accepted = edge
    (line,) = found(**{keyword(key): refused})
    assert line.startswith(f"{key} = {refused} is not ") and line.endswith(": set it within")
    for value in accepted:
        assert value is None or not any(line.startswith(key) and "is not" in line for line in found(**{keyword(key): value}))


CONTRADICTIONS = [
    ({"algorithm__epsilon": 0.0, "algorithm__std_floor": 0.0}, {"algorithm__epsilon": 0.0},
     "algorithm.epsilon + algorithm.std_floor = 0.0 is 0: a preference history of equal rewards would divide by 0; set one above 0"),
    ({"algorithm__memory": "ema"}, {"algorithm__memory": "ema", "algorithm__memory_length": 0.5},
     "algorithm.memory = 'ema' needs algorithm.memory_length above 0, it is 0.0: set a half-life, or a number of batches"),
    ({"algorithm__memory": "window", "algorithm__memory_length": 2.5}, {"algorithm__memory": "window", "algorithm__memory_length": 2.0},
     "algorithm.memory_length = 2.5 is no whole number of batches: round it"),
    ({"algorithm__kl_in": "reward", "algorithm__kl_coefficient": 0.1, "algorithm__components": "answered:1"},
     {"algorithm__kl_in": "loss", "algorithm__kl_coefficient": 0.1, "algorithm__components": "answered:1"},
     "algorithm.kl_in = 'reward' has no component to be taken off with algorithm.components set: use kl_in = 'loss'"),
    ({"algorithm__kl_target": 0.1, "algorithm__kl_coefficient": 0.0}, {"algorithm__kl_target": 0.1, "algorithm__kl_coefficient": 0.1},
     "algorithm.kl_target and algorithm.reference_refresh need a reference: set algorithm.kl_coefficient above 0"),
    ({"algorithm__reference_refresh": 2, "algorithm__kl_coefficient": 0.0},
     {"algorithm__reference_refresh": 2, "algorithm__kl_coefficient": 0.1},
     "algorithm.kl_target and algorithm.reference_refresh need a reference: set algorithm.kl_coefficient above 0"),
    ({"curation__overlong_buffer": 5}, {"curation__overlong_buffer": 4},
     "curation.overlong_buffer = 5 is above generation.max_new_tokens = 4: every answer would be punished; lower it"),
    ({"curation__order": "easy_first"}, {"curation__order": "easy_first", "curation__difficulty": "estimates.json"},
     "curation.order = 'easy_first' needs estimates: set curation.difficulty"),
]  # fmt: skip


@pytest.mark.parametrize("wrong, right, line", CONTRADICTIONS)
def test_what_does_not_go_together_is_refused(wrong, right, line):
    assert found(**wrong) == [line]
    assert found(**right) == []


@pytest.mark.parametrize(
    "text, part", [("answered", "answered"), ("a:x", "a:x"), ("a:nan", "a:nan"), (":1", ":1"), ("a:1 b:2 a:3", "a:3")]
)
def test_components_must_be_names_and_weights(text, part):
    (line,) = found(algorithm__components=text)
    assert line.startswith(f"algorithm.components = {text!r} has {part!r}: write NAME:WEIGHT")


def test_what_the_keys_become():
    assert algorithm_settings.components(small_config.config(algorithm__components="rating:1 answered:-0.2")) == {"rating": 1.0, "answered": -0.2}
    on, off = small_config.config(), small_config.config(staleness__reload=1, staleness__accept=4)
    assert algorithm_settings.objective(on).correction.level == "none"
    assert algorithm_settings.objective(off).correction == Correction("token", "truncate", low=0.5, high=2.0)
    chosen = small_config.config(staleness__accept=4, algorithm__correction="sequence", algorithm__correction_bound="mask",
                                 algorithm__correction_low=0.25, algorithm__correction_high=3.0)  # fmt: skip
    assert algorithm_settings.objective(chosen).correction == Correction("sequence", "mask", low=0.25, high=3.0)
    weights = small_config.config(algorithm__preference_weights="dro", algorithm__preference_temperature=0.3)
    assert algorithm_settings.preference_weights(weights) == PreferenceWeights("dro", 0.3)
    assert algorithm_settings.curation(on).select == "any"
    assert algorithm_settings.curation(small_config.config(curation__oversample=2)).select == "information"
    assert algorithm_settings.curation(small_config.config(preset="grpo", curation__oversample=2)).select == "raw"
    assert algorithm_settings.curation(small_config.config(preset="dapo", curation__select="any")).select == "any"
    settled = algorithm_settings.advantage_settings(small_config.config(completions_per_prompt=6, algorithm__blend=0.25))
    assert settled.min_count == 24.0 and settled.blend == 0.25
    assert algorithm_settings.advantage_settings(small_config.config(algorithm__min_count=3)).min_count == 3.0
