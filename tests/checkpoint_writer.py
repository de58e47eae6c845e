"""A process that dies while it saves: python checkpoint_writer.py DIRECTORY PATTERN, as soon as there is a file below PATTERN.

Step 1 is committed; step 2 refers to weight version 1, which comes first.
"""

import os
import pathlib
import signal
import sys
import threading
import time

import jax.numpy as jnp
import numpy as np

from pgrpo_jax.checkpoints import Checkpoints
from pgrpo_jax.structs import TrainState


def state(step: int, size: int) -> TrainState:
    """A state whose values are a function of its step; `size` float32 parameters."""
    values = jnp.asarray(np.random.default_rng(step).normal(size=size), jnp.float32)
    return TrainState(step=jnp.int32(step), next_work=jnp.int32(2 * step), trainable={"w": values}, optimiser=(), history={}, objective={})


SIZE = 4_000_000  # 16 MB: long enough in the writing to die in it


def die_while_writing(directory: pathlib.Path, pattern: str) -> None:
    """SIGKILLs this process as soon as anything that the pattern tells is on the disk."""
    while True:
        if any(p.is_file() for path in directory.glob(pattern) for p in path.rglob("*")):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.001)


if __name__ == "__main__":
    where, when = pathlib.Path(sys.argv[1]), sys.argv[2]
    checkpoints = Checkpoints(where, identity={"of": "tests"})
    checkpoints.save(state(1, SIZE), {}, wait=True)
    threading.Thread(target=die_while_writing, args=(where, when), daemon=True).start()
    checkpoints.save(state(2, SIZE), {1: state(1, SIZE).trainable}, wait=True)
