"""Checkpoints of a whole training state, against a plain write of as many bytes: how long training is held up, and the memory it takes."""

import os
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np

from launch.benchmarks.timing import secs
from launch.benchmarks.update import OPTIMISER
from launch.benchmarks.work import model_config
from launch.peers.job import Job
from pgrpo_jax import parallel
from pgrpo_jax.algorithms import reward_history
from pgrpo_jax.checkpoints import Checkpoints
from pgrpo_jax.models import transformer
from pgrpo_jax.models.config import ModelConfig
from pgrpo_jax.structs import TrainState
from pgrpo_jax.train_state import initial_state

_SELF = pathlib.Path("/proc/self")  # on Linux
_FORGET_PEAK = "5"  # proc(5): resets VmHWM


class Memory:
    """Host memory of this process beyond what it held at first, as Linux counts it."""

    def __init__(self):
        (_SELF / "clear_refs").write_text(_FORGET_PEAK)
        self._before = _status_bytes("VmRSS")

    def extra_bytes(self) -> int:
        """Returns the most that was held since, less what was held then."""
        return max(0, _status_bytes("VmHWM") - self._before)


def _status_bytes(name: str) -> int:
    lines = (_SELF / "status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def plain_write(state: Any, path: pathlib.Path) -> None:
    """Writes the bytes of every array into one file, durably."""
    with path.open("wb") as file:
        for leaf in jax.tree.leaves(state):
            file.write(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))
        file.flush()
        os.fsync(file.fileno())


def make_state(config: ModelConfig) -> TrainState:
    """Returns a training state whose weights and moments are all random: what they are before the first update compresses to nothing."""
    model, rng = transformer.Transformer(config), np.random.default_rng(0)
    mesh = parallel.make_mesh(jax.devices()[:1])
    state = initial_state(transformer.initialise(model, jax.random.key(0)), reward_history.init(1, np.float32), OPTIMISER, mesh)

    def drawn(leaf: jax.Array) -> jax.Array:
        return jax.device_put(rng.standard_normal(leaf.shape, leaf.dtype), leaf.sharding) if leaf.ndim else leaf

    trainable, optimiser = jax.tree.map(drawn, (state.trainable, state.optimiser))
    return state.replace(trainable=trainable, optimiser=optimiser)


def measure(rounds: int, config: ModelConfig = model_config(Job())) -> dict[str, list[float]]:
    """Returns seconds of saving, of committing, of restoring and of the plain write, and memory, round by round; a first one is not counted.

    Args:
        rounds: that count.
        config: sizes of the model.
    """
    state = make_state(config)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        plain, checkpoints = pathlib.Path(directory) / "plain", Checkpoints(pathlib.Path(directory) / "steps", identity={}, keep=1)
        try:
            for step in range(rounds + 1):
                state = state.replace(step=state.step + np.int32(1))
                measured = one_round(state, checkpoints, plain, size)
                for name, value in measured.items() if step else ():
                    found.setdefault(name, []).append(value)
        finally:
            checkpoints.close()
    return found | {"state, GB": [size / 1e9]}


def one_round(state: TrainState, checkpoints: Checkpoints, plain: pathlib.Path, size: int) -> dict[str, float]:
    """Writes a state plainly, saves it and restores it; `size` are its bytes. What is restored counts as memory of the restore, once the state."""
    plain_secs = secs(lambda: plain_write(state, plain))
    plain.unlink()
    memory = Memory()
    held_up_secs = secs(lambda: checkpoints.save(state, {}))
    committed_secs = held_up_secs + secs(lambda: checkpoints.save(state, {}, wait=True))  # the same step again only waits
    saved_extra = memory.extra_bytes() / size
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    memory = Memory()
    restored = []
    restore_secs = secs(lambda: restored.append(jax.block_until_ready(checkpoints.restore(like))))
    return {
        "plain write, s": plain_secs, "save holds up, s": held_up_secs, "until committed, s": committed_secs, "restore, s": restore_secs,
        "save holds up / plain write": held_up_secs / plain_secs, "until committed / plain write": committed_secs / plain_secs,
        "save, extra memory / state": saved_extra, "restore, extra memory / state": memory.extra_bytes() / size,
    }  # fmt: skip
