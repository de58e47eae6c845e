"""Trains a policy: python launch/train.py --config=configs/NAME.py --workdir=DIR [--config.key=value ...]

Exit status: 0 finished, 75 stopped and saved (run the same command to go on), 1 an error, said in one line.
"""

import functools
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from pgrpo_jax.preemption import Stop  # noqa: E402

# Before the heavy imports: a SIGTERM that arrives while they run is honoured as well.
STOP = Stop().install()

from launch import command_line  # noqa: E402
from pgrpo_jax.train import train  # noqa: E402

if __name__ == "__main__":
    command_line.run(functools.partial(train, stop=STOP))
