"""Floor 1: how arrays and functions are laid out over devices.

`pmapped` is the only caller of `jax.pmap`, which JAX keeps in maintenance (it is itself jit + shard_map): should it go, that
one function is rewritten.
"""

import functools
from typing import Any, Callable, Sequence

import jax
import numpy as np

from pgrpo_jax.algorithms.advantages import Diagnostics, Estimator
from pgrpo_jax.structs import RewardHistory

AXIS = "devices"


def pmapped(
    fn: Callable[..., Any], *, devices: Sequence[jax.Device], in_axes: Any = 0, out_axes: Any = 0, axis_name: str = AXIS
) -> Callable[..., Any]:
    """Compiles a function that runs once on each device, its collectives over `axis_name`.

    Args:
        fn: function of per-device arrays.
        devices: the devices of *all* processes, in the same order in each; a mapped argument has one row for each of this
            process's own.
        in_axes: for each argument, 0 (mapped) or None (the same value on every device).
        out_axes: likewise for the results; None returns the value of the first device.
        axis_name: the name collectives use.

    Returns:
        The compiled function. It compiles anew for each shape of its arguments.
    """
    return jax.pmap(fn, axis_name=axis_name, in_axes=in_axes, out_axes=out_axes, devices=tuple(devices))


def data_mesh(devices: Sequence[jax.Device]) -> jax.sharding.Mesh:
    """Returns a mesh of one axis, over which a batch is split and parameters are replicated."""
    return jax.sharding.Mesh(np.array(devices), (AXIS,))


def replicate(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Puts a pytree on every device of a mesh."""
    return jax.device_put(tree, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))


def shard_rows(tree: Any, mesh: jax.sharding.Mesh, *, axis: int) -> Any:
    """Splits every array of a pytree over a mesh along one of its axes.

    Args:
        tree: arrays whose size along `axis` is a multiple of the number of devices.
        mesh: of `data_mesh`.
        axis: the axis that is split.
    """
    spec = jax.sharding.PartitionSpec(*[None] * axis, AXIS)
    return jax.device_put(tree, jax.sharding.NamedSharding(mesh, spec))


def advantage_kernel(
    estimator: Estimator, devices: Sequence[jax.Device], *, num_prompts: int, epsilon: float, std_floor: float, min_count: int
) -> Callable[..., tuple[np.ndarray, RewardHistory, Diagnostics]]:
    """Builds the learner's advantage kernel: an estimator, jitted and mapped over devices.

    The kernel is `kernel(rewards, prompt_index, preference_ids, mask, history)`, flat [B] arrays of this process's rows, from
    the host or from devices, and the history that is the same everywhere. It pads the rows to a multiple of the local devices
    (with mask False), so that any B works, and returns host arrays: ([B] advantages, merged history, diagnostics). Host
    arrays, because the caller decides where state and batch live.

    With several processes every one calls the kernel with its own rows, equally many in each; `prompt_index` counts prompts
    over all of them, and all receive the same history and diagnostics.

    Args:
        estimator: a value of `advantages.ESTIMATORS`.
        devices: the devices of all processes, in the same order in each.
        num_prompts: P, over all processes.
        epsilon: as in `advantages.p_grpo`, like the next two.
        std_floor: smallest deviation of a history, reward units.
        min_count: past rewards a history needs before it is used.

    Returns:
        The kernel.

    Raises:
        ValueError: where none of the devices belongs to this process.
    """
    num_local = sum(device.process_index == jax.process_index() for device in devices)
    if num_local == 0:
        raise ValueError(f"0 of {len(devices)} devices are of process {jax.process_index()}, must be at least 1: pass jax.devices()")
    options = {"num_prompts": num_prompts, "epsilon": epsilon, "std_floor": std_floor, "min_count": min_count}
    mapped = pmapped(
        functools.partial(estimator, **options, axis_name=AXIS), devices=devices, in_axes=(0, 0, 0, 0, None), out_axes=(0, None, None)
    )

    def kernel(rewards, prompt_index, preference_ids, mask, history):
        sharded = [_shard_rows(x, num_local) for x in (rewards, prompt_index, preference_ids, mask)]
        advantages, merged, diagnostics = jax.device_get(mapped(*sharded, jax.device_get(history)))
        return advantages.reshape(-1)[: len(rewards)], merged, diagnostics

    return kernel


def _shard_rows(values: Any, num_devices: int) -> np.ndarray:
    """[B] -> [num_devices, ceil(B / num_devices)]; padding rows are 0, and False in a mask."""
    rows = np.asarray(values)
    return np.pad(rows, (0, -len(rows) % num_devices)).reshape(num_devices, -1)
