"""Floor 5: numbers in, SVG out. Only this module and `microscope_charts.py` know matplotlib.

Figures are made without pyplot, so there is no global state and no display is needed. No text of a run enters a chart: matplotlib would
read "$" as mathematics and warn about letters its font lacks.
"""

import base64
import io
from typing import NamedTuple, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
import numpy as np

STYLE = {
    "svg.hashsalt": "pgrpo_jax", "font.family": "DejaVu Sans", "font.size": 9.0, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": "#b8c0cc", "axes.grid": True, "grid.color": "#eceff4", "axes.axisbelow": True, "xtick.color": "#5d6878",
    "ytick.color": "#5d6878", "axes.labelcolor": "#5d6878", "text.color": "#1c2430", "axes.titlesize": 9.0,
    "figure.constrained_layout.use": True,
}
_REFERENCE = {"color": "#8a94a6", "linewidth": 1.0, "linestyle": (0, (4, 3)), "zorder": 1.5}
_SMOOTH_FROM = 50
_PANELS_A_ROW = 5


class Line(NamedTuple):
    """One curve: its colour, [S] steps and [S] values, NaN where there is none."""

    colour: str
    steps: np.ndarray
    values: np.ndarray


class Estimate(NamedTuple):
    """A mean with the ends of its interval; NaN where unknown."""

    mean: float
    low: float
    high: float


class Pair(NamedTuple):
    """The estimates of one run in one row: its colour, before and after training."""

    colour: str
    before: Estimate
    after: Estimate


def curves(lines: Sequence[Line], *, unit: str) -> str:
    """Draws one chart over the updates of the runs.

    Args:
        lines: one for each run; a long one is drawn faint with its running mean on top.
        unit: label of the vertical axis.

    Returns:
        The chart as a data:image/svg+xml address.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4, 2.5))
        axes = figure.subplots()
        for line in lines:
            draw_line(axes, line)
        axes.set_ylabel(unit)
        axes.set_xlabel("update")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        return address(figure)


def panels(titled: Sequence[tuple[str, Sequence[Line]]], *, unit: str, reference: float | None = None) -> str:
    """Draws small charts of the same scale side by side, one for each preference group.

    Args:
        titled: (title, lines) of each chart.
        unit: label of the vertical axis.
        reference: where a dashed line is drawn, the value that changes nothing; None draws none.

    Returns:
        The charts as one data:image/svg+xml address.
    """
    rows = -(-len(titled) // _PANELS_A_ROW)
    columns = min(len(titled), _PANELS_A_ROW)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.2, 2.3 * rows))
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes in grid.flat[len(titled):]:
            axes.set_visible(False)
        for axes, (title, lines) in zip(grid.flat, titled):
            for line in lines:
                draw_line(axes, line)
            if reference is not None:
                axes.axhline(reference, **_REFERENCE)
            axes.set_title(title, loc="left")
            axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
        for axes in grid[:, 0]:
            axes.set_ylabel(unit)
        for axes in grid[-1]:
            axes.set_xlabel("update")
        return address(figure)


def intervals(rows: Sequence[tuple[str, Sequence[Pair]]], *, unit: str, mark: float = float("nan"), mark_label: str = "") -> str:
    """Draws estimates with their intervals, hollow before training and filled after, one row for each preference group.

    Args:
        rows: (label, one pair for each run), from the top.
        unit: label of the horizontal axis; 0 is drawn as a line.
        mark: where a dotted line is drawn for comparison; NaN draws none.
        mark_label: what the dotted line is.

    Returns:
        The chart as a data:image/svg+xml address.
    """
    with matplotlib.rc_context(STYLE):
        most = max(len(pairs) for _, pairs in rows)
        figure = Figure(figsize=(11.2, 0.9 + len(rows) * (0.18 + 0.3 * most)))
        axes = figure.subplots()
        axes.axvline(0.0, color="#5d6878", linewidth=1.1)
        if np.isfinite(mark):
            axes.axvline(mark, color="#5d6878", linewidth=1.1, linestyle=":")
            above = {"xycoords": ("data", "axes fraction"), "xytext": (4, 2), "textcoords": "offset points"}
            axes.annotate(mark_label, (mark, 1.0), color="#5d6878", **above)
        for i, (_, pairs) in enumerate(rows):
            for j, pair in enumerate(pairs):
                middle = i + ((j + 0.5) / len(pairs) - 0.5) * 0.72
                gap = 0.13 * 0.72 / len(pairs) * 2
                _draw_estimate(axes, pair.before, middle - gap, pair.colour, after=False)
                _draw_estimate(axes, pair.after, middle + gap, pair.colour, after=True)
        for i in range(1, len(rows)):
            axes.axhline(i - 0.5, color="#eceff4", linewidth=1.0)
        axes.set_yticks(range(len(rows)), [label for label, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(unit)
        return address(figure)


def draw_line(axes: Axes, line: Line) -> None:
    """Draws one curve: its points, or, from 50 of them on, the raw curve faintly and its centred running mean over a twentieth of it."""
    known = np.isfinite(line.values)
    steps, values = line.steps[known], line.values[known]
    if values.size < _SMOOTH_FROM:
        axes.plot(steps, values, color=line.colour, linewidth=1.6, marker="o", markersize=2.4)
        return
    axes.plot(steps, values, color=line.colour, linewidth=0.8, alpha=0.3)
    window = values.size // 20 | 1
    smooth = np.convolve(values, np.full(window, 1.0 / window), mode="valid")
    axes.plot(steps[window // 2:window // 2 + smooth.size], smooth, color=line.colour, linewidth=1.8)


def _draw_estimate(axes: Axes, estimate: Estimate, y: float, colour: str, *, after: bool) -> None:
    if not np.isfinite(estimate.mean):
        return
    if np.isfinite(estimate.low) and np.isfinite(estimate.high):
        axes.plot([estimate.low, estimate.high], [y, y], color=colour, linewidth=2.2 if after else 1.2, alpha=1.0 if after else 0.55,
                  solid_capstyle="round")
    axes.plot([estimate.mean], [y], marker="o", markersize=6 if after else 5, color=colour,
              markerfacecolor=colour if after else "white", linestyle="none")


def address(figure: Figure) -> str:
    """Returns a figure as a data:image/svg+xml address; equal figures give equal addresses. Draw it under `matplotlib.rc_context(STYLE)`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})  # no date: equal runs make equal pages
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
