"""Writes one self-contained HTML page that compares runs.

    python launch/report.py RUN [RUN ...] [--out=FILE]

RUN is the --workdir of a run, finished or not; FILE is RUN/report.html of the first run unless given.
"""

import pathlib
import sys
from typing import Sequence

from absl import app
from absl import flags
from etils import epath

# So that the program works from any directory, whether or not the package is installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from pgrpo_jax.report import write_report  # noqa: E402  (needs the path above)

_OUT = flags.DEFINE_string("out", None, "file to write; report.html of the first run if unset")


def main(argv: Sequence[str]) -> None:
    """Writes the report and prints its path; a directory that holds no run is one line on standard error and exit status 1."""
    runs = argv[1:]
    if not runs:
        raise app.UsageError("0 runs given, at least 1 is needed: python launch/report.py RUN [RUN ...] [--out=FILE]")
    try:
        path = write_report(runs, _OUT.value or epath.Path(runs[0]) / "report.html")
    except (ValueError, OSError) as error:
        sys.exit(f"report: {error}")
    print(path)


if __name__ == "__main__":
    app.run(main)
