import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dcjax.sharding.mesh import MeshConfig, make_mesh
from dcjax.sharding.rules import RULES, batch_sharding, mesh_axes, partition_spec, replicated, shardings, split


def test_logical_axes_become_mesh_axes():
    assert partition_spec(PartitionSpec("layers", "embed", "heads")) == PartitionSpec(None, "fsdp", "tensor")
    assert partition_spec(PartitionSpec("batch", None)) == PartitionSpec(("data", "fsdp", "expert"), None)
    assert partition_spec(PartitionSpec()) == PartitionSpec()


def test_an_unknown_axis_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'head' has no rule") as error:
        partition_spec(PartitionSpec("embed", "head"))
    assert all(name in str(error.value) for name in RULES)


@pytest.mark.parametrize("axes", [("heads", "mlp"), ("batch", "embed"), ("embed", "layers", "embed")])
def test_two_axes_of_one_array_on_one_mesh_axis_are_refused_by_name(axes):
    with pytest.raises(ValueError, match="twice on a mesh axis") as error:
        partition_spec(PartitionSpec(*axes))
    assert all(repr(name) in str(error.value) for name in axes)


def test_every_rule_points_to_axes_that_the_mesh_has():
    names = set(make_mesh(MeshConfig()).axis_names)
    for axes in RULES.values():
        assert {axes} - {None} <= names if isinstance(axes, str | None) else set(axes) <= names


def test_a_tree_of_logical_axes_becomes_a_tree_of_shardings():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    logical = {"kernel": PartitionSpec("embed", "mlp"), "inner": [PartitionSpec("vocab", "embed"), PartitionSpec()]}
    placed = shardings(mesh, logical)
    assert placed["kernel"] == NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    assert placed["inner"] == [
        NamedSharding(mesh, PartitionSpec("tensor", "fsdp")),
        NamedSharding(mesh, PartitionSpec()),
    ]
    assert placed["kernel"].shard_shape((64, 12)) == (16, 12)


def test_a_wrong_axis_anywhere_in_a_tree_is_refused():
    with pytest.raises(ValueError, match="'expertise'"):
        shardings(make_mesh(MeshConfig()), {"a": PartitionSpec("embed"), "b": [PartitionSpec("expertise")]})


def test_a_batch_is_split_over_replicas_and_fsdp_and_scalars_are_everywhere():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    assert batch_sharding(mesh).shard_shape((16, 5)) == (2, 5)
    x = jnp.arange(3)
    held = [np.asarray(shard.data).tolist() for shard in jax.device_put(x, replicated(mesh)).addressable_shards]
    assert held == [[0, 1, 2]] * 8


def test_parts_of_a_logical_axis():
    sizes = {"data": 2, "fsdp": 3, "tensor": 5, "expert": 7, "context": 11}
    assert [split(sizes, name) for name in ("batch", "sequence", "heads", "layers")] == [42, 11, 5, 1]
    assert mesh_axes("saved_sequence") == ("context", "tensor")
    with pytest.raises(ValueError, match="'time' has no rule"):
        split(sizes, "time")
