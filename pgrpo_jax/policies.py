"""Floor 5: the policies of a run, to be looked at: the one before training and the one of its newest checkpoint. Nothing is written."""

import dataclasses
from typing import Any, Mapping

import jax
import jax.numpy as jnp
from etils import epath

from pgrpo_jax import assembly, parallel, placement, settings
from pgrpo_jax.checkpoints import Checkpoints
from pgrpo_jax.learner import Learner
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
    base: assembly.Base
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


def policy_of(learner: Learner, *, preference_id: int | None = None) -> Any:
    """Returns the parameters that answer the users of a preference group, in the tree of `parameter_shapes`.

    The one place where a training state becomes a model: one policy answers everybody, so they are the same for all.

    Args:
        learner: restored.
        preference_id: the preference group; None = whoever asks.
    """
    del preference_id
    return learner.state.trainable


def published(config: Any, base: assembly.Base, params: Any) -> Any:
    """Returns a policy as a learner publishes it, on an actor's devices.

    Args:
        config: every key of configs/base.py.
        base: its model's sizes are read.
        params: from the host, or devices of this process.
    """
    rounded = jax.tree.map(lambda x: jnp.asarray(x).astype(config.weights.dtype), params)
    return parallel.localise(rounded, model=base.model.config, devices=jax.local_devices()[: config.actor.tp])
