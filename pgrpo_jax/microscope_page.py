"""Floor 5: what the advantage microscope shows: lines for the terminal, one HTML page, and JSON."""

import json
import math
from typing import Any, Mapping, Sequence

from etils import epath

from pgrpo_jax import charts, microscope_charts, microscope_measures, report_page as html
from pgrpo_jax.metrics import interval, number
from pgrpo_jax.microscope import MEANINGS, Table

_PROMPT_TAIL, _ANSWER_SHOWN = 90, 120
_SUPPRESSION_SHOWN = ("grpo", "dr_grpo", "reinforce_pp", "scale_only", "pooled", "placebo")


def findings(measured: Mapping[str, Any], notes: Sequence[str] = ()) -> list[str]:
    """Returns what was found, a sentence each, the check of the microscope itself first.

    Args:
        measured: of `microscope_measures.measure`.
        notes: what is to be known of the records, for example gaps.
    """
    check, dead, flips = measured["check"], measured["dead"], measured["flips"]
    lines = list(notes)
    if check["agrees"] is None:
        lines.append(f"The recorded advantages were not compared: {check['reason']}.")
    else:
        verdict = "are those recomputed under its configuration" if check["agrees"] else f"DIFFER from those recomputed, {check['reason']}"
        largest = check["largest_difference"]
        lines.append(f"Check: the {check['compared']} recorded advantages {verdict} (largest relative difference {largest:.1e}).")
    lines.append(f"{flips['count']} of {measured['completions']} completions ({100 * flips['share']:.1f} %) change sign between GRPO and P-GRPO: "
                 f"{flips['up']} are rewarded instead of punished, {flips['count'] - flips['up']} punished instead of rewarded.")
    lines.append(f"{dead['dead']} of {dead['prompts']} prompts ({100 * dead['share']:.0f} %) earn one reward throughout and teach GRPO nothing; "
                 f"{dead['warm']} of them meet a warm history, which gives {dead['revived']} a signal under P-GRPO.")
    return [*lines, _verdict(measured)]


def _verdict(measured: Mapping[str, Any]) -> str:
    records = measured["preference_groups"]
    if measured["warm_share"] == 0:
        return ("Every history was cold, so P-GRPO gives GRPO's advantages here: record more steps, or lower algorithm.min_count, to tell them "
                "apart.")
    found = microscope_measures.suppressed(records)
    basis = f"Over the {100 * measured['warm_share']:.0f} % of completions with a warm history, "
    if not found:
        return basis + "no preference group's share of GRPO's signal lies below its share of P-GRPO's by more than the 95 % interval over prompts."
    listed = ", ".join(
        f"{k} ({number(records[k]['suppression']['grpo']['mean'], 2)} {interval(records[k]['suppression']['grpo'], signed=False)})" for k in found
    )
    return basis + f"GRPO gives these preference groups a smaller share of its signal than P-GRPO does: {listed}."


def lines(measured: Mapping[str, Any], notes: Sequence[str] = ()) -> list[str]:
    """Returns everything for the terminal.

    Args:
        measured: of `microscope_measures.measure`.
        notes: as in `findings`.
    """
    header = f"{'preference group':>16} {'completions':>11} {'share':>6} {'scale':>6} {'bias':>6} {'GRPO':>6} {'P-GRPO':>6}  suppression under GRPO"
    rows = [header]
    for r in measured["preference_groups"]:
        under, signal = r["suppression"]["grpo"], r["signal_share"]
        rows.append(f"{r['preference_id']:>16} {r['completions']:>11} {number(r['share'], 2):>6} {number(r['scale'], 2):>6} {number(r['bias'], 2):>6} "
                    f"{number(signal['grpo'], 2):>6} {number(signal['p_grpo'], 2):>6}  {number(under['mean'], 2)} {interval(under, signed=False)}")
    flips = ["strongest flips (step, preference group, reward, GRPO, P-GRPO, answer)"]
    for f in measured["flips"]["strongest"][:8]:
        flips.append(f"  {f['step']:>4} {f['preference_id']:>2} {f['reward']:>6.2f} {f['grpo']:>+6.2f} {f['p_grpo']:>+6.2f}  {_one_line(f['answer'], 60)!r}")
    return [*findings(measured, notes), "", *rows, *(["", *flips] if len(flips) > 1 else [])]


