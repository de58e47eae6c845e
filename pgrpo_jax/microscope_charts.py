"""Floor 5: the charts of the advantage microscope, in the style of `charts.py`. No text of a run enters a chart."""

from typing import Mapping, Sequence

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
import numpy as np

from pgrpo_jax import charts

COLOURS = ("#2f6fde", "#e07b1a", "#13936b", "#8452cf", "#cf3a60", "#5b6675", "#b0861a", "#1f9bb5")
_MARKERS = "osD^vPX"
_SHADE = "#fbe3e3"


def colour(preference_id: int) -> str:
    """Returns the colour of a preference group; from the ninth on they repeat, with another marker."""
    return COLOURS[preference_id % len(COLOURS)]


def marker(preference_id: int) -> str:
    """Returns the marker of a preference group."""
    return _MARKERS[preference_id // len(COLOURS) % len(_MARKERS)]


def scatter(x: np.ndarray, y: np.ndarray, preference: np.ndarray, *, unit_x: str, unit_y: str) -> str:
    """Draws two schemes' advantages against each other; where they disagree in sign the plane is shaded.

    Args:
        x: [N] advantages under one scheme. Many are equal, as rewards are: what lies on one spot is drawn larger.
        y: [N] under the other.
        preference: [N] int, preference group.
        unit_x: label of the horizontal axis.
        unit_y: label of the vertical axis.

    Returns:
        The chart as a data:image/svg+xml address.
    """
    with matplotlib.rc_context(charts.STYLE):
        figure = Figure(figsize=(6.4, 5.4))
        axes = figure.subplots()
        limit_x, limit_y = (1.08 * max(float(np.abs(v).max(initial=0.0)), 1.0) for v in (x, y))
        for left, bottom in ((-limit_x, 0.0), (0.0, -limit_y)):
            axes.fill_between([left, left + limit_x], bottom, bottom + limit_y, color=_SHADE, linewidth=0, zorder=0.5)
        axes.axhline(0.0, color="#8a94a6", linewidth=1.0, zorder=1.2)
        axes.axvline(0.0, color="#8a94a6", linewidth=1.0, zorder=1.2)
        for k in np.unique(preference):
            spots, count = np.unique(np.round(np.stack([x, y], axis=1)[preference == k], 3), axis=0, return_counts=True)
            axes.scatter(spots[:, 0], spots[:, 1], s=10 * np.sqrt(count), color=colour(k), marker=marker(k), alpha=0.6, linewidths=0,
                         label=f"preference group {k}", zorder=2)
        for place, text in (((0.02, 0.98), "punished \u2192 rewarded"), ((0.98, 0.02), "rewarded \u2192 punished")):
            corner = {"ha": "left" if place[0] < 0.5 else "right", "va": "top" if place[1] > 0.5 else "bottom"}
            axes.annotate(text, place, xycoords="axes fraction", color="#a33a3a", fontsize=8, **corner)
        axes.set_xlim(-limit_x, limit_x)
        axes.set_ylim(-limit_y, limit_y)
        axes.set_xlabel(unit_x)
        axes.set_ylabel(unit_y)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False, fontsize=8)
        return charts.address(figure)


def terms(numbers: Sequence[int], scale: np.ndarray, bias: np.ndarray) -> str:
    """Draws both terms of Corollary 3.1 over the steps, a line for each preference group.

    Args:
        numbers: S step numbers.
        scale: [S, K], NaN where unknown.
        bias: [S, K], likewise.

    Returns:
        The charts as one data:image/svg+xml address.
    """
    with matplotlib.rc_context(charts.STYLE):
        figure = Figure(figsize=(11.2, 3.0))
        panels = zip(figure.subplots(1, 2), (scale, bias), (1.0, 0.0), ("scale: \u03c3_G / \u03c3_p", "bias: (\u03bc_G \u2212 \u03bc_p) / \u03c3_p"))
        for axes, values, as_grpo, unit in panels:
            axes.axhline(as_grpo, color="#8a94a6", linewidth=1.0, linestyle=(0, (4, 3)), zorder=1.5)
            for k in range(values.shape[1]):
                known = np.isfinite(values[:, k])
                axes.plot(np.asarray(numbers)[known], values[known, k], color=colour(k), marker=marker(k), markersize=3.0, linewidth=1.3,
                          label=f"preference group {k}")
            axes.set_xlabel("update")
            axes.set_ylabel(unit)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=5, frameon=False, fontsize=8)
        return charts.address(figure)


def shares(completions: Sequence[float], signal: Mapping[str, Sequence[float]]) -> str:
    """Draws who gets how much of each scheme's signal, beside who wrote how many of the completions.

    Args:
        completions: [K] shares of the completions.
        signal: scheme -> [K] shares of \u03a3|A|; a scheme without signal (NaN) has an empty bar.

    Returns:
        The chart as a data:image/svg+xml address.
    """
    rows = {"completions": completions} | dict(signal)
    with matplotlib.rc_context(charts.STYLE):
        figure = Figure(figsize=(11.2, 1.0 + 0.3 * len(rows)))
        axes = figure.subplots()
        for i, values in enumerate(rows.values()):
            left = 0.0
            for k, share in enumerate(np.nan_to_num(np.asarray(values, np.float64))):
                axes.barh(i, share, left=left, color=colour(k), height=0.72, edgecolor="white", linewidth=0.8,
                          alpha=0.55 if i == 0 else 1.0, label=f"preference group {k}" if i == 0 else None)
                if share >= 0.035:
                    axes.text(left + share / 2, i, f"{100 * share:.0f}", ha="center", va="center", color="white", fontsize=8)
                left += share
        edges = np.cumsum(completions)[:-1]
        axes.vlines(edges, -0.5, len(rows) - 0.5, color="#1c2430", linewidth=0.9, linestyle=":", zorder=3)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        figure.legend(loc="outside upper center", ncols=5, frameon=False, fontsize=8)
        return charts.address(figure)


def suppression(rows: Sequence[Sequence[charts.Estimate]], names: Sequence[str]) -> str:
    """Draws each preference group's share of signal over that under P-GRPO, with intervals; left of 1 = suppressed.

    Args:
        rows: for each of the K preference groups, one estimate for each scheme.
        names: of the schemes.

    Returns:
        The chart as a data:image/svg+xml address.
    """
    with matplotlib.rc_context(charts.STYLE):
        figure = Figure(figsize=(11.2, 0.8 + 0.25 * len(rows) * len(names)))
        axes = figure.subplots()
        axes.axvspan(0.0, 1.0, color=_SHADE, linewidth=0, zorder=0.5)
        axes.axvline(1.0, color="#5d6878", linewidth=1.1)
        ticks = []
        for k, estimates in enumerate(rows):
            for j, (name, estimate) in enumerate(zip(names, estimates, strict=True)):
                y = k * (len(names) + 0.8) + j
                ticks.append((y, f"preference group {k}   {name}" if j == 0 else name))
                if np.isfinite(estimate.low) and np.isfinite(estimate.high):
                    axes.plot([estimate.low, estimate.high], [y, y], color=colour(k), linewidth=2.0, solid_capstyle="round")
                axes.plot([estimate.mean], [y], marker=marker(k), markersize=5, color=colour(k), linestyle="none")
        axes.set_yticks([y for y, _ in ticks], [label for _, label in ticks])
        axes.set_ylim(ticks[-1][0] + 0.8, -0.8)
        axes.set_xlim(left=0.0)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("share of the signal / share under P-GRPO")
        return charts.address(figure)
