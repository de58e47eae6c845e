"""Floor 5: the sections of a report, from the records of the runs to HTML. A section that has nothing to show returns empty markup."""

import dataclasses
import json
from typing import Any, Mapping, Sequence

import numpy as np

from pgrpo_jax import alarms as recorded, charts, metric_table, metrics, report_page as html

_CURVES = (
    ("reward", "Reward of the sampled completions"), ("worst_reward", "Reward of the worst preference group"),
    ("cvar", "Reward of the worst fifth of the prompts"), ("gap", "Reward of the best preference group minus the worst"),
    ("answered", "Completions that are an answer"),
    ("entropy", "Entropy of the policy"), ("kl", "KL to the reference policy"), ("length", "Length of a completion"),
    ("truncated", "Completions cut off by the token limit"), ("grad_norm", "Gradient norm before clipping"),
    ("dead_prompts", "Prompts with all rewards equal"), ("duplicates", "Completions that repeat another one of their prompt"),
    ("gradient_cosine/min", "Smallest cosine between two preference groups' gradients"),
    ("tokens_per_sec", "Speed of generation"),
)
_PANELS = (
    ("reward", "Reward", None), ("advantage_scale", "Advantage scale: \u03c3_G / \u03c3_p of Corollary 3.1, dashed = as GRPO", 1.0),
    ("bias", "Advantage bias: (\u03bc_G \u2212 \u03bc_p) / \u03c3_p of Corollary 3.1, dashed = as GRPO", 0.0),
    ("signal_share", "Share of the signal: \u03a3|advantage| over that of all", None),
    ("gradient_share", "Share of the gradient: \u27e8g_p, g\u27e9 / |g|\u00b2, below 0 = pushed back", 0.0),
    ("entropy", "Entropy of the policy", None),
)
_SECONDS = ("generation_secs", "update_secs", "checkpoint_secs")
_TIME_NAMES = ("generating", "updating", "waiting for checkpoints", "rest")
_TIME_COLOURS = ("#3f4f6b", "#8391a9", "#bcc6d6", "#e3e7ed")
_SAMPLES_SHOWN = 5
_TEXT_SHOWN = 1500


@dataclasses.dataclass(frozen=True)
class Run:
    """What is read of one run directory.

    Attributes:
        name: shown for it, unique in the report.
        colour: of its marks, a CSS colour.
        config: flat configuration, {} where it is missing.
        steps: the metrics records.
        samples: the sample records.
        before: evaluation of the untrained policy, or None.
        after: evaluation of the trained policy, or None.
        summary: summary.json, or None where the run has not finished.
    """

    name: str
    colour: str
    config: Mapping[str, Any]
    steps: Sequence[Mapping[str, Any]]
    samples: Sequence[Mapping[str, Any]]
    before: Mapping[str, Any] | None
    after: Mapping[str, Any] | None
    summary: Mapping[str, Any] | None


def cards(runs: Sequence[Run]) -> html.Markup:
    """Returns a card for each run: what was learned, and its key numbers."""
    shown = []
    for run in runs:
        summary, before, after = run.summary or {}, run.before or {}, run.after or {}
        done = run.steps[-1]["step"] if run.steps else 0
        total = run.config.get("num_steps", "?")
        finished = run.summary is not None
        status = "finished" if finished else f"still running or preempted at update {done} of {total}"
        wall = metrics.finite(summary.get("wall_secs")) or metrics.finite(run.steps[-1].get("wall_secs") if run.steps else None)
        gain = after.get("advantage_over_random") or {}
        pairs = [
            ("preset", run.config.get("preset", "n/a")),
            ("updates", f"{done} of {total}"),
            ("wall time", metrics.duration(wall) if wall is not None else "n/a"),
            ("answer rate", _change(before, after, "answer_rate")),
            ("reward", _change(before, after, "reward")),
            ("over random choice", f"{metrics.number(gain.get('mean'), signed=True)} {metrics.interval(gain)}"),
            ("worst preference group", after.get("worst_preference_group", "n/a")),
            ("gap, worst to best", f"{metrics.number(after.get('gap'))} reward"),
            ("state_sha256", html.tag("code", str(summary.get("state_sha256", "n/a"))[:16])),
            ("reproducible", {True: "yes", False: "no"}.get(summary.get("reproducible"), "n/a")),
        ]
        head = html.tag("h3", html.dot(run.colour), run.name, " ", html.tag("span", status, css="pill" if finished else "pill open"))
        verdict = html.tag("p", metrics.verdict(run.before, run.after), css="verdict")
        shown.append(html.tag("div", head, verdict, html.facts(pairs), css="card"))
    return html.tag("div", *shown, css="grid")


