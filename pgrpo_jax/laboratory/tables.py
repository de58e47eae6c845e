"""Floor 1: the laboratory's report as Markdown tables, for the console and for docs/experiments.md."""

from typing import Any, Mapping, Sequence

from pgrpo_jax.laboratory import sweep

Interval = Mapping[str, float]


def measure(report: Mapping[str, Any], name: str) -> str:
    """One measure of all arms (rows) in all regimes (columns).

    Args:
        report: from `sweep.report`.
        name: one of `comparison.MEASURES`.

    Returns:
        The table; cells are "mean ±half of the 95 % interval", without the leading 0.
    """
    arms = report["measures"]
    regimes = list(next(iter(arms.values())))
    return _table(["arm", *regimes], [[arm, *[_level(each[regime][name]) for regime in regimes]] for arm, each in arms.items()])


def summary(report: Mapping[str, Any]) -> str:
    """Every arm against both baselines, over all regimes: paired differences of the final reward, and where they hold.

    Args:
        report: from `sweep.report`.

    Returns:
        The table; "+ / −" counts the regimes in which the worst preference group's interval lies above and below 0.
    """
    head = ["arm"]
    for base in sweep.BASELINES:
        head += [f"worst − {base}", f"mean − {base}", "+ / −"]
    rows = []
    for arm, against in report["verdicts"].items():
        row = [f"**{arm}**" if arm == report["recommended"] else arm]
        for base in sweep.BASELINES:
            one = against[base]
            row += [_difference(one["worst"]), _difference(one["mean"]), f"{len(one['better'])} / {len(one['worse'])}"]
        rows.append(row)
    return _table(head, rows)


def instruments(report: Mapping[str, Any], arm: str) -> str:
    """What one arm's instruments show of the minority (the last preference group), by regime.

    Args:
        report: from `sweep.report`.
        arm: its name.

    Returns:
        The table: the scale and bias terms of Corollary 3.1 and the share of the gradient's norm, of the minority and of the largest.
    """
    head = ["regime", "scale, minority", "scale, largest", "bias, minority", "bias, largest", "gradient share, minority", "largest"]
    rows = []
    for regime, each in report["instruments"][arm].items():
        cells = [each[part][k] for part in ("scale", "bias", "gradient_share") for k in (-1, 0)]
        rows.append([regime, *[f"{cell:.3f}" for cell in cells]])
    return _table(head, rows)


def verdict(report: Mapping[str, Any], *, tolerance: float) -> str:
    """One sentence: is there an arm that beats both baselines on the worst preference group without lowering the mean?

    Args:
        report: from `sweep.report`.
        tolerance: what the report was made with.

    Returns:
        The sentence.
    """
    both = " and ".join(sweep.BASELINES)
    question = f"lifts the worst preference group above both {both} (95 %, all regimes) with the mean at most {tolerance:g} lower"
    if report["recommended"] is None:
        return f"None {question}."
    all_of_them = [name for name, against in report["verdicts"].items() if all(one["lifts"] for one in against.values())]
    return f"{report['recommended']} {question}; so do: {', '.join(n for n in all_of_them if n != report['recommended']) or 'no others'}."


def errors(found: Mapping[str, Mapping[float, Mapping[str, Interval]]]) -> str:
    """What each correction (rows) costs at each distance of the sampler (columns).

    Args:
        found: from `truncation.table`.

    Returns:
        The table; cells are "bias, deviation", means over seeds.
    """
    distances = list(next(iter(found.values())))
    rows = [[name, *[", ".join(f"{one['mean']:.3f}" for one in each[d].values()) for d in distances]] for name, each in found.items()]
    return _table(["correction", *[f"noise {d:g}" for d in distances]], rows)


def staleness(report: Mapping[str, Mapping[str, Mapping[str, Interval]]], rate: str) -> str:
    """The final reward of each treatment (rows) at each staleness (columns) at one learning rate.

    Args:
        report: from `staleness.report`.
        rate: a learning rate, as the report writes it.

    Returns:
        The table; cells are "mean ±half of the 95 % interval", without the leading 0.
    """
    columns = list(next(iter(report.values())))
    rows = [[name, *[_level(each[s][rate]) for s in columns]] for name, each in report.items()]
    return _table(["treatment", *[f"{s} updates" for s in columns]], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines)


def _level(interval: Interval) -> str:
    return f"{interval['mean']:.3f} ±{(interval['high'] - interval['low']) / 2:.3f}".replace("0.", ".")


def _difference(interval: Interval) -> str:
    return f"{interval['mean']:+.4f} [{interval['low']:+.4f}, {interval['high']:+.4f}]"
