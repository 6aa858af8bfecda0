import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jetstream.engine import engine_api, tokenizer_pb2
from scipy import stats

from dcjax.models import ModelConfig, forward, init_params, token_logps
from dcjax.serving import Qwen3Engine
from dcjax.serving.engine import SampledTokens, make_requests, sample

CONFIG = ModelConfig(vocab_size=16, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, head_dim=8)
FORMATS = ["float32", "bf16", "int8"]
P, T, SLOTS, STEPS = 5, 8, 6, 3
# a token that cannot be sampled: every response runs to its limit
NEVER = CONFIG.vocab_size


@functools.cache
def make_engine(format="float32", slots=SLOTS, end_token=NEVER, steps_per_call=STEPS, max_response_length=T):
    return Qwen3Engine(
        CONFIG,
        format=format,
        slots=slots,
        max_prompt_length=P,
        max_response_length=max_response_length,
        end_token=end_token,
        steps_per_call=steps_per_call,
    )


@pytest.fixture(scope="module")
def masters():
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        x = rng.normal(size=leaf.shape)
        return jnp.array(1 + 0.1 * x if "norm" in path[-1].key else x * leaf.shape[-1] ** -0.5, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(lambda: init_params(CONFIG, jax.random.key(0))))


@functools.cache
def full_forward():
    return jax.jit(functools.partial(forward, CONFIG))


def next_logits(masters, prompts):
    """Logits after each prompt, from the training forward."""
    tokens = np.zeros((len(prompts), P + T), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in prompts])
    logits = full_forward()(masters, tokens, np.arange(P + T) < lengths[:, None])
    return np.asarray(logits, np.float64)[np.arange(len(prompts)), lengths - 1]


def start(engine, params, prompts, *, limits=None, temperatures=None, keys=None, slots=None):
    """A decode state with one sample of each prompt."""
    n = len(prompts)
    requests = make_requests(
        rows=np.arange(n),
        limits=[engine.max_response_length] * n if limits is None else limits,
        temperatures=[1.0] * n if temperatures is None else temperatures,
        keys=jax.random.key_data(jax.random.split(jax.random.key(0), n)) if keys is None else keys,
    )
    slots = np.arange(n) if slots is None else slots
    return engine.insert_many(engine.prefill_many(params, prompts), engine.init_decode_state(), slots, requests)


def decode(engine, params, state):
    """Tokens, log-probs and versions [slots, T] as lists a slot, until nothing is active."""
    out = [[] for _ in range(engine.slots)]
    while np.asarray(state.active).any():
        state, result = engine.generate(params, state)
        result = result.convert_to_numpy()
        for slot, step in zip(*np.nonzero(result.valid), strict=True):
            values = (result.tokens[slot, step], result.log_prob[slot, step], result.version[slot, step])
            out[slot].append(tuple(value.item() for value in values))
    return out


PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [10, 11], [1, 2, 3], [12]]


# --- JetStream's interface ---


@pytest.mark.parametrize("name", FORMATS)
def test_it_is_a_jetstream_engine_with_nothing_left_abstract(name):
    assert issubclass(Qwen3Engine, engine_api.Engine)
    assert not Qwen3Engine.__abstractmethods__
    engine = make_engine(name)
    assert isinstance(engine, engine_api.Engine)
    assert (engine.max_concurrent_decodes, engine.samples_per_slot, engine.max_prefill_length) == (SLOTS, 1, P)
    assert engine.mesh.size == 1
    assert engine.colocated_cpus is None
    assert isinstance(engine.get_tokenizer(), tokenizer_pb2.TokenizerParameters)
    assert engine.get_prefix_destination_sharding().is_fully_replicated


@pytest.mark.parametrize("name", ["float32", "int8"])
def test_jetstreams_own_calls_work_without_extra_arguments(masters, name):
    engine = make_engine(name)
    params = engine.load_params(masters)
    padded = jnp.array([4, 9, 1, 0, 0])
    prefix = engine.prefill(params=params, padded_tokens=padded, true_length=3)
    state = engine.insert(prefix, engine.init_decode_state(), slot=2)
    state, first = engine.generate(params, state)
    state, second = engine.generate(params, state)
    assert isinstance(first, engine_api.ResultTokens)
    for result, length in ((first, STEPS), (second, 2 * STEPS)):
        result.copy_to_host_async()
        host = result.convert_to_numpy()
        slot = host.get_result_at_slot(2)
        assert slot.tokens.shape == slot.valid.shape == (1, STEPS)
        assert slot.valid.all()
        assert slot.lengths.tolist() == [length]
        assert ((slot.tokens >= 0) & (slot.tokens < CONFIG.vocab_size)).all()
        for empty in (0, 1, 3, 4, 5):
            assert not host.get_result_at_slot(empty).valid.any()
    # the same as asking for it in so many words
    requests = make_requests(rows=[0], limits=[T], temperatures=[1.0], keys=np.zeros((1, 2)))
    again = engine.insert_many(prefix, engine.init_decode_state(), [2], requests)
    _, explicit = engine.generate(params, again)
    np.testing.assert_array_equal(explicit.tokens[2], first.tokens[2])


