"""Trains a policy: python launch/train.py --config=configs/NAME.py --workdir=DIR [--config.key=value ...]

Exit status: 0 finished, 75 stopped and saved (run the same command to go on), 1 an error, said in one line.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from pgrpo_jax.preemption import Stop  # noqa: E402

# Before the heavy imports: a SIGTERM that arrives while they run is honoured as well.
STOP = Stop().install()

from absl import app, flags, logging  # noqa: E402
from ml_collections import config_flags  # noqa: E402

from configs import base  # noqa: E402
from pgrpo_jax.train import train  # noqa: E402

_CONFIG = config_flags.DEFINE_config_file("config", None, "configuration file", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "run directory; may be a bucket")


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: options are --config, --config.key=value and --workdir")
    if not flags.FLAGS["verbosity"].present:  # libraries log every file they touch; --verbosity=0 shows it
        logging.set_verbosity(logging.WARNING)
    try:
        return train(_CONFIG.value, identity=base.identity(_CONFIG.value), workdir=_WORKDIR.value, stop=STOP)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
