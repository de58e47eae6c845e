"""Floor 5: the laboratory's charts: differences to GRPO by arm and regime, and learning curves. PNG, made without pyplot."""

import io
from typing import Any, Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
import numpy as np

from pgrpo_jax.charts import STYLE
from pgrpo_jax.laboratory.sweep import ALL
from pgrpo_jax.laboratory.training import Outcome

_BASELINE = "grpo"
_PARTS = (("worst_final", "worst preference group", "#c4572e", -0.17), ("mean_final", "mean over users", "#2f6db3", 0.17))
_COLOURS = ("#5d6878", "#2f6db3", "#c4572e", "#3b8f5a", "#8a5bb5")
_COLUMNS = 4
_DPI = 72


def differences(report: Mapping[str, Any]) -> bytes:
    """Draws, for every regime, how much more than GRPO each arm earns in the end.

    Args:
        report: from `laboratory.sweep.report`.

    Returns:
        The chart, PNG: dots are paired differences of the final normalised reward, bars their 95 % intervals.
    """
    arms = [arm for arm in report["paired"] if arm != _BASELINE]
    regimes = list(report["paired"][arms[0]][_BASELINE])
    with matplotlib.rc_context(STYLE):
        figure, grid = _grid(len(regimes), height=0.75 + 0.17 * len(arms), sharey=True)
        for axes, regime in zip(grid.flat, regimes):
            axes.axvline(0.0, color="#5d6878", linewidth=1.0)
            for measure, label, colour, shift in _PARTS:
                found = [report["paired"][arm][_BASELINE][regime][measure] for arm in arms]
                middle = np.asarray([one["mean"] for one in found])
                half = np.asarray([(one["high"] - one["low"]) / 2 for one in found])
                place = np.arange(len(arms)) + shift
                axes.errorbar(middle, place, xerr=half, fmt="o", markersize=2.6, linewidth=1.1, color=colour, label=label)
            axes.set_title(regime, loc="left", fontweight="bold" if regime == ALL else "normal")
            axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
        grid[0, 0].set_yticks(range(len(arms)), arms)
        grid[0, 0].set_ylim(len(arms) - 0.5, -0.5)
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
        figure.supxlabel("final true reward minus GRPO's, same seeds (0 = random, 1 = optimal)", color="#5d6878", fontsize=9)
        return _png(figure)


def curves(outcomes: Mapping[str, Outcome], regimes: Sequence[str], drawn: Sequence[str]) -> bytes:
    """Draws the learning curves of the minority (the last preference group), mean over seeds with its 95 % interval.

    Args:
        outcomes: from `laboratory.sweep.run`.
        regimes: the names of its regimes, in order.
        drawn: the arms to draw, at most five.

    Returns:
        The chart, PNG.
    """
    with matplotlib.rc_context(STYLE):
        figure, grid = _grid(len(regimes), height=1.9, sharey=True)
        for i, (axes, regime) in enumerate(zip(grid.flat, regimes)):
            for arm, colour in zip(drawn, _COLOURS):
                _draw_curve(axes, outcomes[arm].curve[i, :, :, -1], arm, colour)
            axes.set_title(regime, loc="left")
        for axes in grid[:, 0]:
            axes.set_ylabel("minority's reward")
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=len(drawn), frameon=False)
        figure.supxlabel("update", color="#5d6878", fontsize=9)
        return _png(figure)


def staleness(report: Mapping[str, Any]) -> bytes:
    """Draws a map for every treatment: final reward by staleness (rows) and learning rate (columns).

    Args:
        report: from `laboratory.staleness.report`.

    Returns:
        The chart, PNG; all maps have one scale, each cell its number.
    """
    first = next(iter(report.values()))
    rows, columns = list(first), list(next(iter(first.values())))
    with matplotlib.rc_context(STYLE):
        figure, grid = _grid(len(report), height=2.6, sharey=True)
        for i, (axes, (name, each)) in enumerate(zip(grid.flat, report.items())):
            values = np.array([[each[row][column]["mean"] for column in columns] for row in rows])
            axes.imshow(values, cmap="cividis", vmin=0.0, vmax=1.0, aspect="auto")
            for (y, x), value in np.ndenumerate(values):
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8, color="white" if value < 0.6 else "black")
            axes.set_title(name, loc="left")
            axes.set_xticks(range(len(columns)), columns)
            axes.set_yticks(range(len(rows)), rows)
            axes.grid(False)
            if i % _COLUMNS == 0:
                axes.set_ylabel("staleness, updates")
        figure.supxlabel("learning rate; colour and number: final true reward (0 = random, 1 = optimal)", color="#5d6878", fontsize=9)
        return _png(figure)


def _draw_curve(axes: Axes, values: np.ndarray, label: str, colour: str) -> None:
    """One curve from [M seeds, S updates]."""
    step = np.arange(1, values.shape[1] + 1)
    middle, half = values.mean(axis=0), 1.96 * values.std(axis=0, ddof=1) / np.sqrt(values.shape[0])
    axes.plot(step, middle, color=colour, linewidth=1.4, label=label)
    axes.fill_between(step, middle - half, middle + half, color=colour, alpha=0.18, linewidth=0)


def _grid(number: int, *, height: float, sharey: bool) -> tuple[Figure, np.ndarray]:
    """A figure with `number` panels, at most `_COLUMNS` in a row."""
    columns = min(number, _COLUMNS)
    rows = -(-number // columns)
    figure = Figure(figsize=(11.2, 0.5 + height * rows))
    grid = figure.subplots(rows, columns, sharey=sharey, squeeze=False)
    for axes in grid.flat[number:]:
        axes.set_visible(False)
    return figure, grid


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # Without the name of the software: equal reports make equal charts.
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None}, pil_kwargs={"optimize": True})
    return buffer.getvalue()
