"""Presets are data with bounds."""

import math

import pytest

from pgrpo_jax.algorithms import advantages, presets


def test_the_presets_are_the_papers():
    assert presets.resolve("grpo") == presets.Preset(advantage="grpo", clip_low=0.2, clip_high=0.2, kl_coefficient=0.04)
    assert presets.resolve("p_grpo") == presets.Preset(advantage="p_grpo", clip_low=0.2, clip_high=0.2, kl_coefficient=0.04)
    assert {preset.advantage for preset in presets.PRESETS.values()} <= set(advantages.ESTIMATORS)


def test_every_preset_holds_its_own_bounds():
    for name, preset in presets.PRESETS.items():
        assert presets.resolve(name) == preset


def test_overrides_replace_and_none_keeps():
    preset = presets.resolve("p_grpo", clip_low=None, clip_high=0.28, kl_coefficient=0.0)
    assert preset == presets.Preset(advantage="p_grpo", clip_low=0.2, clip_high=0.28, kl_coefficient=0.0)


@pytest.mark.parametrize(
    "key, value",
    [("clip_low", 0.0), ("clip_low", 1.1), ("clip_low", math.nan), ("clip_high", -0.2), ("clip_high", math.inf)]
    + [("kl_coefficient", -1e-9), ("kl_coefficient", math.nan)],
)
def test_values_out_of_bounds_are_one_line(key, value):
    with pytest.raises(ValueError, match=rf"^{key} is {value}, must be .*: set config.algorithm.{key}$"):
        presets.resolve("grpo", **{key: value})


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="^preset is 'pgrpo', must be one of grpo, p_grpo: set config.preset$"):
        presets.resolve("pgrpo")
    with pytest.raises(ValueError, match="^override 'clip' is unknown, must be one of clip_low, clip_high, kl_coefficient"):
        presets.resolve("grpo", clip=0.1)