def test_padding_after_the_prompt_is_not_read(masters):
    engine = make_engine()
    params = engine.load_params(masters)
    sampled = []
    for padding in (0, 13):
        padded = np.array([4, 9, 1, padding, padding], np.int32)
        state = engine.init_decode_state()
        prefix = engine.prefill(params=params, padded_tokens=padded, true_length=3)
        request = make_requests(rows=[0], limits=[T], temperatures=[1.0], keys=[[0, 7]])
        state = engine.insert(prefix, state, slot=0, request=request)
        _, result = engine.generate(params, state)
        sampled.append((np.asarray(result.tokens[0]), np.asarray(result.log_prob[0])))
    np.testing.assert_array_equal(sampled[0], sampled[1])


def test_on_the_host_a_result_keeps_its_log_probs_and_versions(masters):
    engine = make_engine()
    params = engine.sync(masters, 9)
    _, result = engine.generate(params, start(engine, params, PROMPTS[:2]))
    result.copy_to_host_async()
    host = result.convert_to_numpy()
    assert isinstance(host, SampledTokens)
    for name in ("data", "log_prob", "version", "tokens", "valid"):
        assert isinstance(getattr(host, name), np.ndarray)
        np.testing.assert_array_equal(getattr(host, name), getattr(result, name))
    assert host.log_prob.shape == host.version.shape == host.tokens.shape == (SLOTS, STEPS)
    assert host.log_prob.dtype == np.float32
    assert (host.log_prob[:2] < 0).all()
    assert (host.version[:2] == 9).all()
    assert (host.version[2:] == -1).all()
    assert (host.log_prob[2:] == 0).all()
    # twice is once
    host.copy_to_host_async()
    np.testing.assert_array_equal(host.convert_to_numpy().log_prob, host.log_prob)


def test_an_empty_state_generates_nothing(masters):
    engine = make_engine()
    params = engine.sync(masters, 0)
    state, result = engine.generate(params, engine.init_decode_state())
    assert not np.asarray(result.valid).any()
    assert not np.asarray(state.active).any()
    assert (np.asarray(result.version) == -1).all()


def test_every_token_says_which_weights_it_is_of(masters):
    engine = make_engine()
    old, new = engine.sync(masters, 3), engine.sync(masters, 4)
    state = start(engine, old, PROMPTS[:1])
    versions = []
    for params in (old, new, new):
        state, result = engine.generate(params, state)
        versions += np.asarray(result.version[0]).tolist()
    assert versions == [3] * STEPS + [4] * (T - STEPS) + [-1] * (3 * STEPS - T)


def test_the_state_is_donated_and_the_prefix_is_not(masters):
    engine = make_engine()
    params = engine.sync(masters, 0)
    prefix, empty = engine.prefill_many(params, PROMPTS[:1]), engine.init_decode_state()
    state = engine.insert(prefix, empty, 0)
    assert empty.caches[0].k.is_deleted()
    state, _ = engine.generate(params, state)
    state = engine.insert(prefix, state, 1)
    assert not prefix.caches[0].k.is_deleted()
    assert np.asarray(state.active).tolist() == [True, True] + [False] * (SLOTS - 2)


# --- what is sampled ---


