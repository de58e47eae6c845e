"""Floor 1: how arrays and functions are laid out over devices, those of several processes included.

The learner's mesh has four axes: rows of a batch are split over ("data", "fsdp", "expert"), parameters and what the optimiser keeps for them over
("fsdp", "expert", "tp") by one table (`parameters.SHARDED_AXES`). An actor's model lies on devices of one process, split over "tp" alone.

`pmapped` is the only caller of `jax.pmap`, which JAX keeps in maintenance (it is itself jit + shard_map): should it go, that
one function is rewritten.
"""

import functools
from typing import Any, Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from pgrpo_jax.algorithms import advantages
from pgrpo_jax.algorithms.advantages import AdvantageSettings, Diagnostics
from pgrpo_jax.models.config import ModelConfig
from pgrpo_jax.models.mesh import ROWS
from pgrpo_jax.models.parameters import sharding_faults, SHARDED_AXES
from pgrpo_jax.structs import RewardHistory

AXIS = "devices"  # of `pmapped`

_WHOLE_BYTES = 1 << 26  # an array larger than this comes together layer by layer


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


def make_mesh(devices: Sequence[jax.Device], *, fsdp: int = 1, expert: int = 1, tp: int = 1) -> Mesh:
    """Arranges devices as a mesh ("data", "fsdp", "expert", "tp"), neighbours along "tp" closest together.

    Args:
        devices: of all processes, in the same order in each.
        fsdp: devices that share each parameter's "fsdp" axis.
        expert: devices that share the experts of each layer.
        tp: devices that share its "tp" axis. What is left, len(devices) / (fsdp * expert * tp), is "data".

    Raises:
        ValueError: the devices do not divide.
    """
    if min(fsdp, expert, tp) < 1 or len(devices) % (fsdp * expert * tp):
        raise ValueError(
            f"{len(devices)} devices do not divide into fsdp {fsdp} x expert {expert} x tp {tp}: set learner.mesh.fsdp, learner.mesh.expert "
            "and learner.mesh.tp so that their product divides the number of devices"
        )
    shape = (len(devices) // (fsdp * expert * tp), fsdp, expert, tp)
    return jax.make_mesh(shape, (*ROWS, "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 4, devices=tuple(devices))


def layout(tree: Any, mesh: Mesh) -> Any:
    """Returns the sharding of every array of a pytree: by the table where its last key names a parameter, else one copy on each device.

    So parameters, gradients, Adam's moments and published versions lie alike, and counters and histories lie everywhere.

    Args:
        tree: arrays or shapes; parameters under the names of `parameter_shapes`.
        mesh: of `make_mesh`, or one with some of its axes: what is split over another stays whole.
    """

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        name = path[-1].key if path and isinstance(path[-1], jax.tree_util.DictKey) else None
        axes = SHARDED_AXES.get(name, ())
        return NamedSharding(mesh, PartitionSpec(*(axis if axis in mesh.axis_names else None for axis in axes)))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def place(tree: Any, shardings: Any) -> Any:
    """Puts a pytree on devices. With several processes each has all of it, and puts there only what its own devices hold.

    Args:
        tree: NumPy arrays, or arrays on this process's devices.
        shardings: one for each leaf.
    """

    def put(leaf: Any, sharding: Sharding) -> jax.Array:
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree, shardings)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Puts a pytree on every device of a mesh."""
    return place(tree, jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), tree))


def shard_rows(tree: Any, mesh: Mesh, *, axis: int) -> Any:
    """Splits every array of a pytree over a mesh along one of its axes, which holds rows of a batch.

    Args:
        tree: host arrays, the same in every process, whose size along `axis` is a multiple of the product of the mesh's `ROWS`.
        mesh: of `make_mesh`.
        axis: the axis that is split.
    """
    return place(tree, jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec(*[None] * axis, ROWS)), tree))


def compiled(fn: Callable[..., Any], shardings: Any, *, donate_argnums: tuple[int, ...] = (), **static: Any) -> Callable[..., Any]:
    """Returns `jax.jit(fn)` with results that lie where they should; left to itself the compiler would choose, and layouts drift.

    Args:
        fn: a function of arrays, and of `static`.
        shardings: of its results, a prefix of their tree; None = the compiler's choice.
        donate_argnums: arguments whose memory is used again.
        static: keyword arguments, hashable. Equal ones give the same program, compiled once.
    """
    leaves, tree = jax.tree.flatten(shardings)
    return _compiled(fn, tree, tuple(leaves), donate_argnums, tuple(sorted(static.items())))


@functools.cache
def _compiled(fn: Any, tree: Any, shardings: tuple[Sharding, ...], donate_argnums: tuple[int, ...], static: tuple[tuple[str, Any], ...]):
    return jax.jit(functools.partial(fn, **dict(static)), out_shardings=tree.unflatten(shardings), donate_argnums=donate_argnums)


def whole(array: Any) -> Iterator[np.ndarray]:
    """Brings an array to the host of every process, in pieces whose bytes, one after the other, are the array's (row-major).

    One that is spread over processes comes together on the devices first, large stacks layer by layer. All processes must take all pieces.

    Args:
        array: a `jax.Array`, or anything that NumPy takes.
    """
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        yield np.asarray(jax.device_get(array))
    else:
        yield from (np.asarray(piece.addressable_data(0)) for piece in _gathered(array))


def on_hosts(tree: Any) -> Any:
    """Brings a pytree to the host of every process, whole; all processes must call it. None stays None."""
    return jax.tree.map(lambda x: np.concatenate([piece.reshape(-1) for piece in whole(x)]).reshape(np.shape(x)), tree)


def _gathered(array: jax.Array) -> Iterator[jax.Array]:
    """The array on every device of its mesh: at once, or by its first axis where it is large and that one is not split."""
    if array.is_fully_replicated:
        yield array
        return
    everywhere = NamedSharding(array.sharding.mesh, PartitionSpec())
    if array.nbytes <= _WHOLE_BYTES or array.sharding.shard_shape(array.shape)[0] < array.shape[0]:
        yield compiled(_identity, everywhere)(array)
        return
    for row in range(array.shape[0]):
        yield compiled(_row, everywhere)(array, np.int32(row))


def _identity(array: jax.Array) -> jax.Array:
    return array


def _row(array: jax.Array, row: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(array, row, 1)


def _join(pieces: Sequence[jax.Array]) -> jax.Array:
    return jnp.concatenate(pieces)


def actor_shardings(shapes: Any, *, model: ModelConfig, devices: Sequence[jax.Device]) -> Any:
    """Returns how an actor holds parameters: split over "tp" on several devices, as they are on one.

    Args:
        shapes: arrays or shapes under the names of `parameter_shapes`, some or all.
        model: the model's sizes.
        devices: the actor's, of this process.

    Returns:
        A tree of `jax.ShapeDtypeStruct` with shardings.

    Raises:
        ValueError: heads, hidden units or vocabulary do not divide by the number of devices.
    """
    if faults := sharding_faults(model, of="actor", fsdp=1, tp=len(devices)):
        raise ValueError(faults[0])
    if len(devices) == 1:
        shardings = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(devices[0]), shapes)
    else:
        shardings = layout(shapes, Mesh(np.array(devices), ("tp",)))
    return jax.tree.map(lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding), shapes, shardings)


def localise(weights: Any, *, model: ModelConfig, devices: Sequence[jax.Device]) -> Any:
    """Brings weights, wherever they lie, to an actor's devices in this process, one parameter after the other.

    Weights that are spread over several processes come together over the learner's devices, so all processes must call it at the same
    place. What already lies as wanted may be shared, not copied: nobody may donate it.

    Args:
        weights: parameters under the names of `parameter_shapes`, some or all, any dtype.
        model: the model's sizes.
        devices: the actor's, of this process.

    Returns:
        The same tree on `devices`, laid out as in `actor_shardings`.
    """

    def local(leaf: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf.is_fully_addressable:
            return jax.device_put(leaf, like.sharding)
        pieces = [jax.device_put(piece.addressable_data(0), like.sharding) for piece in _gathered(leaf)]
        joined = pieces[0] if len(pieces) == 1 else compiled(_join, like.sharding)(pieces)
        return jax.block_until_ready(joined)  # before the next one takes room for its own pieces

    return jax.tree.map(local, weights, actor_shardings(weights, model=model, devices=devices))


def advantage_kernel(
    settings: AdvantageSettings, devices: Sequence[jax.Device], *, num_prompts: int
) -> Callable[..., tuple[np.ndarray, RewardHistory, Diagnostics]]:
    """Builds the learner's advantage kernel: `advantages.estimate`, jitted and mapped over devices.

    The kernel is `kernel(rewards, prompt_index, preference_ids, history_ids, staleness, mask, history)`, arrays of this process's rows,
    [B] (rewards [B, C] with components), from the host or from devices, and the history that is the same everywhere. It pads the rows to
    a multiple of the local devices (with mask False), so that any B works, and returns host arrays: ([B] advantages, history after the
    batch, diagnostics). Host arrays, because the caller decides where state and batch live.

    With several processes every one calls the kernel with its own rows, equally many in each; `prompt_index` counts prompts
    over all of them, and all receive the same history and diagnostics.

    Args:
        settings: the estimator.
        devices: the devices of all processes, in the same order in each.
        num_prompts: P, over all processes.

    Returns:
        The kernel.

    Raises:
        ValueError: where none of the devices belongs to this process.
    """
    num_local = sum(device.process_index == jax.process_index() for device in devices)
    if num_local == 0:
        raise ValueError(f"0 of {len(devices)} devices are of process {jax.process_index()}, must be at least 1: pass jax.devices()")
    estimator = functools.partial(advantages.estimate, settings=settings, num_prompts=num_prompts, axis_name=AXIS)
    mapped = pmapped(estimator, devices=devices, in_axes=(0,) * 6 + (None,), out_axes=(0, None, None))

    def kernel(*arguments):
        *rows, history = arguments
        found, merged, diagnostics = jax.device_get(mapped(*[_shard_rows(x, num_local) for x in rows], jax.device_get(history)))
        return found.reshape(-1)[: len(rows[0])], merged, diagnostics

    return kernel


def over_processes(kernel: Callable[..., tuple[np.ndarray, Any, Any]], num_processes: int) -> Callable[..., tuple[np.ndarray, Any, Any]]:
    """Makes of an advantage kernel one that every process calls with the rows of *all*, and that returns the advantages of all.

    Args:
        kernel: of `advantage_kernel`.
        num_processes: processes whose devices it runs on.
    """
    if num_processes == 1:
        return kernel

    def of_all(*arguments):
        *rows, history = arguments
        own = [_shard_rows(x, num_processes)[jax.process_index()] for x in rows]
        found, merged, diagnostics = kernel(*own, history)
        return multihost_utils.process_allgather(found).reshape(-1)[: len(rows[0])], merged, diagnostics

    return of_all


def _shard_rows(values: Any, parts: int) -> np.ndarray:
    """[B, …] -> [parts, ceil(B / parts), …]; padding rows are 0, and False in a mask."""
    rows = np.asarray(values)
    padded = np.pad(rows, ((0, -len(rows) % parts), *[(0, 0)] * (rows.ndim - 1)))
    return padded.reshape(parts, -1, *rows.shape[1:])
