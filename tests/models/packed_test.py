"""Scores of packed rows against those of rows as they are: numbers, gradients, routers, candidates, devices."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from batches import grouped_batch
from by_rows import score_by_rows
from compiling import UNOPTIMISED

from dcjax.models import packed_logps
from dcjax.models.parallel.forward import mesh_layout
from dcjax.rl import Packing
from dcjax.sharding.mesh import MeshConfig, make_mesh
from dcjax.types import Bins

pytestmark = pytest.mark.heavy

P, T, G = tiny.PROMPT_LENGTH, tiny.RESPONSE_LENGTH, 4
BINS = Bins(3 * T, T, T, 10)
MASKED = {
    "shared, with a narrow last bin": Bins(2 * T + P, T, P, 10, shared=True),
    "halved for short rows": Bins(4 * T, T, T // 2, 16, halvings=1, shared=True),
}
MODELS = {"dense": tiny.DENSE, "experts": tiny.EXPERTS}
QUANTITIES = {"collision": lambda distributions: jnp.sum(jnp.exp(2 * distributions.log_probs), axis=-1)}


def random_rows(rows=16, **extra):
    """Groups with a prompt in common, one of them of a single token, and a response of no token."""
    batch = grouped_batch(rows=rows, group_size=G, vocab_size=20, prompt_length=P, response_length=T)
    mask = batch.attention_mask.copy()
    mask[G : 2 * G, : P - 1] = False
    mask[3, P:] = False
    mask[rows // 2 :, P + T // 2 :] = False
    temperature = np.repeat(np.array([1.0, 0.7, 1.3, 1.0], np.float32), rows // 4)
    return dataclasses.replace(batch, attention_mask=mask, response_mask=mask[:, P:], temperature=temperature, **extra)


def compiled(function, *args):
    return jax.jit(function).lower(*args).compile(UNOPTIMISED)(*args)


def loss_of(weights, scores):
    """One that every score has a part in."""
    return jnp.sum(weights * (scores.logps + 0.3 * scores.entropy + 0.1 * scores.quantities["collision"]))


def by_rows(model, batch, weights, params):
    scores = score_by_rows(model, params, batch, QUANTITIES)
    return loss_of(weights, scores), scores


def in_bins(model, bins, layout, batch, places, weights, params):
    scores = packed_logps(model, params, batch, places=places, bins=bins, quantities=QUANTITIES, layout=layout)
    return loss_of(weights, scores), scores


def check(model, batch, *, bins=BINS, mesh=None, shares=1):
    """Scores, router metrics and summed gradients of all microbatches are those of the whole batch by rows."""
    batch = Packing(bins, shares, 1, G)(batch)
    microbatches, batch = batch.microbatches, dataclasses.replace(batch, microbatches=None)
    params, rng = tiny.masters(model), np.random.default_rng(1)
    weights = np.where(batch.response_mask, rng.normal(size=(len(batch.rewards), T)), 0).astype(np.float32)
    differentiate = partial(jax.grad, has_aux=True)
    expected_grads, expected = compiled(differentiate(partial(by_rows, model, batch, weights)), params)
    layout = mesh_layout(make_mesh(mesh or MeshConfig()))
    assert microbatches.count.max() > 1
    halvings = microbatches.places.halvings[:, 0][(microbatches.rows[:, 0] >= 0).any(axis=-1)]
    assert set(halvings.tolist()) == set(range(bins.halvings + 1))
    run, grads, seen = None, None, []
    for at in range(microbatches.count.max()):
        rows, places = jax.tree.map(lambda x, at=at: x[:, 0, at], (microbatches.rows, microbatches.places))
        present, numbers = rows >= 0, rows + len(batch.rewards) // shares * np.arange(shares)[:, None]
        taken = np.where(present, numbers, 0).ravel()
        inputs = jax.tree.map(lambda x, taken=taken: x[taken], batch), places
        inputs += (np.where(present.ravel()[:, None], weights[taken], 0), params)
        if run is None:
            step = differentiate(partial(in_bins, model, bins, layout), argnums=3)
            run = jax.jit(step).lower(*inputs).compile(UNOPTIMISED)
        new, scores = run(*inputs)
        grads = new if grads is None else jax.tree.map(jnp.add, grads, new)
        real, seen = taken[present.ravel()], [*seen, *taken[present.ravel()]]
        mask = batch.response_mask[real]
        for ours, theirs in [
            (scores.logps, expected.logps),
            (scores.entropy, expected.entropy),
            (scores.quantities["collision"], expected.quantities["collision"]),
        ]:
            ours = np.asarray(ours)[present.ravel()]
            np.testing.assert_allclose(np.where(mask, ours, 0), np.where(mask, theirs[real], 0), atol=2e-6, rtol=2e-6)
        assert not np.asarray(scores.logps)[present.ravel()][~mask].any()
        for name, values in (scores.router.metrics if model.num_experts else {}).items():
            ours = np.asarray(values)[present.ravel()]
            np.testing.assert_allclose(ours, expected.router.metrics[name][real], rtol=2e-6, atol=1e-6, err_msg=name)
    assert sorted(seen) == list(range(len(batch.rewards)))
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("name", [pytest.param("dense", marks=pytest.mark.slow), "experts"])
def test_scores_and_gradients_are_those_of_rows(name):
    check(MODELS[name], random_rows())


@pytest.mark.parametrize("name", MASKED)
def test_bins_of_other_shapes_change_nothing(name):
    check(tiny.DENSE, random_rows(), bins=MASKED[name])


def test_candidates_experts_and_chunks_of_the_head_go_with_their_tokens():
    rng = np.random.default_rng(3)
    candidates = np.argsort(rng.random((16, T, 20)), axis=-1)[..., :6].astype(np.int32)
    batch = random_rows()
    candidates[..., 0] = batch.tokens[:, P:]
    candidates[5:7, 2:] = -1
    experts = np.argsort(rng.random((16, P + T - 1, 2, 4)), axis=-1)[..., :2].astype(np.int16)
    # what replay records of a prompt is the same for its responses
    experts[:, : P - 1] = np.repeat(experts[::G, : P - 1], G, axis=0)
    batch = dataclasses.replace(batch, candidate_tokens=candidates, experts=experts)
    check(dataclasses.replace(tiny.EXPERTS, head_chunk=7), batch)


MESHES = {
    "data 2 × fsdp 2 × tensor 2": (MeshConfig(data=2, fsdp=2, tensor=2), 4),
    "fsdp 4 × context 2": (MeshConfig(fsdp=4, context=2), 4),
    "expert 2 × tensor 2": (MeshConfig(expert=2, tensor=2), 2),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("dense", "data 2 × fsdp 2 × tensor 2"),
        ("dense", "fsdp 4 × context 2"),
        ("experts", "expert 2 × tensor 2"),
    ],
)
def test_devices_that_each_pack_their_share_score_as_one(name, mesh):
    bins = MASKED["halved for short rows"]
    check(MODELS[name], random_rows(rows=64), bins=bins, mesh=MESHES[mesh][0], shares=MESHES[mesh][1])


def test_shares_that_the_devices_do_not_have_are_refused():
    batch = random_rows()
    places = jax.tree.map(lambda x: x[:, 0, 0], Packing(BINS, 2, 1, G)(batch).microbatches.places)
    with pytest.raises(ValueError, match="rows are packed in 2 shares; devices hold 1"):
        packed_logps(tiny.DENSE, tiny.masters(tiny.DENSE), batch, places=places, bins=BINS)
