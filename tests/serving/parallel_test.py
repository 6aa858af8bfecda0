"""The engine on meshes of eight devices against one device, and what its compiled loop holds and sends."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dcjax.models import ModelConfig, init_params, logical_axes
from dcjax.serving.continuous import Continuous
from dcjax.serving.engine import Qwen3Engine
from dcjax.serving.parallel import serving_mesh
from dcjax.serving.rollout import REFILLS_PER_CALL, Sampling, sample_responses
from dcjax.serving.scheduler import programs, queue_of
from dcjax.serving.scoring import score_responses
from dcjax.sharding.mesh import MeshConfig, make_mesh
from dcjax.sharding.rules import shardings

pytestmark = pytest.mark.heavy

DENSE = ModelConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=8,
    num_kv_heads=8,
    head_dim=8,
    tie_embeddings=False,
)
# a dense layer, then one with experts
MIXED = dataclasses.replace(
    DENSE, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, decoder_sparse_step=2
)
SLOTS, G, P, T = 8, 2, 8, 16
PROMPTS = [np.random.default_rng(n).integers(3, 64, 1 + n % P).tolist() for n in range(9)]
KEY = jax.random.key(1)


@functools.cache
def masters(config):
    """Spread out further than fresh ones are, so that responses end at many lengths."""
    return jax.tree.map(lambda leaf: 1.5 * leaf, jax.jit(functools.partial(init_params, config))(jax.random.key(0)))


EIGHT = MeshConfig(fsdp=8)


@functools.cache
def make_engine(config, format="float32", tensor=None, training=EIGHT, **settings):
    """On eight devices, `tensor` of them to a copy of the model, or on one where it is None."""
    training = make_mesh(training)
    sizes = {"slots": SLOTS, "max_prompt_length": P, "max_response_length": T, "end_tokens": [1], "steps_per_call": 4}
    meshes = {} if tensor is None else {"mesh": serving_mesh(training, tensor), "training_mesh": training}
    # prompts in more than one pass, and one that is not full
    return Qwen3Engine(config, format=format, prefill_tokens=P, **sizes, **meshes, **settings)


def served(engine, config, training=EIGHT):
    return engine.sync(jax.device_put(masters(config), shardings(make_mesh(training), logical_axes(config))), 3)


@functools.cache
def alone(config, format, top_k=0):
    engine = make_engine(config, format, max_candidates=top_k)
    settings = {"samples_per_prompt": G, "temperature": 1.0, "top_k": top_k, "key": KEY}
    return sample_responses(engine, engine.sync(masters(config), 3), PROMPTS, **settings)


@pytest.mark.parametrize(
    ("config", "format", "tensor", "training", "top_k"),
    [
        pytest.param(DENSE, "float32", 2, MeshConfig(fsdp=2, tensor=4), 5, marks=pytest.mark.slow),
        (MIXED, "w8a8", 2, EIGHT, 4),
        pytest.param(MIXED, "w8a8", 4, MeshConfig(tensor=2, expert=4), 0, marks=pytest.mark.slow),
        pytest.param(DENSE, "w8a8", 8, MeshConfig(tensor=8), 0, marks=pytest.mark.slow),
        pytest.param(MIXED, "float32", 2, MeshConfig(fsdp=8), 0, marks=pytest.mark.slow),
        pytest.param(MIXED, "w8a8", 8, MeshConfig(data=2, fsdp=2, expert=2), 0, marks=pytest.mark.slow),
        pytest.param(DENSE, "int4", 2, MeshConfig(fsdp=8), 0, marks=pytest.mark.slow),
        pytest.param(DENSE, "bf16", 1, MeshConfig(context=8), 0, marks=pytest.mark.slow),
    ],
)
def test_tokens_are_those_of_one_device(config, format, tensor, training, top_k):
    expected = alone(config, format, top_k)
    lengths = expected.response_mask.sum(axis=1)
    assert lengths.min() < T // 2 and lengths.max() == T
    engine = make_engine(config, format, tensor, training, max_candidates=top_k)
    params = served(engine, config, training)
    settings = {"samples_per_prompt": G, "temperature": 1.0, "top_k": top_k, "key": KEY}
    rollout = sample_responses(engine, params, PROMPTS, **settings)
    for name in ("tokens", "response_mask", "versions", "finished", "candidate_tokens"):
        np.testing.assert_array_equal(getattr(rollout, name), getattr(expected, name))
    np.testing.assert_allclose(rollout.rollout_logps, expected.rollout_logps, atol=3e-5)
    np.testing.assert_allclose(rollout.log_mass, expected.log_mass, atol=3e-5)


def one_by_one(engine, params, wants_top):
    """The tokens of samples that come one in a turn, and what is told of the first turn of the first."""
    batching, keys, told = Continuous(engine), jax.random.key_data(jax.random.split(KEY, len(PROMPTS))), []
    tokens, samples, coming = [[] for _ in PROMPTS], {}, list(enumerate(PROMPTS))
    while coming or batching.free < SLOTS:
        if coming and batching.free:
            sample, prompt = coming.pop(0)
            samples[batching.begin(params, prompt, engine.make_requests(keys[sample][None]))] = sample
        for number, turn in batching.turn(params, wants_top=wants_top).items():
            tokens[samples[number]] += turn.tokens.tolist()
            told.append(turn.top)
    return tokens, told[0]


@pytest.mark.slow
def test_samples_that_come_one_by_one_are_those_of_one_device_and_so_are_log_probs_of_the_most_probable_tokens():
    # as the one before
    engine, plain = make_engine(MIXED, "w8a8", 2, EIGHT, max_candidates=4), make_engine(MIXED, "w8a8", max_candidates=4)
    (tokens, told), (expected, top) = (
        one_by_one(*given, wants_top=True)
        for given in ((engine, served(engine, MIXED)), (plain, plain.sync(masters(MIXED), 3)))
    )
    assert tokens == expected and len({len(sample) for sample in tokens}) > 1
    np.testing.assert_array_equal(told.top_tokens, top.top_tokens)
    np.testing.assert_allclose(told.top_logps, top.top_logps, atol=3e-5)


def numbers(text):
    return [int(number) for number in re.findall(r"\d+", text)]


def iota(dims, order):
    """[4,2]T(1,0) as HLO has it: all devices, in that shape and transposed."""
    devices = np.arange(8).reshape(numbers(dims))
    return devices.transpose(numbers(order)) if order else devices


def groups(line):
    """Which devices take part in a collective together."""
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", line):
        return [numbers(group) for group in listed[1].split("},{")]
    if found := re.search(r"replica_groups=(\[[\d,]+\])<=(\[[\d,]+\])(T\([\d,]+\))?", line):
        return iota(found[2], found[3]).reshape(numbers(found[1])).tolist()
    axes = re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((\[[\d,]+\])(T\([\d,]+\))?\))? \{(.*?)\}", line)
    sizes = [int(size) for size in re.findall(r"=(\d+)", axes[1])]
    names = re.findall(r"'(\w+)'=", axes[1])
    together = [names.index(name) for name in re.findall(r"'(\w+)'", axes[4])]
    devices = iota(axes[2] or "[8]", axes[3]).reshape(sizes)
    devices = np.moveaxis(devices, together, range(-len(together), 0))
    return sorted(sorted(group) for group in devices.reshape(-1, np.prod([sizes[axis] for axis in together])).tolist())


def test_caches_and_weights_are_really_split_and_copies_of_the_model_do_not_wait_for_each_other():
    # as the one before, whose programs it shares
    engine = make_engine(MIXED, "w8a8", 2, EIGHT, max_candidates=4)
    params = served(engine, MIXED)
    settings = {"samples_per_prompt": G, "key": KEY, "temperature": 1.0, "top_k": 4}
    sampling = Sampling(engine, params, PROMPTS, **settings)
    state, prefix = sampling._scheduler._state, sampling._prefix
    # two of eight slots, and four of eight heads; a prefix on all copies
    assert {leaf.sharding.shard_shape(leaf.shape)[:2] for leaf in jax.tree.leaves(state.decode.caches)} == {(2, 4)}
    assert {leaf.sharding.shard_shape(leaf.shape)[:2] for leaf in jax.tree.leaves(prefix.caches)} == {(9, 4)}
    layer = params.weights["layers"][1]
    assert layer["experts_up_proj"].values.sharding.shard_shape((8, 64, 32)) == (4, 64, 32)
    assert layer["o_proj"].values.sharding.spec == PartitionSpec("tensor", None)
    queue = queue_of(prefix, sampling._rows, sampling._requests, range(len(sampling._rows)))
    given = (params, queue, np.int32(REFILLS_PER_CALL), state)
    text = programs(engine.decoder).decode.lower(engine.decoder, 4, *given).compile().as_text()
    # arrays of one copy alone: nothing has the cache of all slots, or of all heads
    capacity = P + T
    assert f"s8[2,4,{capacity},8]" in text
    assert not re.search(rf"\[8,\d+,{capacity},8\]|\[2,8,{capacity},8\]", text)
    # what a step sends stays between two devices that share a model; refilling is agreed on by all
    sent = [line for line in text.splitlines() if "replica_groups=" in line]
    # the name of a step's own part, of JAX before and from 0.12
    of_steps = [groups(line) for line in sent if re.search("/closed_call/|/eval_jaxpr/", line)]
    assert len(of_steps) > 10
    assert all(group == [[0, 1], [2, 3], [4, 5], [6, 7]] for group in of_steps)
    assert any(len(groups(line)) == 2 for line in sent)


@pytest.mark.slow
def test_scores_are_those_of_one_device():
    rollout = alone(MIXED, "float32")
    one, eight = make_engine(MIXED), make_engine(MIXED, tensor=2)
    ours, expected = (
        score_responses(engine, given, rollout, key=KEY, keeps_residuals=True)
        for engine, given in ((eight, served(eight, MIXED)), (one, one.sync(masters(MIXED), 3)))
    )
    np.testing.assert_allclose(ours.logps, expected.logps, atol=3e-5)
    np.testing.assert_allclose(ours.residuals, expected.residuals, atol=1e-4)
    np.testing.assert_allclose(expected.logps, rollout.rollout_logps, atol=3e-5)


@pytest.mark.parametrize(
    ("changes", "tensor", "message"),
    [
        ({"num_kv_heads": 2}, 4, r"serving.tensor is 4, which does not divide the 2 of key-value heads"),
        ({"vocab_size": 63}, 2, r"serving.tensor is 2, which does not divide the 63 of \S*embed_tokens"),
        ({"num_experts": 6}, 4, r"serving.tensor is 4, which does not divide the 6 of \S*experts_\w+_proj"),
    ],
)
def test_a_model_that_devices_cannot_share_is_refused_with_what_they_do_not_divide(changes, tensor, message):
    config = dataclasses.replace(MIXED, **changes)
    with pytest.raises(ValueError, match=message):
        make_engine(config, tensor=tensor)


def test_slots_that_copies_cannot_share_and_devices_that_copies_cannot_are_refused():
    mesh = make_mesh(MeshConfig(data=8))
    with pytest.raises(ValueError, match=r"serving.tensor is 3; it must divide the number of devices, 8"):
        serving_mesh(mesh, 3)
    sizes = {"slots": 6, "max_prompt_length": P, "max_response_length": T, "end_tokens": [1]}
    with pytest.raises(ValueError, match="slots is 6; it must be a multiple of the 4 copies of the model"):
        Qwen3Engine(DENSE, format="w8a8", mesh=serving_mesh(mesh, 2), **sizes)


@pytest.mark.slow
def test_the_most_probable_tokens_that_are_recorded_do_not_depend_on_devices():
    """Devices share the vocabulary, and each copy records its own samples."""
    found = {}
    for tensor in (None, 2):
        engine = make_engine(DENSE, tensor=tensor, records_head=3)
        params = engine.sync(masters(DENSE), 3) if tensor is None else served(engine, DENSE)
        found[tensor] = sample_responses(engine, params, PROMPTS, samples_per_prompt=G, temperature=1.0, key=KEY)
    one, eight = found.values()
    np.testing.assert_array_equal(eight.tokens, one.tokens)
    mask = one.response_mask
    np.testing.assert_array_equal(eight.sampler_tokens[mask], one.sampler_tokens[mask])
    np.testing.assert_allclose(eight.sampler_logps[mask], one.sampler_logps[mask], rtol=1e-5, atol=1e-5)
    assert (one.sampler_tokens[mask] >= 0).all()