def evaluations(runs: Sequence[Run]) -> html.Markup:
    """Returns the evaluation as a chart of intervals and a table for each run."""
    evaluated = [run for run in runs if run.before or run.after]
    if not evaluated:
        return html.Markup()
    chart = html.image(_interval_chart(evaluated), "reward given an answer minus random choice, with intervals")
    return html.joined([html.tag("div", chart, css="card")] + [html.tag("div", _evaluation_table(run), css="card") for run in evaluated])


def _interval_chart(runs: Sequence[Run]) -> str:
    sides = [[_by_key(side) for side in (run.before, run.after)] for run in runs]
    keys = sorted({key for pair in sides for side in pair for key in side}, key=lambda key: (key != "all", int(key) if key != "all" else 0))
    rows = []
    for key in keys:
        pairs = [charts.Pair(run.colour, *(_estimate(side.get(key)) for side in pair)) for run, pair in zip(runs, sides)]
        rows.append(("all prompts" if key == "all" else f"preference group {key}", pairs))
    baselines = (runs[0].after or runs[0].before or {}).get("baselines") or {}
    random, popular = metrics.finite(baselines.get("random")), metrics.finite(baselines.get("popular"))
    mark = popular - random if random is not None and popular is not None else float("nan")
    return charts.intervals(rows, unit="reward of an answer minus that of a random choice", mark=mark, mark_label="most popular candidate")


def _by_key(evaluation: Mapping[str, Any] | None) -> dict[str, Mapping[str, Any]]:
    return {"all": evaluation, **(evaluation.get("per_preference_group") or {})} if evaluation else {}


def _estimate(values: Mapping[str, Any] | None) -> charts.Estimate:
    gain = (values or {}).get("advantage_over_random") or {}
    found = [metrics.finite(gain.get(key)) for key in ("mean", "low", "high")]
    return charts.Estimate(*(float("nan") if value is None else value for value in found))


def _evaluation_table(run: Run) -> html.Markup:
    before, after = (dict(metrics.evaluation_rows(side)) if side else {} for side in (run.before, run.after))
    rows = []
    for label in after or before:
        old, new = before.get(label, {}), after.get(label, {})
        shown = new or old
        bounds = shown.get("intervals") or {}
        cells = ["all prompts" if label == "all" else label, shown.get("num_prompts", "n/a")]
        for key in ("answer_rate", "reward", "reward_given_answer"):
            cells.append(_with_interval(_change(old, new, key), metrics.interval(bounds.get(key), signed=False)))
        gain = shown.get("advantage_over_random") or {}
        cells.append(_with_interval(_change(old, new, "advantage_over_random"), metrics.interval(gain)))
        rows.append(cells + [_change(old, new, "first_candidate_share")])
    baselines = (run.after or run.before or {}).get("baselines") or {}
    for key, label in (("random", "baseline: random choice"), ("popular", "baseline: most popular")):
        rows.append([label, "", "", "", metrics.number(baselines.get(key)), "", ""])
    header = ("preference group", "prompts", "answer rate", "reward", "reward given an answer",
              "over random choice [95 %]", "first candidate")
    return html.table(header, rows, numeric=range(1, 7), strong=(0,), caption=html.joined([html.dot(run.colour), html.tag("b", run.name),
                      ": before \u2192 after training; brackets: 95 % interval " + ("after" if run.after else "before")]))


