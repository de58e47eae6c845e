"""Floor 5: one self-contained HTML page that compares runs, for example GRPO beside P-GRPO.

The page needs no network and no scripts. `charts.py` draws, `report_page.py` makes the HTML and escapes what runs say.
"""

import dataclasses
import json
from typing import Any, Mapping, Sequence

from etils import epath
import numpy as np

from pgrpo_jax import charts, metrics, report_page as html
from pgrpo_jax.run_directory import RunDirectory, write_atomically

_COLOURS = ("#2f6fde", "#e07b1a", "#13936b", "#8452cf", "#cf3a60", "#5b6675")
_CURVES = (
    ("reward", "Reward of the sampled completions"), ("answered", "Completions that name exactly one candidate"),
    ("entropy", "Entropy of the policy"), ("kl", "KL to the reference policy"), ("length", "Length of a completion"),
    ("truncated", "Completions cut off by the token limit"), ("grad_norm", "Gradient norm before clipping"),
    ("dead_prompts", "Prompts whose completions all got one reward"), ("tokens_per_sec", "Speed of generation"),
)
_PANELS = (
    ("reward", "Reward", None), ("advantage_scale", "Advantage scale: \u03c3_G / \u03c3_p of Corollary 3.1, dashed = as GRPO", 1.0),
    ("bias", "Advantage bias: (\u03bc_G \u2212 \u03bc_p) / \u03c3_p of Corollary 3.1, dashed = as GRPO", 0.0),
)
_SECONDS = (("generation_secs", "generating", "#7fa8ee"), ("update_secs", "updating", "#f0b273"),
            ("checkpoint_secs", "waiting for checkpoints", "#b9a3e3"))
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


def write_report(runs: Sequence[epath.PathLike], out: epath.PathLike) -> epath.Path:
    """Writes one HTML page that compares runs.

    Args:
        runs: run directories (the --workdir of each run), finished or not; local or in a bucket.
        out: the file to write.

    Returns:
        The path of the file.

    Raises:
        FileNotFoundError: a directory does not exist.
        ValueError: no run is given, or a directory holds no run.
    """
    if not runs:
        raise ValueError("0 runs given, at least 1 is needed; pass the --workdir of a run")
    paths = [epath.Path(run) for run in runs]
    names = [path.name for path in paths]
    read = []
    for i, path in enumerate(paths):
        name = names[i] if names[i] and names.count(names[i]) == 1 else f"{i + 1}: {path}"
        read.append(read_run(path, name=name, colour=_COLOURS[i % len(_COLOURS)]))
    write_atomically(out, _page(read).encode("utf-8", "replace"))
    return epath.Path(out)


def read_run(path: epath.PathLike, *, name: str, colour: str = _COLOURS[0]) -> Run:
    """Reads one run directory.

    Args:
        path: the directory.
        name: what to call the run.
        colour: of its marks, a CSS colour.

    Returns:
        The run; evaluations come from its summary and, before it has one, from the evaluation records.

    Raises:
        FileNotFoundError: there is no such directory.
        ValueError: the directory holds no run.
    """
    if not epath.Path(path).exists():
        raise FileNotFoundError(f"{path} does not exist; pass the --workdir of a run")
    directory = RunDirectory(path)
    config, steps, summary = directory.config(), directory.metrics(), directory.summary()
    if config is None and not steps:
        raise ValueError(f"{path} is not a run directory: it holds neither config.json nor metrics.jsonl; pass the --workdir of a run")
    evaluations = directory.evaluations()
    final = (summary or {}).get("evaluation") or {}
    before = final.get("before") or next((record for record in evaluations if record["step"] == 0), None)
    after = final.get("after") or next((record for record in reversed(evaluations) if record["step"] > 0), None)
    return Run(name=name, colour=colour, config=config or {}, steps=steps, samples=directory.samples(), before=before, after=after,
               summary=summary)


def _page(runs: Sequence[Run]) -> str:
    legend = html.joined([html.tag("span", html.dot(run.colour), run.name, css="key") for run in runs])
    sections = (
        ("At a glance", "What was learned beyond the format of an answer, on users that were never trained on.", _cards(runs)),
        ("Held-out evaluation", "Reward given an answer minus random choice with its 95 % interval: an interval right of 0 is a preference "
         "learned. Hollow = before training, filled = after.", _evaluations(runs)),
        ("Learning curves", "Training batches, one point for each update; small print: mean of the first tenth of the updates "
         "\u2192 mean of the last.", _learning_curves(runs)),
        ("Preference by preference", "Who gains and who is left behind, and how far P-GRPO's advantage is from GRPO's.", _preference_panels(runs)),
        ("Where the time went", "Wall time of each run; the rest is start, compilation and evaluation.", _time_split(runs)),
        ("What the policy said", "Samples of the first and the last recorded update, highest advantage first.", _samples(runs)),
        ("Configurations", "Only the keys that differ are compared; each run's whole configuration is folded away below.", _configs(runs)),
    )
    title = "What the run learned" if len(runs) == 1 else "What the runs learned, side by side"
    return html.page(title, legend, sections)


def _cards(runs: Sequence[Run]) -> html.Markup:
    cards = []
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
            ("worst preference group", f"{after.get('worst_preference_group', 'n/a')} (gap to the best {metrics.number(after.get('gap'))} reward)"),
            ("state_sha256", html.tag("code", str(summary.get("state_sha256", "n/a"))[:16])),
            ("reproducible", {True: "yes", False: "no"}.get(summary.get("reproducible"), "n/a")),
        ]
        head = html.tag("h3", html.dot(run.colour), run.name, " ", html.tag("span", status, css="pill" if finished else "pill open"))
        cards.append(html.tag("div", head, html.tag("p", metrics.verdict(run.before, run.after), css="verdict"), html.facts(pairs), css="card"))
    return html.tag("div", *cards, css="grid")


def _evaluations(runs: Sequence[Run]) -> html.Markup:
    evaluated = [run for run in runs if run.before or run.after]
    if not evaluated:
        return html.Markup()
    return html.joined([html.tag("div", html.image(_interval_chart(evaluated), "reward given an answer minus random choice, with intervals"), css="card")]
                       + [html.tag("div", _evaluation_table(run), css="card") for run in evaluated])


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
    for key, label in (("random", "baseline: random choice"), ("popular", "baseline: most popular candidate")):
        rows.append([label, "", "", "", metrics.number(baselines.get(key)), "", ""])
    header = ("preference group", "prompts", "answer rate", "reward", "reward given an answer", "over random choice [95 %]", "first candidate")
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