def to_json(measured: Mapping[str, Any], notes: Sequence[str] = ()) -> bytes:
    """Returns all that was measured as JSON; a number that is not finite becomes null."""
    return (json.dumps(_finite({"notes": list(notes), "schemes": MEANINGS} | dict(measured)), indent=1, allow_nan=False) + "\n").encode("ascii")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def page(table: Table, measured: Mapping[str, Any], notes: Sequence[str] = (), *, source: str = "") -> str:
    """Returns one self-contained HTML page.

    Args:
        table: of `microscope.look`.
        measured: of `microscope_measures.measure`.
        notes: as in `findings`.
        source: what was looked at.
    """
    number_of = f"{measured['completions']} completions of {measured['prompts']} prompts, {len(measured['steps'])} updates"
    parts = (
        ("What was found", "The answers are those of one run's policy; another scheme would have led it elsewhere.", _findings(measured, notes)),
        ("GRPO against P-GRPO", "One spot for each pair of advantages, larger where many completions share it; shaded: the two disagree in sign.",
         _scatter(table)),
        ("Scale and bias", "P-GRPO's advantage is scale \u00d7 GRPO's + bias (Corollary 3.1); dashed = GRPO itself. Cold histories are left out.",
         html.tag("div", html.image(microscope_charts.terms(table.numbers, table.scale, table.bias), "scale and bias over the updates"), css="card")),
        ("Who gets the signal", "Signal = \u03a3|advantage|, over completions with a warm history; dotted = shares of the completions.",
         _signal(measured)),
        ("Suppression", "A preference group's share of the signal over its share under P-GRPO, with 95 % intervals by bootstrap over prompts: "
         "an interval left of 1 = suppressed. An interval that covers 1 says that these rollouts do not tell.", _suppression(measured)),
        ("Strongest flips", "Rewarded under one scheme and punished under the other, by the smaller of the two |advantages|.", _flips(measured)),
        ("How alike the schemes are", "Pearson's correlation of their advantages, over completions with a warm history.", _correlation(measured)),
        ("The schemes", "All with the cold start, floor and epsilon of the run's configuration.",
         html.tag("div", html.facts([(name, MEANINGS[name]) for name in table.advantages]), css="card")),
    )  # fmt: skip
    return html.page("Advantage microscope", f"{source}: {number_of}" if source else number_of, parts)


def _findings(measured: Mapping[str, Any], notes: Sequence[str]) -> html.Markup:
    return html.tag("div", *(html.tag("p", line) for line in findings(measured, notes)), css="card")


def _scatter(table: Table) -> html.Markup:
    axes = {"unit_x": "advantage under GRPO", "unit_y": "advantage under P-GRPO"}
    chart = microscope_charts.scatter(table.advantages["grpo"], table.advantages["p_grpo"], table.preference, **axes)
    return html.tag("div", html.image(chart, "advantages under GRPO and P-GRPO"), css="card")


def _signal(measured: Mapping[str, Any]) -> html.Markup:
    records = measured["preference_groups"]
    names = list(records[0]["signal_share"])
    signal = {name: [r["signal_share"][name] for r in records] for name in names}
    chart = html.image(microscope_charts.shares([r["share"] for r in records], signal), "shares of the signal by scheme")
    header = ["preference group", "completions", "share", "scale", "bias", *(f"|A| {name}" for name in names)]
    rows = [
        [r["preference_id"], r["completions"], number(r["share"], 3), number(r["scale"], 2), number(r["bias"], 2),
         *(number(r["mean_abs"][name], 2) for name in names)]
        for r in records
    ]  # fmt: skip
    means = html.table(header, rows, numeric=range(1, len(header)), caption="Mean |advantage| of a completion, by scheme")
    return html.joined([html.tag("div", chart, css="card"), html.tag("div", means, css="card")])


def _suppression(measured: Mapping[str, Any]) -> html.Markup:
    records = measured["preference_groups"]
    if measured["warm_share"] == 0:
        return html.Markup()
    rows = [[charts.Estimate(**r["suppression"][name]) for name in _SUPPRESSION_SHOWN] for r in records]
    return html.tag("div", html.image(microscope_charts.suppression(rows, _SUPPRESSION_SHOWN), "suppression by preference group"), css="card")


def _flips(measured: Mapping[str, Any]) -> html.Markup:
    strongest = measured["flips"]["strongest"]
    if not strongest:
        return html.Markup()
    header = ["update", "preference group", "prompt ends", "answer", "reward", "GRPO", "P-GRPO"]
    rows = [
        [f["step"], f["preference_id"], html.tag("span", "\u2026", _one_line(f["prompt"], -_PROMPT_TAIL), css="said small"),
         html.tag("span", _one_line(f["answer"], _ANSWER_SHOWN), css="said small"), number(f["reward"], 2), number(f["grpo"], 2, signed=True),
         number(f["p_grpo"], 2, signed=True)]
        for f in strongest
    ]  # fmt: skip
    return html.tag("div", html.table(header, rows, numeric=(0, 1, 4, 5, 6)), css="card")


def _correlation(measured: Mapping[str, Any]) -> html.Markup:
    names, values = measured["correlation"]["schemes"], measured["correlation"]["values"]
    rows = [[name, *(number(value, 2) for value in row)] for name, row in zip(names, values)]
    return html.tag("div", html.table(["", *names], rows, numeric=range(1, len(names) + 1)), css="card")


def _one_line(text: str, limit: int) -> str:
    """The first `limit` letters of a text as one line, or the last ones where `limit` is negative."""
    joined = " ".join(text.split())
    return joined[limit:] if limit < 0 else joined[:limit]


def write(path: epath.PathLike, content: bytes) -> None:
    """Writes a file whose directory is made."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
