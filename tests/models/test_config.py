"""Sizes that can not be, and the wavelengths of the rotary embedding against their definitions."""

import math

import numpy as np
import pytest

from pgrpo_jax.models.config import ModelConfig, RopeScaling

SIZES = dict(
    num_layers=3, width=24, mlp_width=40, num_heads=4, num_kv_heads=2, head_dim=6, vocab_size=50, context_length=64,
    rope_theta=1e4, norm_epsilon=1e-5, tied_embeddings=False,
)  # fmt: skip


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("num_layers", 0, r"num_layers is 0, must be a whole number in \[1, "),
        ("width", 24.0, "width is 24.0, must be a whole number"),
        ("vocab_size", 2**31, "vocab_size is 2147483648, must be"),
        ("mlp_width", True, "mlp_width is True, must be a whole number"),
        ("num_kv_heads", 3, "num_heads is 4, must be a multiple of num_kv_heads 3"),
        ("head_dim", 5, "head_dim is 5, must be even"),
        ("rope_theta", math.nan, "rope_theta is nan, must be finite and above 0"),
        ("rope_theta", 0.0, "rope_theta is 0.0"),
        ("norm_epsilon", 0.0, r"norm_epsilon is 0.0, must be in \(0, 1\)"),
        ("tied_embeddings", 1, "tied_embeddings is 1, must be True or False"),
        ("qk_norm", None, "qk_norm is None, must be True or False"),
        ("activation", "relu", "activation is 'relu', must be one of silu, gelu_tanh"),
        ("local_rope_theta", -1.0, "local_rope_theta is -1.0, must be finite and above 0"),
        ("query_scalar", 0.0, "query_scalar is 0.0, must be finite and above 0"),
        ("logit_soft_cap", math.inf, r"logit_soft_cap is inf, must be in \[0, inf\)"),
        ("windows", (4, 4), r"windows are \(4, 4\), must be one for each of 3 layers"),
        ("windows", (4, 4, -1), "0 or more tokens"),
    ],
)
def test_impossible_sizes_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{**SIZES, field: value})


def test_frequencies_are_the_powers_of_the_base():
    config = ModelConfig(**{**SIZES, "local_rope_theta": 100.0, "windows": (4, 0, 4)})
    np.testing.assert_allclose(config.frequencies(), [1, 1e4 ** (-1 / 3), 1e4 ** (-2 / 3)], rtol=1e-15)
    np.testing.assert_allclose(config.frequencies(local=True), [1, 100 ** (-1 / 3), 100 ** (-2 / 3)], rtol=1e-15)
    np.testing.assert_array_equal(ModelConfig(**SIZES).frequencies(local=True), ModelConfig(**SIZES).frequencies())
    assert [config.window(layer) for layer in range(3)] == [4, 0, 4] and ModelConfig(**SIZES).window(2) == 0


def test_linear_scaling_divides_all_but_local_frequencies():
    scaling = RopeScaling(kind="linear", factor=8.0)
    plain, scaled = ModelConfig(**SIZES), ModelConfig(**{**SIZES, "rope_scaling": scaling, "local_rope_theta": 100.0, "windows": (1, 1, 0)})
    np.testing.assert_allclose(scaled.frequencies(), plain.frequencies() / 8, rtol=1e-15)
    np.testing.assert_allclose(scaled.frequencies(local=True)[1], 100 ** (-1 / 3), rtol=1e-15)


def test_llama_3_stretches_long_wavelengths_only():
    """Wavelength by wavelength as its authors wrote it: 8 times those above 8192 tokens, none below 2048, and between by how many turns fit in."""
    config = ModelConfig(**{**SIZES, "head_dim": 128, "rope_theta": 5e5, "rope_scaling": RopeScaling(kind="llama3", factor=8.0)})
    plain = ModelConfig(**{**SIZES, "head_dim": 128, "rope_theta": 5e5}).frequencies()
    expected, kinds = [], set()
    for frequency in plain:
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            kinds.add("kept")
            expected.append(frequency)
        elif wavelength > 8192 / 1:
            kinds.add("stretched")
            expected.append(frequency / 8)
        else:
            kinds.add("between")
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected.append((1 - smooth) * frequency / 8 + smooth * frequency)
    assert len(kinds) == 3
    np.testing.assert_allclose(config.frequencies(), expected, rtol=1e-13)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(kind="yarn"), "rope scaling 'yarn' is not computed: known are linear, llama3"),
        (dict(factor=0.5), r"factor is 0.5, must be in \[1, inf\)"),
        (dict(factor=math.nan), "factor is nan"),
        (dict(low_factor=4.0), "low_factor 4.0, high_factor 4.0"),
        (dict(original_context=0), "original_context 0 must be positive"),
    ],
)
def test_impossible_scalings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling(**{"kind": "llama3", "factor": 8.0, **changes})
