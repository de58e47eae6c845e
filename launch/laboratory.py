"""The laboratory: all arms on a tabular policy in minutes, no model and no data needed (configs/laboratory.py, docs/experiments.md).

    python launch/laboratory.py arms [--seeds=200] [--out=DIR]     trains every arm in every regime and prints the tables
    python launch/laboratory.py choose [--seeds=200]               scores every option and learning rate on the seeds for choosing
    python launch/laboratory.py follow_up [--seeds=200] [--out=DIR]        the questions that the report raised, on fresh seeds
    python launch/laboratory.py off_policy [--out=DIR]             what stale rollouts cost: bias of every truncation, staleness x rate

`arms` and `follow_up` write report.json, differences.png and curves.png into DIR, runs/laboratory unless given, `off_policy` writes
off_policy.json and staleness.png; --only=NAME [--only=NAME …] trains these arms and the two baselines.
"""

import json
import pathlib
import sys
import time
from typing import Any, Mapping, Sequence

from absl import app
from absl import flags
from absl import logging
from etils import epath

# So that the program works from any directory, whether or not the package is installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from configs import laboratory as settings  # noqa: E402  (needs the path above)
from pgrpo_jax import laboratory_charts  # noqa: E402
from pgrpo_jax.laboratory import staleness, sweep, tables, truncation  # noqa: E402
from pgrpo_jax.laboratory.training import Arm  # noqa: E402

_SEEDS = flags.DEFINE_integer("seeds", len(settings.REPORT_SEEDS), "how many seeds, from the first on", lower_bound=2)
_OUT = flags.DEFINE_string("out", "runs/laboratory", "directory to write to")
_ONLY = flags.DEFINE_multi_string("only", [], "an arm to train; all if none is named")
_THREADS = flags.DEFINE_integer("threads", 2, "arms trained at a time; changes no number", lower_bound=1)
_SHOWN = ("smallest_early", "smallest_final", "mean_early", "mean_final")


def _seeds(fixed: range) -> range:
    return range(fixed.start, fixed.start + _SEEDS.value)


def _arms() -> None:
    _compare(settings.ARMS, settings.REGIMES, settings.REPORT_SEEDS)


def _follow_up() -> None:
    _compare(settings.FOLLOW_UP_ARMS, settings.FOLLOW_UP_REGIMES, settings.FOLLOW_UP_SEEDS)


def _compare(arms: Mapping[str, Arm], regimes: Mapping[str, Any], seeds: range) -> None:
    """Trains the arms, prints the tables, writes the report and the charts."""
    arms = {name: arm for name, arm in arms.items() if not _ONLY.value or name in (*sweep.BASELINES, *_ONLY.value)}
    start = time.monotonic()
    outcomes = sweep.run(arms, regimes, _seeds(seeds), settings.BUDGET, num_threads=_THREADS.value)
    secs = time.monotonic() - start
    report = sweep.report(outcomes, regimes, settings.BUDGET, tolerance=settings.TOLERANCE)
    out = epath.Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(report, indent=1))
    (out / "differences.png").write_bytes(laboratory_charts.differences(report))
    drawn = [name for name in settings.DRAWN if name in outcomes]
    (out / "curves.png").write_bytes(laboratory_charts.curves(outcomes, list(regimes), drawn))
    for name in _SHOWN:
        print(f"\n{name.replace('_', ', ')}\n\n{tables.measure(report, name)}")
    for arm in sweep.BASELINES:
        print(f"\ninstruments of {arm}\n\n{tables.instruments(report, arm)}")
    print(f"\nfinal, against the baselines\n\n{tables.summary(report)}\n\n{tables.verdict(report, tolerance=settings.TOLERANCE)}")
    print(f"\n{len(outcomes)} arms, {len(regimes)} regimes, {_SEEDS.value} seeds: {secs:.0f} s; report and charts in {out}")


def _off_policy() -> None:
    """Prints the table of biases and the maps of staleness and learning rate, writes the report and the chart."""
    start = time.monotonic()
    errors = truncation.table(settings.CORRECTIONS, settings.DISTANCES, settings.CORRECTION_SEEDS, settings.TRUNCATION_SIZES)
    print(f"\nbias, deviation of one completion (both over the norm of the on-policy gradient)\n\n{tables.errors(errors)}")
    grid = (settings.STALENESSES, settings.STALENESS_LEARNING_RATES)
    found = staleness.sweep(settings.TREATMENTS, *grid, settings.STALENESS_SEEDS, settings.STALENESS_BUDGET, num_threads=_THREADS.value)
    rewards = staleness.report(found, *grid)
    for rate in settings.STALENESS_LEARNING_RATES:
        print(f"\nfinal reward by staleness, learning rate {rate:g}\n\n{tables.staleness(rewards, f'{rate:g}')}")
    out = epath.Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    (out / "off_policy.json").write_text(json.dumps({"errors": errors, "staleness": rewards}, indent=1))
    (out / "staleness.png").write_bytes(laboratory_charts.staleness(rewards))
    print(f"\n{time.monotonic() - start:.0f} s; report and chart in {out}")


def _choose() -> None:
    """Scores every option and learning rate; the best of each arm belongs into CHOSEN of configs/laboratory.py."""
    scores = sweep.choose(
        settings.OPTIONS, settings.LEARNING_RATES, settings.REGIMES, _seeds(settings.CHOICE_SEEDS), settings.BUDGET,
        num_threads=_THREADS.value,
    )
    for arm, each in scores.items():
        print(f"{arm!r}: {next(iter(each))},")
        for (option, rate), score in each.items():
            print(f"    # {score:.4f}  learning rate {rate:g}  {option}")


COMMANDS = {"arms": _arms, "choose": _choose, "follow_up": _follow_up, "off_policy": _off_policy}


def main(argv: Sequence[str]) -> int:
    """Runs one command; what is wrong with the command line is one line on standard error, and the exit status is 1."""
    logging.set_verbosity(logging.WARNING)
    known = settings.ARMS | settings.FOLLOW_UP_ARMS
    unknown = sorted(set(_ONLY.value) - set(known))
    if len(argv) != 2 or argv[1] not in COMMANDS:
        print(f"error: command {' '.join(argv[1:])!r} is unknown: give one of {', '.join(COMMANDS)}", file=sys.stderr)
    elif unknown:
        print(f"error: arm {unknown[0]!r} is unknown: give one of {'; '.join(known)}", file=sys.stderr)
    else:
        COMMANDS[argv[1]]()
        return 0
    return 1


if __name__ == "__main__":
    app.run(main)