def _with_interval(value: str, bounds: str) -> html.Markup:
    return html.joined([value, html.tag("div", bounds, css="soft small") if bounds else ""])


def _change(before: Mapping[str, Any], after: Mapping[str, Any], key: str) -> str:
    values = [side.get(key) for side in (before, after) if side]
    signed = key == "advantage_over_random"
    values = [(value or {}).get("mean") if signed else value for value in values]
    return " \u2192 ".join(metrics.number(value, signed=signed) for value in values) or "n/a"


def _line(run: Run, key: str) -> charts.Line:
    values = [metrics.finite(record.get(key)) for record in run.steps]
    return charts.Line(run.colour, np.array([record["step"] for record in run.steps], dtype=np.float64),
                       np.array([np.nan if value is None else value for value in values], dtype=np.float64))


def learning_curves(runs: Sequence[Run]) -> html.Markup:
    """Returns a chart for each curve that any run has, with its first and last values."""
    cards = []
    for key, title in _CURVES:
        lines = [_line(run, key) for run in runs]
        if any(np.isfinite(line.values).any() for line in lines):
            figure = html.image(charts.curves(lines, unit=metric_table.describe(key).unit), title)
            ends = html.joined([_ends(run, line) for run, line in zip(runs, lines)])
            cards.append(html.tag("div", html.tag("h3", title), html.tag("div", ends, css="soft small"), figure, css="card"))
    return html.tag("div", *cards, css="grid") if cards else html.Markup()


