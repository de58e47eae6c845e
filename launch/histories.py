"""The reward histories of a run that is not running: shown, without one user, or under another assignment of users.

    python launch/histories.py show RUN
    python launch/histories.py forget RUN --user=ID --out=NEW
    python launch/histories.py migrate RUN --preference_groups=RULE [--num_preference_groups=K] [--arm=ARM] --out=NEW

RUN is the --workdir of a run; it is left as it is. NEW is a run directory that launch/train.py goes on from. ID is a pseudonym, `user_id` of the
recorded prompts; RULE and ARM are values of task.preference_groups and algorithm.arm. Histories must be cumulative.
"""

import pathlib
import sys
from typing import Any, Sequence

from absl import app
from absl import flags
from absl import logging

# So that the program works from any directory, whether or not the package is installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from configs import base  # noqa: E402  (needs the path above)
from launch import run_config  # noqa: E402
from pgrpo_jax import histories  # noqa: E402

_USER = flags.DEFINE_string("user", None, "forget: pseudonym of the user")
_OUT = flags.DEFINE_string("out", None, "forget, migrate: the new run directory")
_RULE = flags.DEFINE_string("preference_groups", None, "migrate: task.preference_groups of the new run; unset = the old one's")
_COUNT = flags.DEFINE_integer("num_preference_groups", None, "migrate: task.num_preference_groups of the new run; unset = the old one's", lower_bound=1)
_ARM = flags.DEFINE_string("arm", None, "migrate: algorithm.arm of the new run; unset = the old one's")
_USAGE = "python launch/histories.py show | forget | migrate RUN [--user=ID] [--preference_groups=RULE] [--out=NEW]"
_COMMANDS = {"show": (), "forget": ("user", "out"), "migrate": ("out",)}


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
    saved = histories.restore(config, identity=base.identity(config), run=path)
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


def main(argv: Sequence[str]) -> None:
    """Runs a command; what can not be done is one line on standard error and exit status 1."""
    if len(argv) != 3 or argv[1] not in _COMMANDS:
        raise app.UsageError(f"a command and a run are needed: {_USAGE}")
    if missing := [name for name in _COMMANDS[argv[1]] if not flags.FLAGS[name].value]:
        raise app.UsageError(f"{argv[1]} needs --{' and --'.join(missing)}: {_USAGE}")
    logging.set_verbosity(logging.WARNING)  # libraries log every file they touch
    wanted = {"task.preference_groups": _RULE.value, "task.num_preference_groups": _COUNT.value, "algorithm.arm": _ARM.value}
    changes = {key: value for key, value in wanted.items() if value is not None}
    try:
        lines = run(argv[1], argv[2], user=_USER.value, out=_OUT.value, changes=changes)
    except (ValueError, OSError) as error:
        sys.exit("\n".join(f"error: {line}" for line in str(error).splitlines()))
    print("\n".join(lines))


if __name__ == "__main__":
    app.run(main)
