"""A learner for the tests of the gang: counts updates, and fails, hangs or dies when it is told to. Importable in Ray's processes."""

import os
import pathlib
import time

import jax.numpy as jnp
import numpy as np


class ScriptedLearner:
    """Its state is a number, kept in a file at every save."""

    def __init__(self, folder, start_secs=0.0):
        time.sleep(start_secs)
        self._folder = pathlib.Path(folder)
        self.step = self.next_work = 0
        self.versions = {0: {"w": jnp.zeros(8, jnp.float32)}}

    def restore(self):
        saved = self._folder / "saved"
        if not saved.exists():
            return False
        self._at(int(saved.read_text()))
        return True

    def _at(self, step):
        self.step = self.next_work = step
        self.versions = {step: {"w": jnp.full(8, step, jnp.float32)}}

    def update(self, rollouts, *, next_work):
        (what,) = rollouts
        if what == "raise":
            raise FloatingPointError("loss = nan at step 1 is not finite: lower the learning rate")
        if what == "hang":
            time.sleep(600)
        if what == "die":
            os._exit(3)
        self._at(self.step + 1)
        return {"next_work": float(next_work or 0)}, np.arange(2.0)

    def save(self, *, wait):
        (self._folder / "saved").write_text(str(self.step))

    def offer(self, version):
        self.versions = {version: {"w": jnp.full(8, version, jnp.float32)}} | self.versions

    def digest(self):
        return f"digest of {self.step}"

    def close(self):
        (self._folder / "closed").touch()

    def pid(self):
        return os.getpid()
