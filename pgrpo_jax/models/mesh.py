"""What the code of a model asks of the mesh that it runs on: which axes split the rows of a batch, and whose kernels are to be had."""

import math

import jax
from jax.sharding import Mesh

ROWS = ("data", "fsdp", "expert")  # the axes that split the rows of a batch


def size(mesh: Mesh, *axes: str) -> int:
    """Returns how many parts some axes split an array into; an axis that the mesh lacks counts 1."""
    return math.prod(mesh.shape.get(axis, 1) for axis in axes)


def row_axes(mesh: Mesh, rows: int) -> tuple[str, ...] | None:
    """Returns those of `ROWS` that the mesh has; None where `rows` rows do not divide, as those of the learner do: then all devices have all."""
    axes = tuple(axis for axis in ROWS if axis in mesh.axis_names)
    return axes if rows % size(mesh, *axes) == 0 else None


def device(mesh: Mesh | None) -> jax.Device:
    """Returns a device of the mesh, or where there is none of this process: they are all of a kind."""
    return jax.devices()[0] if mesh is None else mesh.devices.flat[0]
