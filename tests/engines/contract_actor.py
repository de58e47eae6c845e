"""The actor of the engines' tests: a cheap pure function of (weights, work) that can be held up and made to fail, in any process.

It speaks through files of a folder, so that a test can order events without a clock: "<phase> <index>" appears when a phase of a unit
begins ("generate 3", holding the process id), "<phase> <index> done" when it ends; a phase that is `held` waits for "open <phase> <index>".
"""

import dataclasses
import functools
import os
import pathlib
import time
from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from pgrpo_jax.structs import Prompt, Rollouts, Work

WIDTH = 4
DEADLINE_SECS = 120.0


@dataclasses.dataclass(frozen=True)
class ScriptedActor:
    """Generates and judges; picklable.

    Attributes:
        folder: where it speaks.
        held: phases that wait until they are opened, such as "generate 3".
        failures: phase -> message of the ValueError that it raises.
        deadly: phases that end the process.
    """

    folder: str
    held: frozenset[str] = frozenset()
    failures: Mapping[str, str] = dataclasses.field(default_factory=dict)
    deadly: frozenset[str] = frozenset()

    def generate(self, weights: Any, work: Work) -> tuple[Work, np.ndarray, list[str]]:
        """Returns the unit, what it earns and the devices it was computed on."""
        self._begin(f"generate {work.index}")
        computed = _weigh(weights, work.index)
        rewards, devices = np.asarray(computed), sorted(str(device) for device in computed.devices())
        self._end(f"generate {work.index}")
        return work, rewards, devices

    def judge(self, generated: tuple[Work, np.ndarray, list[str]]) -> Rollouts:
        """Returns the unit's rollouts."""
        work, rewards, devices = generated
        self._begin(f"judge {work.index}")
        rows = len(rewards)
        rollouts = Rollouts(
            work=work,
            prompt_records=(Prompt(f"prompt {work.index}", f"question {work.index}", 0, {"devices": devices}),),
            prompts=np.full((1, 3), work.index, np.int32),
            prompt_lengths=np.full(1, 3, np.int32),
            completions=np.full((rows, 2), work.version, np.int32),
            completion_lengths=np.full(rows, 2, np.int32),
            prompt_index=np.zeros(rows, np.int32),
            behaviour_log_probs=np.full((rows, 2), -1, np.float32),
            truncated=np.zeros(rows, bool),
            texts=tuple(f"answer {work.index}-{i}" for i in range(rows)),
            rewards=rewards,
            reward_components={"answered": np.ones(rows, np.float32)},
        )
        self._end(f"judge {work.index}")
        return rollouts

    def rollout(self, weights: Any, work: Work) -> Rollouts:
        """Generates and judges a unit."""
        return self.judge(self.generate(weights, work))

    def _begin(self, phase: str) -> None:
        (pathlib.Path(self.folder) / phase).write_text(str(os.getpid()))
        if phase in self.deadly:
            os._exit(3)
        if phase in self.failures:
            raise ValueError(self.failures[phase])
        if phase in self.held:
            wait_for(self.folder, f"open {phase}")

    def _end(self, phase: str) -> None:
        (pathlib.Path(self.folder) / f"{phase} done").touch()


@jax.jit
def _weigh(weights: Any, index: int) -> jax.Array:
    return weights["w"] * 2 + jnp.asarray(index, jnp.float32)


def wait_for(folder: str, name: str) -> None:
    """Waits until a file is there; "*" in its name stands for anything.

    Raises:
        TimeoutError: it does not come; named.
    """
    deadline = time.monotonic() + DEADLINE_SECS
    while not any(pathlib.Path(folder).glob(name)):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{name!r} did not happen within {DEADLINE_SECS} s")
        time.sleep(0.005)


def say(folder: str, name: str) -> None:
    """Makes a file: opens a phase that is held."""
    (pathlib.Path(folder) / name).touch()


def weights(version: int) -> dict[str, jax.Array]:
    """The weights of a version, as a learner would offer them."""
    return {"w": jnp.arange(WIDTH, dtype=jnp.float32) + 100 * version}


def expected_rewards(work: Work) -> list[float]:
    """What a unit earns with the weights of its version, computed by hand."""
    return [2.0 * (100 * work.version + i) + work.index for i in range(WIDTH)]


def like() -> dict[str, jax.ShapeDtypeStruct]:
    """What the weights look like in a process that fetches them: on its first device."""
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return {"w": jax.ShapeDtypeStruct((WIDTH,), jnp.float32, sharding=sharding)}


def maker(actor: ScriptedActor) -> functools.partial:
    """A picklable function without arguments that returns (actor, what its weights look like), for engines that start processes."""
    return functools.partial(_made, actor)


def _made(actor: ScriptedActor) -> tuple[ScriptedActor, dict[str, jax.ShapeDtypeStruct]]:
    return actor, like()