def test_temperatures_and_limits_of_one_batch_are_each_slots_own(masters):
    engine = make_engine()
    params = engine.sync(masters, 0)
    temperatures, limits = [0.0, 1.0, 0.5, 2.0, 0.0, 1.0], [8, 1, 5, 8, 3, 2]
    out = decode(engine, params, start(engine, params, PROMPTS, temperatures=temperatures, limits=limits))
    assert [len(response) for response in out] == limits

    # greedy slots took the largest logit of the training forward, with certainty
    for slot in (0, 4):
        prefix = list(PROMPTS[slot])
        for token, logp, _ in out[slot]:
            assert token == next_logits(masters, [prefix])[0].argmax()
            assert logp == 0
            prefix.append(token)

    # the others' log-probs are those of their own temperature
    tokens = np.zeros((SLOTS, P + T), np.int32)
    prompt_mask, response_mask = np.zeros((SLOTS, P), bool), np.zeros((SLOTS, T), bool)
    logps = np.zeros((SLOTS, T), np.float32)
    for slot, response in enumerate(out):
        tokens[slot, P - len(PROMPTS[slot]) : P] = PROMPTS[slot]
        prompt_mask[slot, P - len(PROMPTS[slot]) :] = True
        response_mask[slot, : len(response)] = True
        tokens[slot, P : P + len(response)] = [token for token, *_ in response]
        logps[slot, : len(response)] = [logp for _, logp, _ in response]

    def forced(temperatures):
        mask = np.concatenate([prompt_mask, response_mask], axis=1)
        scores = jax.jit(functools.partial(token_logps, CONFIG), static_argnames="response_length")
        scored = scores(masters, tokens, mask, response_length=T, temperature=np.array(temperatures, np.float32))
        return np.asarray(scored.logps)

    warm = response_mask & (np.array(temperatures) > 0)[:, None]
    own = [t or 1.0 for t in temperatures]
    np.testing.assert_allclose(logps[warm], forced(own)[warm], atol=1e-5)
    others = warm & (np.array(temperatures) != 1)[:, None]
    assert (np.abs(logps - forced([1.0] * SLOTS))[others] > 1e-3).all()


def goodness_of_fit(counts, probabilities):
    """p-value of the χ² test, rare tokens pooled."""
    order = np.argsort(probabilities)
    expected, observed = probabilities[order] * counts.sum(), counts[order].astype(float)
    rare = max(1, int(np.searchsorted(np.cumsum(expected), 5.0)) + 1)
    expected = np.append(expected[rare:], expected[:rare].sum())
    observed = np.append(observed[rare:], observed[:rare].sum())
    return stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue


def test_first_tokens_follow_the_softmax_of_their_temperature(masters):
    samples = 4096
    engine = make_engine(slots=samples, steps_per_call=1, max_response_length=1)
    params = engine.sync(masters, 0)
    temperatures = np.where(np.arange(samples) % 2, 0.7, 1.0)
    requests = make_requests(
        rows=np.zeros(samples),
        limits=np.ones(samples),
        temperatures=temperatures,
        keys=jax.random.key_data(jax.random.split(jax.random.key(2), samples)),
    )
    prefix = engine.prefill_many(params, [[3, 1, 4]])
    state = engine.insert_many(prefix, engine.init_decode_state(), np.arange(samples), requests)
    tokens = np.asarray(engine.generate(params, state)[1].tokens)[:, 0]

    logits = next_logits(masters, [[3, 1, 4]])[0]
    fits = {}
    for sampled_at in (0.7, 1.0):
        counts = np.bincount(tokens[temperatures == sampled_at], minlength=CONFIG.vocab_size)
        for claimed in (0.7, 1.0):
            scaled = np.exp((logits - logits.max()) / claimed)
            fits[sampled_at, claimed] = goodness_of_fit(counts, scaled / scaled.sum())
    assert min(fits[0.7, 0.7], fits[1.0, 1.0]) > 0.01
    # the test tells the two temperatures apart
    assert max(fits[0.7, 1.0], fits[1.0, 0.7]) < 1e-6


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.floats(0.125, 5, width=32))
def test_a_draw_comes_with_its_log_prob(seed, temperature):
    logits = np.random.default_rng(seed).normal(0, 3, (4, 9)).astype(np.float32)
    keys = jax.random.key_data(jax.random.split(jax.random.key(seed), 4))
    temperatures = np.array([temperature, 0.0, 1.0, temperature], np.float32)
    tokens, logps = (np.asarray(a) for a in sample(logits, temperatures, keys, np.zeros(4, np.int32)))
    scaled = logits / np.where(temperatures == 0, 1, temperatures)[:, None].astype(np.float64)
    expected = scaled[np.arange(4), tokens] - np.log(np.exp(scaled).sum(1))
    np.testing.assert_allclose(logps[[0, 2, 3]], expected[[0, 2, 3]], rtol=1e-4, atol=1e-4)
    assert tokens[1] == logits[1].argmax()
    assert logps[1] == 0


