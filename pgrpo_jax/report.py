"""Floor 5: one self-contained HTML page that compares runs, for example GRPO beside P-GRPO.

The page needs no network and no scripts. `report_sections.py` says what is on it, `charts.py` draws, `report_page.py` makes the HTML and
escapes what runs say.
"""

from typing import Sequence

from etils import epath

from pgrpo_jax import report_page as html, report_sections as sections
from pgrpo_jax.report_sections import Run
from pgrpo_jax.run_directory import RunDirectory, write_atomically

_COLOURS = ("#2f6fde", "#e07b1a", "#13936b", "#8452cf", "#cf3a60", "#5b6675")


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
    parts = (
        ("At a glance", "What was learned beyond the format of an answer, on users that were never trained on.", sections.cards(runs)),
        ("Held-out evaluation", "Reward given an answer minus random choice with its 95 % interval: an interval right of 0 is a preference "
         "learned. Hollow = before training, filled = after.", sections.evaluations(runs)),
        ("Learning curves", "Training batches, one point for each update; small print: mean of the first tenth of the updates "
         "\u2192 mean of the last.", sections.learning_curves(runs)),
        ("Preference by preference", "Who gains and who is left behind, and how far P-GRPO's advantage is from GRPO's.",
         sections.preference_panels(runs)),
        ("Alarms", "What fell, collapsed or drifted while training; value and bound as last recorded.", sections.alarms(runs)),
        ("Where the time went", "Wall time of each run; the rest is start, compilation and evaluation.", sections.time_split(runs)),
        ("What the policy said", "Samples of the first and the last recorded update, highest advantage first.", sections.samples(runs)),
        ("Configurations", "Only the keys that differ are compared; each run's whole configuration is folded away below.",
         sections.configs(runs)),
    )
    title = "What the run learned" if len(runs) == 1 else "What the runs learned, side by side"
    return html.page(title, legend, parts)
