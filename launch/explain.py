"""The advantage microscope: what GRPO, P-GRPO and their relatives would have made of recorded rollouts.

    python launch/explain.py RUN [--out=FILE] [--json=FILE]
    python launch/explain.py FILE.npz [FILE.npz ...] --out=FILE

RUN is the --workdir of a run, finished or not, or of launch/record.py; its page is RUN/explain.html unless given. Files are rollouts of one run;
without a run's config.json beside them the estimators have their defaults, and its own advantages are not checked.
"""

import argparse
import pathlib
import sys
from typing import Any, Sequence

from etils import epath

# So that the program works from any directory, whether or not the package is installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from launch import run_config  # noqa: E402  (needs the path above)
from pgrpo_jax import algorithm_settings, microscope, microscope_measures, microscope_page, settings  # noqa: E402
from pgrpo_jax.algorithms.advantages import AdvantageSettings  # noqa: E402
from pgrpo_jax.run_directory import RunDirectory  # noqa: E402


def explain(sources: Sequence[str], *, out: str | None, json: str | None = None, top: int = 20) -> list[str]:
    """Looks at recorded rollouts and writes the page.

    Args:
        sources: run directories or rollout files.
        out: the page; None = explain.html of the run.
        json: file for the numbers; None = none is written.
        top: sign flips listed.

    Returns:
        Lines for the terminal.

    Raises:
        FileNotFoundError: a source is missing.
        ValueError: the sources are no rollouts of one run, or there is nowhere to write.
    """
    run = _run_of(sources)
    if out is None and run is None:
        raise ValueError("no run directory is given to write explain.html to: add --out=FILE")
    page = epath.Path(run) / "explain.html" if out is None else epath.Path(out)
    steps = microscope.read_steps(sources)
    notes, samples, options = microscope.gaps(steps), None, {}
    if run is None:
        base = AdvantageSettings()
        notes.append(f"No config.json is beside the rollouts: cold start below {base.min_count:g} rewards, epsilon {base.epsilon:g}.")
    else:
        base, options, doubt = _of_run(run_config.read(run))
        samples, notes = RunDirectory(run).samples(), notes + doubt
    table = microscope.look(steps, base, **options)
    measured = microscope_measures.measure(table, samples, top=top)
    if json:
        microscope_page.write(json, microscope_page.to_json(measured, notes))
    html = microscope_page.page(table, measured, notes, source=" ".join(epath.Path(source).name for source in sources[:3]))
    microscope_page.write(page, html.encode("utf-8", "replace"))
    return [*microscope_page.lines(measured, notes), "", str(page)]


def _run_of(sources: Sequence[str]) -> epath.Path | None:
    """The one run directory with a configuration among the sources, or that the files lie in."""
    candidates = {source if source.is_dir() else source.absolute().parent.parent for source in map(epath.Path, sources)}
    found = [path for path in candidates if (path / "config.json").exists()]
    return found[0] if len(candidates) == len(found) == 1 else None


def _of_run(config: Any) -> tuple[AdvantageSettings, dict[str, Any], list[str]]:
    """Estimator, options of `microscope.look`, and what can not be recomputed of a run."""
    base, chosen = algorithm_settings.advantage_settings(config), algorithm_settings.preset(config)
    options: dict[str, Any] = {"num_preference_groups": settings.num_preference_groups(config), "seed": config.seed}
    if chosen.objective.kl_in == "reward" and chosen.kl_coefficient > 0:
        return base, options, ["The run paid its KL in the reward, which is not recorded: all advantages here are without it."]
    components = tuple(algorithm_settings.components(config))
    options["own"] = microscope.Own(base, algorithm_settings.curation(config), components)
    return base, options, []


def main(arguments: Sequence[str]) -> int:
    """Writes the page and says what was found; a source that is no record is one line on standard error and exit status 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", metavar="RUN_OR_FILE", help="a run directory, or rollout files of one run")
    parser.add_argument("--out", help="page to write; explain.html of the run if unset")
    parser.add_argument("--json", help="file for all numbers as JSON; none if unset")
    parser.add_argument("--top", type=int, default=20, help="sign flips listed")
    try:
        lines = explain(**vars(parser.parse_args(arguments)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
