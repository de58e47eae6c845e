"""The laboratory's charts: made of any report, equal for equal reports, small enough for the documentation."""

import io

import matplotlib.image
import numpy as np

from pgrpo_jax import laboratory_charts
from pgrpo_jax.laboratory import training

REGIMES = [f"regime {i}" for i in range(5)]


def made(arms=("grpo", "p_grpo", "dr_grpo"), seed=0):
    generator = np.random.default_rng(seed)

    def interval():
        mean = generator.normal()
        return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}

    measures = ("worst_final", "mean_final")
    return {"paired": {arm: {"grpo": {regime: {m: interval() for m in measures} for regime in REGIMES}} for arm in arms}}


def outcomes(arms=("grpo", "p_grpo")):
    generator = np.random.default_rng(1)
    return {
        arm: training.Outcome(curve=generator.normal(size=(5, 4, 20, 3)), gradient_share=None, scale=None, bias=None) for arm in arms
    }


def pixels(png):
    return matplotlib.image.imread(io.BytesIO(png), format="png")


def test_differences_is_a_picture_of_its_report():
    first = laboratory_charts.differences(made())
    assert pixels(first).shape[1] > 800 and pixels(first)[..., :3].std() > 0.05
    assert first == laboratory_charts.differences(made())
    assert first != laboratory_charts.differences(made(seed=1))


def test_curves_draws_a_panel_for_each_regime():
    first = laboratory_charts.curves(outcomes(), REGIMES, ["grpo", "p_grpo"])
    assert first == laboratory_charts.curves(outcomes(), REGIMES, ["grpo", "p_grpo"])
    assert first != laboratory_charts.curves(outcomes(), REGIMES, ["grpo"])
    assert len(first) < 150_000


def test_the_map_of_staleness_follows_its_numbers():
    def report(value):
        rows = {row: {column: {"mean": value, "low": 0.0, "high": 1.0} for column in ("1", "2")} for row in ("0", "4")}
        return {"nothing": rows, "token": rows}

    first = laboratory_charts.staleness(report(0.2))
    assert pixels(first)[..., :3].std() > 0.05
    assert first == laboratory_charts.staleness(report(0.2)) and first != laboratory_charts.staleness(report(0.9))
