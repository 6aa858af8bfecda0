"""Experts split over eight devices against all of them on one; journeys of rows against loops in NumPy."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from dcjax.models import ModelConfig, moe
from dcjax.models.layers import EXACT
from dcjax.models.layout import ONE_DEVICE
from dcjax.models.parallel import experts
from dcjax.models.parallel.forward import mesh_layout
from dcjax.sharding.mesh import MeshConfig, make_mesh

pytestmark = pytest.mark.heavy

DEVICES, EXPERTS, HIDDEN, WIDTH, K = 8, 8, 16, 8, 2
CONFIG = ModelConfig(
    hidden_size=HIDDEN, num_experts=EXPERTS, num_experts_per_tok=K, moe_intermediate_size=WIDTH, num_layers=1
)
MESHES = {
    "expert 8": MeshConfig(expert=8),
    "tensor 8": MeshConfig(tensor=8),
    "expert 4 × tensor 2": MeshConfig(expert=4, tensor=2),
    "fsdp 2 × expert 2 × context 2": MeshConfig(fsdp=2, expert=2, context=2),
    "data 2 × fsdp 2 × tensor 2": MeshConfig(data=2, fsdp=2, tensor=2),
}
EVERYDAY = ("expert 4 × tensor 2", "fsdp 2 × expert 2 × context 2")
MESHES_IN_TURN = [name if name in EVERYDAY else pytest.param(name, marks=pytest.mark.slow) for name in MESHES]
dot = partial(moe.grouped_dot, arithmetic=EXACT)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


SHAPES = {
    "router": (HIDDEN, EXPERTS),
    "experts_gate_proj": (EXPERTS, HIDDEN, WIDTH),
    "experts_up_proj": (EXPERTS, HIDDEN, WIDTH),
    "experts_down_proj": (EXPERTS, WIDTH, HIDDEN),
}
PARAMS = {name: normal(seed, *shape) for seed, (name, shape) in enumerate(SHAPES.items())}
X, UPSTREAM = normal(10, 8, 6, HIDDEN), normal(11, 8, 6, HIDDEN)


@cache
def program(name):
    layout = ONE_DEVICE if name is None else mesh_layout(make_mesh(MESHES[name]))

    def total(params, x, imposed):
        out, _ = moe.moe(CONFIG, params, x, dot, imposed, layout.mixture)
        return jnp.sum(out * UPSTREAM), out

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))


def assert_same(ours, theirs):
    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())

    (_, out), grads = ours
    (_, expected), expected_grads = theirs
    jax.tree.map(close, (out, grads), (expected, expected_grads))


def own_choices():
    return np.asarray(moe.route(CONFIG, PARAMS["router"], X)[0].experts)


@pytest.mark.parametrize("name", MESHES_IN_TURN)
def test_outputs_and_gradients_are_those_of_one_device(name):
    assert_same(program(name)(PARAMS, X, own_choices()), program(None)(PARAMS, X, own_choices()))


@pytest.mark.parametrize("name", MESHES_IN_TURN)
@pytest.mark.parametrize("favourites", [(0, 1), (7, 3)])
def test_no_token_is_dropped_where_all_choose_the_same(name, favourites):
    crowded = np.broadcast_to(np.array(favourites, np.int32), (*X.shape[:2], K))
    assert_same(program(name)(PARAMS, X, crowded), program(None)(PARAMS, X, crowded))


def test_the_favourites_need_more_room_than_the_choices_that_are_made():
    """So that the two tests above take one round and two, on four devices with two experts each."""
    for chosen, exceeds in ((own_choices(), False), (np.broadcast_to([0, 1], (*X.shape[:2], K)), True)):
        owned = np.bincount(chosen.reshape(-1) // 2, minlength=4)
        assert (owned.max() > experts.ROOM * chosen.size / 4) == exceeds


def test_experts_stay_where_they_are():
    """No device holds kernels of more than its own experts, and their widths are cut too."""
    text = program("expert 4 × tensor 2").lower(PARAMS, X, own_choices()).compile().as_text()
    inside = text[text.index("ENTRY") :]
    assert f"f32[{EXPERTS // 4},{HIDDEN},{WIDTH // 2}]" in inside
    assert f"f32[{EXPERTS},{HIDDEN},{WIDTH // 2}]" not in inside.replace("parameter", "")


COUNTS = st.lists(st.integers(0, 5), min_size=DEVICES * 16, max_size=DEVICES * 16).map(
    lambda counts: np.array(counts, np.int32).reshape(DEVICES, 16)
)
ROOM = 5 * 16 * DEVICES


def sorted_rows(counts):
    """Of each device its rows [N, 3], (sender, expert, number), sorted by expert and padded."""
    rows = np.full((DEVICES, 5 * 16, 3), -1, np.int32)
    for p in range(DEVICES):
        held = [(p, e, i) for e in range(16) for i in range(counts[p, e])]
        rows[p, : len(held)] = np.array(held).reshape(-1, 3)
    return rows


def owned_rows(counts):
    """What each device should receive: the rows of its two experts, by expert, then by sender."""
    rows = np.zeros((DEVICES, ROOM, 3), np.int32)
    for d in range(DEVICES):
        held = [(p, e, i) for e in (2 * d, 2 * d + 1) for p in range(DEVICES) for i in range(counts[p, e])]
        rows[d, : len(held)] = np.array(held).reshape(-1, 3)
    return rows


@cache
def journeys():
    mesh, whole = make_mesh(MeshConfig(expert=DEVICES)), PartitionSpec()

    def there_and_back(rows, counts):
        slices = experts.outward(counts)
        arrived = experts.exchange(rows[0], slices, ROOM, "expert")
        returned = experts.exchange(arrived, slices.back(), rows.shape[1], "expert")
        return arrived[None], returned[None]

    split = PartitionSpec("expert")
    mapped = jax.shard_map(
        there_and_back, mesh=mesh, in_specs=(split, whole), out_specs=(split, split), check_vma=False
    )
    return jax.jit(mapped)


@settings(max_examples=20)
@given(COUNTS, st.integers(1, 200))
def test_windows_have_every_row_once_and_where_it_lies(counts, room):
    """What device 3 receives in rounds, against all that it receives at once."""
    slices, receiver = experts.outward(jnp.asarray(counts)), 3
    whole = owned_rows(counts)[receiver][: counts[:, [6, 7]].sum()]
    found = []
    for first in range(0, len(whole), room):
        window = jax.tree.map(np.asarray, slices.window(jnp.int32(first), room))
        part = np.full((room, 3), -1)
        for sender in range(DEVICES):
            rows = sorted_rows(counts)[sender]
            for expert in (6, 7):
                start, size, place = (table[sender, expert] for table in window)
                part[place : place + size] = rows[start : start + size]
        assert (part[: len(whole) - first] >= 0).all()
        found.append(part[: len(whole) - first])
    np.testing.assert_array_equal(np.concatenate([np.zeros((0, 3), int), *found]), whole)


@settings(max_examples=20)
@given(COUNTS)
def test_rows_arrive_sorted_by_expert_and_come_back(counts):
    rows = sorted_rows(counts)
    arrived, returned = journeys()(rows, counts)
    np.testing.assert_array_equal(arrived, owned_rows(counts))
    np.testing.assert_array_equal(returned, np.where(rows < 0, 0, rows))


def ragged_all_to_all(operands, outs, starts, sizes, places, expected_sizes):
    """`jax.lax.ragged_all_to_all` of all devices, as its documentation describes it."""
    each = starts.shape[1] // len(operands)
    for sender, operand in enumerate(operands):
        for i in range(starts.shape[1]):
            receiver, count = i // each, sizes[sender, i]
            assert expected_sizes[receiver, sender * each + i % each] == count
            piece = operand[starts[sender, i] : starts[sender, i] + count]
            outs[receiver, places[sender, i] : places[sender, i] + count] = piece
    return outs


@settings(max_examples=20)
@given(COUNTS)
def test_the_ragged_collective_is_given_the_same_journeys(counts):
    slices = jax.tree.map(np.asarray, experts.outward(jnp.asarray(counts)))
    back = jax.tree.map(np.asarray, slices.back())
    rows = sorted_rows(counts)
    arrived = ragged_all_to_all(rows, np.zeros((DEVICES, ROOM, 3), np.int32), *slices, back.sizes)
    np.testing.assert_array_equal(arrived, owned_rows(counts))
    returned = ragged_all_to_all(arrived, np.zeros_like(rows), *back, slices.sizes)
    np.testing.assert_array_equal(returned, np.where(rows < 0, 0, rows))


@pytest.mark.parametrize(("platform", "ragged"), [("tpu", True), ("cuda", True), ("cpu", False)])
def test_the_ragged_collective_is_used_where_there_is_one(platform, ragged):
    counts = np.zeros((DEVICES, 16), np.int32)
    text = journeys().trace(sorted_rows(counts), counts).lower(lowering_platforms=(platform,)).as_text()
    assert ("ragged_all_to_all" in text) == ragged
    assert ("all_gather" in text) != ragged


def test_gathered_kernels_are_rounded_once_and_their_gradients_are_not():
    mesh, kernel = make_mesh(MeshConfig(fsdp=2)), normal(20, 1, 4, 3)
    upstream = normal(21, 1, 4, 3)

    def total(kernel, upstream):
        return jnp.sum(experts.gather(kernel, jnp.dtype(jnp.bfloat16), "fsdp", 1) * upstream, keepdims=True)

    split = PartitionSpec(None, "fsdp")
    mapped = jax.shard_map(
        jax.value_and_grad(lambda kernel, upstream: total(kernel, upstream)[0, 0, 0]),
        mesh=mesh,
        in_specs=(split, PartitionSpec()),
        out_specs=(PartitionSpec(), split),
        check_vma=False,
    )
    value, gradient = jax.jit(mapped)(kernel, upstream)
    rounded = np.asarray(kernel.astype(jnp.bfloat16), np.float32)
    np.testing.assert_allclose(value, np.sum(rounded * upstream), rtol=1e-6)
    # both devices' losses reach a kernel
    np.testing.assert_array_equal(gradient, 2 * upstream)
