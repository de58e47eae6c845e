"""Charts are whole SVG images that equal numbers make equal, and a long curve's mean is the mean."""

import base64
import xml.etree.ElementTree

from matplotlib.figure import Figure
import numpy as np
import pytest

from pgrpo_jax import charts

NAN = float("nan")


def line(values, colour="#112233"):
    return charts.Line(colour, np.arange(1, len(values) + 1, dtype=np.float64), np.array(values, dtype=np.float64))


def decoded(address):
    kind, _, content = address.partition(";base64,")
    assert kind == "data:image/svg+xml"
    text = base64.b64decode(content).decode("utf-8")
    xml.etree.ElementTree.fromstring(text)
    return text


@pytest.mark.parametrize("values", [[], [NAN, NAN], [1.0], [1.0, NAN, 3.0], [0.0] * 120])
def test_any_curve_can_be_drawn(values):
    assert ("#112233" in decoded(charts.curves([line(values)], unit="reward"))) == bool(np.isfinite(values).any())


def test_equal_numbers_make_equal_charts():
    assert charts.curves([line([1.0, 2.0])], unit="s") == charts.curves([line([1.0, 2.0])], unit="s")
    assert charts.curves([line([1.0, 2.0])], unit="s") != charts.curves([line([1.0, 2.5])], unit="s")


def test_panels_and_intervals_show_every_run():
    lines = [line([1.0, 2.0]), line([2.0, 1.0], "#445566")]
    text = decoded(charts.panels([(f"preference group {p}", lines) for p in range(7)], unit="reward", reference=1.0))
    assert text.count("stroke: #112233") >= 7 and "#445566" in text
    known, unknown = charts.Estimate(0.1, 0.0, 0.2), charts.Estimate(NAN, NAN, NAN)
    pairs = [charts.Pair("#112233", unknown, known), charts.Pair("#445566", unknown, unknown)]
    text = decoded(charts.intervals([("all prompts", pairs), ("preference group 0", pairs)], unit="reward"))
    assert "#112233" in text and "#445566" not in text


def test_a_long_curve_gets_its_running_mean():
    values = np.random.default_rng(0).normal(size=100)
    axes = Figure().subplots()
    charts.draw_line(axes, line(values))
    raw, smooth = axes.get_lines()
    np.testing.assert_array_equal(raw.get_ydata(), values)
    # a twentieth of 100 updates: the mean of 5, placed at the middle one
    expected = {step: sum(values[step - 1 + k] for k in range(-2, 3)) / 5 for step in range(3, 99)}
    assert dict(zip(smooth.get_xdata(), smooth.get_ydata())) == pytest.approx(expected)


def test_a_short_curve_is_its_points():
    axes = Figure().subplots()
    charts.draw_line(axes, line([1.0, NAN, 3.0]))
    (drawn,) = axes.get_lines()
    assert list(drawn.get_xdata()) == [1.0, 3.0] and list(drawn.get_ydata()) == [1.0, 3.0]
