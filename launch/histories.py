"""The reward histories of a run that is not running: shown, without one user, or under another assignment of users.

    python launch/histories.py show RUN
    python launch/histories.py forget RUN --user=ID --out=NEW
    python launch/histories.py migrate RUN --preference_groups=RULE [--num_preference_groups=K] [--arm=ARM] --out=NEW

RUN is the --workdir of a run; it is left as it is. NEW is a run directory that launch/train.py goes on from. ID is a pseudonym, `user_id` of the
recorded prompts; RULE and ARM are values of task.preference_groups and algorithm.arm. Histories must be cumulative.
"""

import argparse
import pathlib
import sys
from typing import Any, Sequence

from absl import logging

# So that the program works from any directory, whether or not the package is installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from configs import base  # noqa: E402  (needs the path above)
from launch import run_config  # noqa: E402
from pgrpo_jax import histories, policies  # noqa: E402

_CHANGES = {"preference_groups": "task.preference_groups", "num_preference_groups": "task.num_preference_groups", "arm": "algorithm.arm"}


def run(command: str, path: str, *, user: str | None = None, out: str | None = None, changes: dict[str, Any] | None = None) -> list[str]:
    """Does what the command says.

    Args:
        command: "show", "forget" or "migrate".
        path: the run directory.
        user: of "forget".
        out: the new run directory.
        changes: of "migrate": {key: value} of the new configuration.

    Returns:
        Lines for the terminal.

    Raises:
        ValueError: see `pgrpo_jax.histories`.
        FileNotFoundError: there is no run, or no checkpoint.
    """
    config = run_config.read(path)
    saved = policies.restore(config, identity=base.identity(config), run=path)
    lines = [f"histories after {saved.learner.step} updates", *histories.table(saved.history)]
    if command == "forget":
        count = histories.forget(saved, user, out, identity=base.identity(config))
        lines = [
            f"{count} rewards of user {user} are out of the histories of {out}, and his prompts and answers out of its samples and rollouts.",
            "The weights were trained on his answers and still are: only the histories and records are without him.",
            "Metrics and evaluations are averages that he was part of. Training that goes on asks him again: take him out of the task's data first.",
        ]
    if command == "migrate":
        changed = run_config.read(path)
        changed.update_from_flattened_dict(changes or {})
        now = histories.migrate(saved, changed, out, identity=base.identity(changed))
        flags_of = " ".join(f"--config.{key}={value}" for key, value in (changes or {}).items())
        lines = [*histories.table(now), f"{out} goes on with the configuration of {path} and {flags_of or 'no change'}"]
    return lines


def main(arguments: Sequence[str]) -> int:
    """Runs a command; what can not be done is a line on standard error and exit status 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    show, forget, migrate = (commands.add_parser(name) for name in ("show", "forget", "migrate"))
    for command in (show, forget, migrate):
        command.add_argument("path", metavar="RUN", help="the run directory; left as it is")
    for command in (forget, migrate):
        command.add_argument("--out", required=True, help="the new run directory")
    forget.add_argument("--user", required=True, help="pseudonym of the user")
    for name, key in _CHANGES.items():
        kind = int if name == "num_preference_groups" else str
        migrate.add_argument(f"--{name}", type=kind, help=f"{key} of the new run; the old one's if unset")
    options = vars(parser.parse_args(arguments))
    changes = {key: options.pop(name) for name, key in _CHANGES.items() if options.get(name) is not None}
    known = {name: value for name, value in options.items() if name not in _CHANGES}
    logging.set_verbosity(logging.WARNING)  # libraries log every file they touch
    try:
        lines = run(**known, changes=changes)
    except (ValueError, OSError) as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
