"""Which axes of a mesh split rows: counted by hand."""

import jax
import pytest

from pgrpo_jax.models import mesh as meshes


@pytest.mark.parametrize("rows, axes", [(8, ("data", "fsdp")), (4, ("data", "fsdp")), (6, None), (1, None)])
def test_rows_lie_over_all_axes_but_tp_where_they_divide(rows, axes):
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tp"))
    assert meshes.row_axes(mesh, rows) == axes


def test_an_actors_mesh_splits_no_rows():
    """Its only axis is "tp"."""
    assert meshes.row_axes(jax.make_mesh((8,), ("tp",)), 8) == ()


@pytest.mark.parametrize("axes, parts", [((), 1), (("tp",), 4), (("fsdp", "tp"), 8), (("fsdp", "expert"), 2)])
def test_an_axis_that_the_mesh_lacks_counts_one(axes, parts):
    assert meshes.size(jax.make_mesh((2, 4), ("fsdp", "tp")), *axes) == parts


def test_a_device_of_the_mesh_or_of_the_process():
    last = jax.devices()[-1]
    assert meshes.device(jax.make_mesh((1,), ("fsdp",), devices=[last])) == last
    assert meshes.device(None) == jax.devices()[0]
