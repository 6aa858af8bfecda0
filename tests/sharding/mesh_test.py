import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from dcjax.sharding.mesh import MeshConfig, by_host, make_mesh, over

AXES = ("data", "fsdp", "tensor", "expert", "context")


def test_one_device_has_every_axis():
    mesh = make_mesh(MeshConfig())
    assert dict(mesh.shape) == dict.fromkeys(AXES, 1)
    assert mesh.axis_types == (AxisType.Auto,) * len(AXES)


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 4}, {"tensor": 2, "context": 2}, {"expert": 3}])
def test_axes_get_their_sizes_and_the_first_devices(sizes):
    mesh = make_mesh(MeshConfig(**sizes))
    assert dict(mesh.shape) == dict.fromkeys(AXES, 1) | sizes
    assert sorted(d.id for d in mesh.devices.flat) == [d.id for d in jax.devices()[: mesh.size]]


def test_more_devices_than_there_are_is_refused_with_both_numbers():
    assert jax.device_count() == 8
    with pytest.raises(ValueError, match=r"needs 12 devices.*\b8\b") as error:
        make_mesh(MeshConfig(data=3, fsdp=4))
    # and says which fields to change
    assert "data" in str(error.value)
    assert "fsdp" in str(error.value)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("size", [0, -2])
def test_an_axis_below_one_is_refused_by_name_and_value(axis, size):
    with pytest.raises(ValueError, match=rf"mesh\.{axis} is {size}; it must be at least 1"):
        MeshConfig(**{axis: size})


def test_given_devices_are_used():
    chosen = jax.devices()[4:]
    assert set(make_mesh(MeshConfig(tensor=4), chosen).devices.flat) == set(chosen)
    with pytest.raises(ValueError, match="needs 8 devices; 4 found"):
        make_mesh(MeshConfig(tensor=8), chosen)


def test_fsdp_takes_the_devices_that_remain():
    assert over(MeshConfig(tensor=2, expert=8), 64) == MeshConfig(fsdp=4, tensor=2, expert=8)
    assert over(MeshConfig(fsdp=3), 8) == MeshConfig(fsdp=8)
    with pytest.raises(ValueError, match=r"devices is 24; it must be a multiple of 16"):
        over(MeshConfig(tensor=2, expert=8), 24)


def test_a_mesh_by_host_has_a_row_for_each():
    mesh = by_host(jax.devices()[::-1])
    assert dict(mesh.shape) == {"hosts": 1, "own": 8}
    np.testing.assert_array_equal(mesh.devices[0], jax.devices())