def _ends(run: Run, line: charts.Line) -> html.Markup:
    values = line.values[np.isfinite(line.values)]
    if not values.size:
        return html.tag("span", html.dot(run.colour), "no data", css="key")
    tenth = -(-values.size // 10)
    ends = f"{_short(values[:tenth].mean())} \u2192 {_short(values[-tenth:].mean())}"
    return html.tag("span", html.dot(run.colour), ends, css="key")


def _short(value: float) -> str:
    return metrics.number(float(value), 3 if abs(value) < 10 else 1)


def preference_panels(runs: Sequence[Run]) -> html.Markup:
    """Returns small charts for each preference group: what it earns, what P-GRPO does to it, and its share of what trains."""
    numbers = sorted({p for run in runs for record in run.steps for p in metrics.preference_groups(record)}, key=int)
    cards = []
    for key, title, reference in _PANELS:
        titled = [(f"preference group {p}", [_line(run, f"preference_group/{p}/{key}") for run in runs]) for p in numbers]
        if any(np.isfinite(line.values).any() for _, lines in titled for line in lines):
            unit = metric_table.describe(f"preference_group/0/{key}").unit
            figure = html.image(charts.panels(titled, unit=unit, reference=reference), title)
            cards.append(html.tag("div", html.tag("h3", title), figure, css="card"))
    return html.joined(cards)


def alarms(runs: Sequence[Run]) -> html.Markup:
    """Returns the alarms of each run, from the update that raised one to the update that ended it; a line where a run had none."""
    cards = []
    for run in runs:
        rows = [
            [html.tag("code", alarm["key"]), alarm["since"], "still on" if until is None else until, metrics.number(alarm.get("value")),
             metrics.number(alarm.get("bound")), alarm["remedy"]]
            for alarm, until in recorded.episodes(run.steps)
        ]  # fmt: skip
        caption = html.joined([html.dot(run.colour), html.tag("b", run.name), "" if rows else ": no alarm"])
        header = ("alarm", "raised at update", "ended at", "value", "bound", "what to do")
        cards.append(html.tag("div", html.table(header, rows, numeric=(1, 2, 3, 4), caption=caption) if rows else caption, css="card"))
    return html.joined(cards) if any("alarms" in record for run in runs for record in run.steps) else html.Markup()


def time_split(runs: Sequence[Run]) -> html.Markup:
    """Returns how each run's wall time splits into generating, updating, checkpoints and the rest."""
    rows, bars = [], []
    for run in runs:
        if not run.steps:
            continue
        sums = [sum(metrics.finite(record.get(key)) or 0.0 for record in run.steps) for key in _SECONDS]
        walls = [metrics.finite(record.get("wall_secs")) or 0.0 for record in (run.summary or {}, run.steps[-1])]
        wall = max(*walls, sum(sums))
        parts = [*sums, wall - sum(sums)]
        shares = [part / wall if wall else 0.0 for part in parts]
        cells = [f"{metrics.duration(part)} ({share:.0%})" for part, share in zip(parts, shares)]
        rows.append([html.joined([html.dot(run.colour), run.name]), metrics.duration(wall), *cells])
        bars.append(html.joined([html.tag("div", run.name, css="small"), html.bar(list(zip(shares, _TIME_COLOURS)))]))
    if not rows:
        return html.Markup()
    key = html.joined([html.tag("span", html.dot(colour), name, css="key") for name, colour in zip(_TIME_NAMES, _TIME_COLOURS)])
    table = html.table(("run", "wall time", *_TIME_NAMES), rows, numeric=range(1, 6))
    return html.tag("div", html.tag("p", key, css="small"), *bars, table, css="card")


def samples(runs: Sequence[Run]) -> html.Markup:
    """Returns samples of the first and the last recorded step of each run."""
    cards = []
    for run in runs:
        steps = sorted({sample["step"] for sample in run.samples})
        for step in dict.fromkeys(steps[:1] + steps[-1:]):
            shown = metrics.spread([sample for sample in run.samples if sample["step"] == step], _SAMPLES_SHOWN)
            rows = [_sample_row(sample) for sample in shown]
            caption = html.joined([html.dot(run.colour), html.tag("b", run.name), f": update {step}"])
            header = ("answer", "preference group", "reward", "advantage")
            cards.append(html.tag("div", html.table(header, rows, numeric=(1, 2, 3), caption=caption), css="card"))
    return html.tag("div", *cards, css="grid wide") if cards else html.Markup()


def _sample_row(sample: Mapping[str, Any]) -> list[object]:
    prompt, answer = str(sample["prompt"]), str(sample["answer"])
    cut = html.joined([" ", html.tag("span", "cut off", css="pill open")]) if sample.get("truncated") else ""
    folded = html.tag("details", html.tag("summary", f"prompt {sample['prompt_id']}"), html.tag("div", prompt[-_TEXT_SHOWN:], css="said"))
    said = html.joined([html.tag("div", answer[:_TEXT_SHOWN], cut, css="said"), html.tag("div", folded, css="small")])
    return [said, sample["preference_id"], metrics.number(sample["reward"], 2), metrics.number(sample["advantage"], 2, signed=True)]


def configs(runs: Sequence[Run]) -> html.Markup:
    """Returns the keys on which the runs differ, and each run's whole configuration, folded."""
    written = [{key: json.dumps(value) for key, value in run.config.items()} for run in runs]
    keys = sorted({key for config in written for key in config})
    differing = [key for key in keys if len({config.get(key) for config in written}) > 1]
    parts: list[object] = []
    if len(runs) > 1:
        rows = [[html.tag("code", key), *(html.tag("code", config.get(key, "unset")) for config in written)] for key in differing]
        parts.append(html.table(("key", *(run.name for run in runs)), rows) if rows else html.tag("p", "The configurations are equal."))
    for run, config in zip(runs, written):
        rows = [[html.tag("code", key), html.tag("code", value)] for key, value in sorted(config.items())]
        parts.append(html.tag("details", html.tag("summary", f"configuration of {run.name}"), html.table(("key", "value"), rows)))
    return html.tag("div", *parts, css="card")
