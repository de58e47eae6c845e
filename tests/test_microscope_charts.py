"""The microscope's charts are whole SVG images for any numbers: many preference groups, none known, one step."""

import numpy as np
import pytest
from test_charts import decoded

from pgrpo_jax import microscope_charts
from pgrpo_jax.charts import Estimate

NAN = float("nan")


@pytest.mark.parametrize("size", [0, 1, 300])
def test_advantages_are_scattered(size):
    random = np.random.default_rng(0)
    x, y, ids = random.normal(size=size), random.normal(size=size), random.integers(0, 11, size)
    text = decoded(microscope_charts.scatter(x, y, ids, unit_x="GRPO", unit_y="P-GRPO"))
    assert all((microscope_charts.COLOURS[k % 8] in text) == bool((ids % 8 == k).any()) for k in range(8))
    assert "#fbe3e3" in text and text == decoded(microscope_charts.scatter(x, y, ids, unit_x="GRPO", unit_y="P-GRPO"))


def test_many_preference_groups_are_told_apart():
    marks = {(microscope_charts.colour(k), microscope_charts.marker(k)) for k in range(40)}
    assert len(marks) == 40


@pytest.mark.parametrize("values", [np.full((1, 2), 0.5), np.full((3, 2), NAN), np.array([[NAN, 1.0], [0.5, NAN], [0.2, 2.0]])])
def test_terms_are_drawn_over_the_steps(values):
    text = decoded(microscope_charts.terms(range(1, len(values) + 1), values, -values))
    assert microscope_charts.COLOURS[0] in text and microscope_charts.COLOURS[1] in text


def test_shares_and_suppression_are_drawn():
    text = decoded(microscope_charts.shares([0.25, 0.75], {"grpo": [0.1, 0.9], "p_grpo": [NAN, NAN]}))
    assert text.count(f"fill: {microscope_charts.COLOURS[1]}") >= 2
    rows = [[Estimate(0.5, 0.25, 0.75), Estimate(NAN, NAN, NAN)], [Estimate(1.0, NAN, NAN), Estimate(2.0, 1.0, 3.0)]]
    text = decoded(microscope_charts.suppression(rows, ["grpo", "pooled"]))
    assert microscope_charts.COLOURS[0] in text and microscope_charts.COLOURS[1] in text