def test_each_token_of_a_request_is_drawn_anew():
    # a flat distribution: only the key decides
    keys = np.tile(np.asarray(jax.random.key_data(jax.random.key(0))), (64, 1))
    flat, ones = np.zeros((64, 16), np.float32), np.ones(64, np.float32)
    by_count, _ = sample(flat, ones, keys, np.arange(64, dtype=np.int32))
    assert len(np.unique(by_count)) > 8
    same, _ = sample(flat, ones, keys, np.full(64, 3, np.int32))
    assert np.unique(same).tolist() == [int(by_count[3])]


# --- int8 for real ---


def test_the_compiled_int8_program_multiplies_integers_and_keeps_an_integer_cache(masters):
    engine = make_engine("int8")
    params, state = engine.sync(masters, 0), engine.init_decode_state()
    cache = state.caches[0]
    assert {cache.k.dtype, cache.v.dtype} == {jnp.dtype(jnp.int8)}
    compiled = engine._generate.lower(params, state=state).compile().as_text()
    types = dict(re.findall(r"%([\w.\-]+) = (\w+)\[", compiled))
    dots = re.findall(r"= (\w+)\[[^=]*? dot\((?:[^%]*)%([\w.\-]+), (?:[^%]*)%([\w.\-]+)\)", compiled)
    kinds = [(types[left], types[right], out) for out, left, right in dots]
    # seven kernels a layer and the head; scores and contexts of attention are the only other products
    assert kinds.count(("s8", "s8", "s32")) == 7 * CONFIG.num_layers + 1
    assert len(kinds) == 9 * CONFIG.num_layers + 1
    # both arrays of each layer's cache come in as they are
    shape = ",".join(map(str, cache.k.shape))
    assert len(re.findall(rf"= s8\[{shape}\]\S* parameter\(\d+\), sharding", compiled)) == 2 * CONFIG.num_layers


# --- bad input ---


@pytest.mark.parametrize(("prompt", "length"), [([], 0), ([1] * (P + 1), P + 1)])
def test_a_prompt_that_does_not_fit_is_refused_with_its_length(masters, prompt, length):
    engine = make_engine()
    params = engine.sync(masters, 0)
    message = f"is {length}; this engine takes 1 to "
    with pytest.raises(ValueError, match=message):
        engine.prefill_many(params, [[1], prompt])
    with pytest.raises(ValueError, match=message):
        engine.prefill(params=params, padded_tokens=np.array([*prompt, 0]), true_length=length)


@pytest.mark.parametrize("limit", [0, T + 1])
def test_a_limit_that_does_not_fit_is_refused_with_its_value(masters, limit):
    engine = make_engine()
    params = engine.sync(masters, 0)
    with pytest.raises(ValueError, match=f"limit of a response is {limit}; this engine takes 1 to {T}"):
        start(engine, params, PROMPTS[:2], limits=[1, limit])


def test_prefilling_on_top_of_a_prefix_is_refused(masters):
    engine = make_engine()
    params = engine.sync(masters, 0)
    prefix = engine.prefill_many(params, [[1]])
    with pytest.raises(ValueError, match="existing prefix is not supported"):
        engine.prefill(params=params, existing_prefix=prefix, padded_tokens=np.array([1]), true_length=1)


def test_a_slot_beyond_the_last_is_padding_and_changes_nothing(masters):
    engine = make_engine()
    params = engine.sync(masters, 0)
    state = start(engine, params, PROMPTS[:3], slots=[4, SLOTS, SLOTS + 7])
    assert np.flatnonzero(state.active).tolist() == [4]
    assert np.asarray(state.caches[0].k)[[0, 1, 2, 3, 5]].max() == 0


def test_an_unknown_format_is_refused():
    with pytest.raises((ValueError, TypeError), match="int7"):
        Qwen3Engine(CONFIG, format="int7", slots=1, max_prompt_length=1, max_response_length=1, end_token=0)


@pytest.mark.parametrize("slot", [-1, SLOTS])
def test_a_slot_that_is_not_there_is_refused_by_jetstreams_insert(masters, slot):
    engine = make_engine()
    params = engine.sync(masters, 0)
    prefix = engine.prefill_many(params, [[1]])
    with pytest.raises(ValueError, match=f"slot is {slot}; this engine takes 0 to {SLOTS - 1}"):
        engine.insert(prefix, engine.init_decode_state(), slot=slot)


def test_samples_started_without_a_request_have_keys_of_their_own(masters):
    engine = make_engine()
    params = engine.sync(masters, 0)
    prefix, state = engine.prefill_many(params, [[1, 2]]), engine.init_decode_state()
    for slot in range(3):
        state = engine.insert(prefix, state, slot=slot)
    assert len(np.unique(np.asarray(state.keys)[:3], axis=0)) == 3
