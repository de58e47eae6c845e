"""What each aggregation makes a token weigh, against numbers written out and a loop over completions."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgrpo_jax.algorithms.aggregation import AGGREGATIONS, token_weights

# Prompt 0: completions of 2 and 3 tokens; prompt 1: of 1 and none; prompt 2 only pads.
LENGTHS = np.array([2, 3, 1, 0, 3, 3])
MASK = np.arange(3)[None, :] < LENGTHS[:, None]
VALID = np.array([1, 1, 1, 1, 0, 0], bool)
PROMPTS = np.array([0, 0, 1, 1, 2, 2], np.int32)

# name -> (weight of a token of each completion, count)
WRITTEN_OUT = {
    "completion": (["1/2", "1/3", "1"], 4),
    "prompt_tokens": (["1/5", "1/5", "1"], 2),
    "batch_tokens": (["1", "1", "1"], 6),
    "max_length": (["1/8", "1/8", "1/8"], 4),
    "sum": (["1", "1", "1"], 4),
}


def of(name, mask=MASK, valid=VALID, prompts=PROMPTS, **options):
    return jax.device_get(token_weights(name, mask, valid, prompts, **({"num_prompts": 3, "max_length": 8} | options)))


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_weights_written_out(name):
    per_token, count = WRITTEN_OUT[name]
    expected = np.where(MASK, np.array([float(Fraction(x)) for x in per_token] + [0.0] * 3)[:, None], 0) * VALID[:, None]
    weights, found = of(name)
    np.testing.assert_allclose(weights, expected, rtol=1e-7)
    assert found == count and weights.dtype == found.dtype == np.float32


@pytest.mark.parametrize("name, unit", [("completion", "completion"), ("prompt_tokens", "prompt"), ("batch_tokens", "token")])
def test_each_unit_of_the_count_weighs_one(name, unit):
    """A mean: completions, prompts or tokens weigh 1 each, an empty completion nothing."""
    weights, _ = of(name)
    rows = weights.sum(axis=1)
    units = {"completion": rows[:3], "prompt": np.bincount(PROMPTS[:4], rows[:4]), "token": weights[MASK & VALID[:, None]]}[unit]
    np.testing.assert_allclose(units, 1.0, rtol=1e-6)


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_the_order_of_rows_does_not_matter(name):
    order = np.array([4, 2, 0, 5, 3, 1])
    weights, count = of(name)
    moved, moved_count = of(name, MASK[order], VALID[order], PROMPTS[order])
    np.testing.assert_array_equal(moved, weights[order])
    assert moved_count == count


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_a_batch_of_padding_weighs_and_counts_nothing(name):
    weights, count = of(name, valid=np.zeros(6, bool))
    assert not weights.any() and count == 0


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_empty_completions_count_but_for_means_over_tokens(name):
    weights, count = of(name, mask=np.zeros_like(MASK))
    assert not weights.any() and count == {"batch_tokens": 0, "prompt_tokens": 2}.get(name, 4)


def test_gaps_in_a_completion_do_not_count():
    """Tokens that tools wrote lie between those sampled."""
    weights, _ = of("completion", mask=np.array([[1, 0, 1]] * 6, bool))
    np.testing.assert_array_equal(weights[0], [0.5, 0, 0.5])


def test_a_prompt_out_of_range_shows():
    wrong = PROMPTS.copy()
    wrong[0] = 7
    weights, _ = of("prompt_tokens", prompts=wrong)
    assert np.isnan(weights[0, :2]).all() and np.isfinite(weights[1:]).all()


def test_the_dtype_is_the_callers():
    with jax.enable_x64(True):
        for name in AGGREGATIONS:
            weights, count = token_weights(name, MASK, VALID, PROMPTS, num_prompts=3, max_length=3, dtype=jnp.float64)
            assert weights.dtype == count.dtype == jnp.float64


def test_errors_are_one_line():
    with pytest.raises(ValueError, match="^aggregation is 'mean', must be one of completion, .*: set objective.aggregation$"):
        of("mean")
    with pytest.raises(ValueError, match="^max_length = 0 is below 1, .*: set objective.max_length$"):
        of("max_length", max_length=0)
