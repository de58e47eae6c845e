"""Evaluates the newest checkpoint of a run: python launch/evaluate.py --config=configs/NAME.py --workdir=DIR [--config.key=value ...]

The configuration is the run's; --config.evaluation.* may differ from it. The result is shown and kept as WORKDIR/evaluation_STEP.json.

Exit status: 0 evaluated, 75 stopped, 1 an error, said in one line.
"""

import functools
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from pgrpo_jax.preemption import Stop  # noqa: E402

# Before the heavy imports: a SIGTERM that arrives while they run is honoured as well.
STOP = Stop().install()

from launch import command_line  # noqa: E402
from pgrpo_jax.evaluate import evaluate_run  # noqa: E402

if __name__ == "__main__":
    command_line.run(functools.partial(evaluate_run, stop=STOP))
