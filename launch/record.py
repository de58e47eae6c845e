"""Records what the untrained policy answers: python launch/record.py --config=configs/NAME.py --workdir=DIR [--config.key=value ...]

Rollouts of the first `num_steps` updates, judged, and DIR/difficulty.json; no learner. Look at them with launch/explain.py DIR.

Exit status: 0 recorded, 75 stopped (run the same command to go on), 1 an error, said in one line.
"""

import functools
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from pgrpo_jax.preemption import Stop  # noqa: E402

# Before the heavy imports: a SIGTERM that arrives while they run is honoured as well.
STOP = Stop().install()

from launch import command_line  # noqa: E402
from pgrpo_jax.record import record  # noqa: E402

if __name__ == "__main__":
    command_line.run(functools.partial(record, stop=STOP))
