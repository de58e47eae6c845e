"""Floor 5: the policies of a run, to be looked at: the one before training and the one of its newest checkpoint. Nothing is written."""

import dataclasses
from typing import Any, Mapping

import jax
import jax.numpy as jnp
from etils import epath

from pgrpo_jax import assembly, parallel, placement, settings
from pgrpo_jax.base_policy import Base
from pgrpo_jax.checkpoints import Checkpoints
from pgrpo_jax.learner import Learner
from pgrpo_jax.models import lora
from pgrpo_jax.run_directory import RunDirectory
from pgrpo_jax.structs import RewardHistory
from pgrpo_jax.tasks import Task


@dataclasses.dataclass(frozen=True)
class Saved:
    """What is read of a run.

    Attributes:
        config: every key of configs/base.py.
        base: the untrained policy.
        learner: restored from the newest checkpoint.
        directory: the run's records.
    """

    config: Any
    base: Base
    learner: Learner
    directory: RunDirectory

    @property
    def history(self) -> RewardHistory:
        """The reward histories of the checkpoint, on the host."""
        return jax.device_get(self.learner.state.history)


def restore(config: Any, *, identity: Mapping[str, Any], run: epath.PathLike, task: Task | None = None) -> Saved:
    """Reads the newest checkpoint of a run, verified; nothing is written.

    Args:
        config: the run's, every key of configs/base.py.
        identity: its identity keys, flat.
        run: the run directory, of a run that may still be training.
        task: of the configuration, loaded already; None = it is loaded.

    Raises:
        ValueError: the configuration can not be used here, or the checkpoint is corrupt or of another identity.
        FileNotFoundError: there is no checkpoint.
    """
    settings.check(config)
    saved = epath.Path(run) / "checkpoints"
    missing = f"no committed checkpoint in {saved}: give the --workdir of a run that has saved one"
    if not saved.exists():
        raise FileNotFoundError(missing)
    placement.check_devices(config, num_devices=len(jax.devices()))
    base = assembly.load_base(config, assembly.load_task(config) if task is None else task)
    checkpoints = Checkpoints(saved, identity=assembly.run_identity(config, identity, base), read_only=True)
    try:
        learner = assembly.make_learner(config, base, checkpoints)
        if not learner.restore():
            raise FileNotFoundError(missing)
    finally:
        checkpoints.close()
    return Saved(config, base, learner, RunDirectory(run))


def policy_of(learner: Learner) -> Any:
    """Returns the whole policy of a restored learner, adapters included, in the tree of `parameter_shapes`."""
    return lora.joined(learner.frozen, learner.state.trainable)


def published(config: Any, base: Base, params: Any) -> Any:
    """Returns a policy as actors hold it: on an actor's devices, what is trained in the type in which a learner publishes it.

    Args:
        config: every key of configs/base.py.
        base: its model's sizes are read.
        params: of `policy_of`, or likewise; from the host, or devices of this process.
    """
    trained = lora.trainable(base.model.config.lora, params)
    rounded = lora.joined(params, jax.tree.map(lambda x: jnp.asarray(x).astype(config.weights.dtype), trained))
    return parallel.localise(jax.tree.map(jnp.asarray, rounded), model=base.model.config, devices=jax.local_devices()[: config.actor.tp])


def adapter_of(config: Any, task: Task, preference_id: int | None) -> int:
    """Returns the adapter that answers a preference group: 0 where one policy answers everybody.

    Args:
        config: every key of configs/base.py.
        task: names the preference groups.
        preference_id: the preference group; None = none is named.

    Raises:
        ValueError: each preference group has its own, and none is named.
    """
    adapters = settings.adapters(config)
    if adapters is None or adapters.num_adapters == 1:
        return 0
    if preference_id is None:
        raise ValueError(f"each preference group has an adapter of its own: name one by --preference_group, of {_known(task)}")
    return preference_id


def find_preference_group(task: Task, named: str) -> int | None:
    """Returns the preference group of a number or a name; None for "".

    Raises:
        ValueError: there is none, or several have the name; the message lists all.
    """
    if not named:
        return None
    number = int(named) if named.isascii() and named.isdigit() else None
    found = [p for p, name in enumerate(task.preference_group_names) if (p == number if number is not None else name == named)]
    if len(found) != 1:
        problem = "is the name of several" if found else "is unknown"
        raise ValueError(f"--preference_group={named} {problem}: give a number, or the name in brackets, of {_known(task)}")
    return found[0]


def _known(task: Task) -> str:
    return ", ".join(f"{p} ({name})" for p, name in enumerate(task.preference_group_names))
