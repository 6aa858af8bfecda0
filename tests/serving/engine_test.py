import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from compiling import jit
from jetstream.engine import engine_api, tokenizer_pb2
from scipy import stats

from dcjax.models import ModelConfig, abstract_params, forward
from dcjax.serving import Qwen3Engine, scheduler
from dcjax.serving import engine as module
from dcjax.serving.decoder import Decoder
from dcjax.serving.engine import SampledTokens
from dcjax.serving.formats import cache_dtype, formats
from dcjax.serving.mismatch import MismatchConfig
from dcjax.serving.rollout import Sampling, sample_keys

pytestmark = pytest.mark.heavy

CONFIG = tiny.DENSE
P, T, SLOTS, STEPS = 5, 8, 6, 3
# a token that cannot be sampled: every response runs to its limit
NEVER = CONFIG.vocab_size
SIZES = {
    "format": "float32",
    "slots": SLOTS,
    "max_prompt_length": P,
    "max_response_length": T,
    "end_tokens": (NEVER,),
    "steps_per_call": STEPS,
}


@functools.cache
def make_engine(format="float32", **changes):
    return Qwen3Engine(CONFIG, **(SIZES | {"format": format} | changes))


@pytest.fixture(scope="module")
def masters():
    return tiny.masters(CONFIG)


@functools.cache
def full_forward():
    return jit(functools.partial(forward, CONFIG))


def next_logits(masters, prompts):
    """Logits after each prompt, from the training forward."""
    tokens = np.zeros((len(prompts), P + T), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in prompts])
    logits = full_forward()(masters, tokens, np.arange(P + T) < lengths[:, None])
    return np.asarray(logits, np.float64)[np.arange(len(prompts)), lengths - 1]


def start(engine, params, prompts, *, keys=None, **settings):
    """A decode state with one sample of each prompt."""
    keys = sample_keys(jax.random.key(0), np.arange(len(prompts))) if keys is None else keys
    requests = engine.make_requests(keys, **settings)
    prefix, state = engine.prefill_many(params, prompts), engine.init_decode_state()
    for slot in range(len(prompts)):
        request = jax.tree.map(lambda leaf, slot=slot: leaf[slot : slot + 1], requests)
        state = engine.insert(prefix, state, slot, request, slot)
    return state


def decode(engine, params, state):
    """Tokens, log-probs and versions of each slot, until nothing is active."""
    out = [[] for _ in range(engine.slots)]
    while np.asarray(state.active).any():
        state, result = engine.generate(params, state)
        result = result.convert_to_numpy()
        for slot, step in zip(*np.nonzero(result.valid), strict=True):
            values = (result.tokens[slot, step], result.log_prob[slot, step], result.version[slot, step])
            out[slot].append(tuple(value.item() for value in values))
    return out


def truncated(logits, temperature, top_k, top_p):
    """Probabilities after temperature, then top-k, then top-p; all of it on the largest logit at temperature 0."""
    p = np.exp((logits - logits.max()) / (temperature or 1))
    order = np.argsort(-p, kind="stable")[: (1 if temperature == 0 else top_k) or None]
    left = p[order] / p[order].sum()
    kept = order[np.cumsum(left) - left < top_p]
    probabilities = np.zeros(len(p))
    probabilities[kept] = p[kept] / p[kept].sum()
    return probabilities


PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [10, 11], [1, 2, 3], [12]]


# --- JetStream's interface ---


@pytest.mark.parametrize("name", ["float32", "int8"])
def test_it_is_a_jetstream_engine_with_nothing_left_abstract(name):
    assert issubclass(Qwen3Engine, engine_api.Engine)
    assert not Qwen3Engine.__abstractmethods__
    engine = make_engine(name)
    assert isinstance(engine, engine_api.Engine)
    assert (engine.max_concurrent_decodes, engine.samples_per_slot, engine.max_prefill_length) == (SLOTS, 1, P)
    assert engine.mesh.size == 1
    assert engine.colocated_cpus is None
    assert isinstance(engine.get_tokenizer(), tokenizer_pb2.TokenizerParameters)
    assert all(place.is_fully_replicated for place in jax.tree.leaves(engine.get_prefix_destination_sharding()))


@pytest.mark.parametrize("name", [pytest.param("float32", marks=pytest.mark.slow), "int8"])
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
    request = engine.make_requests([[0, engine._unkeyed - 1]], limits=T, temperatures=1.0)
    again = engine.insert(prefix, engine.init_decode_state(), 2, request, 0)
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
        state = engine.insert(prefix, state, slot=0, request=engine.make_requests([[0, 7]]))
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


SETTINGS = {
    "limits": np.array([8, 8, 8, 8, 3, 8]),
    "temperatures": np.array([0.0, 1.0, 0.5, 2.0, 1.0, 0.8]),
    "top_ks": np.array([0, 3, 0, 5, 0, 4]),
    "top_ps": np.array([1.0, 1.0, 0.7, 0.8, 1.0, 1.0]),
    "stop_tokens": np.array([[-1, -1], [0, 11], [7, -1], [9, 17], [-1, -1], [8, 4]]),
}


def test_limits_stop_tokens_temperatures_truncations_and_keys_of_one_batch_are_each_requests_own(masters):
    engine = make_engine()
    params = engine.sync(masters, 0)
    keys = np.array([[1, 2], [3, 4], [5, 6], [7, 8], [9, 10], [3, 4]], np.uint32)
    out = decode(engine, params, start(engine, params, PROMPTS, keys=keys, **SETTINGS))

    reasons = []
    for slot, response in enumerate(out):
        tokens = [token for token, *_ in response]
        stops = [at for at, token in enumerate(tokens) if token in SETTINGS["stop_tokens"][slot]]
        # it ends at its first stop token, which is counted, or at its limit
        assert stops in ([], [len(tokens) - 1])
        assert stops or len(tokens) == SETTINGS["limits"][slot]
        reasons.append(bool(stops))
        temperature, top_k, top_p = (SETTINGS[name][slot] for name in ("temperatures", "top_ks", "top_ps"))
        prefix, others = list(PROMPTS[slot]), 0.0
        for token, logp, _ in response:
            logits = next_logits(masters, [prefix])[0]
            np.testing.assert_allclose(logp, np.log(truncated(logits, temperature, top_k, top_p)[token]), atol=1e-5)
            others += abs(logp - np.log(truncated(logits, 1.0, 0, 1.0)[token]))
            prefix.append(token)
        # the check tells these settings from none
        assert others > 1e-2 or (temperature, top_k, top_p) == (1.0, 0, 1.0)
    assert reasons[0] is reasons[4] is False and any(reasons)


@pytest.mark.parametrize("column", [0, 1, 3])
def test_a_response_ends_at_the_first_of_any_of_its_stop_tokens(masters, column):
    engine = make_engine()
    params = engine.sync(masters, 0)
    unending = [[token for token, *_ in one] for one in decode(engine, params, start(engine, params, PROMPTS))]
    stops = np.full((SLOTS, 4), -1)
    stops[:, column] = [response[2] for response in unending]
    ended = decode(engine, params, start(engine, params, PROMPTS, stop_tokens=stops))
    assert len(set(stops[:, column])) > 1
    for response, whole, stop in zip(ended, unending, stops[:, column], strict=True):
        assert [token for token, *_ in response] == whole[: whole.index(stop) + 1]


def test_a_request_is_the_same_alone_in_another_slot(masters):
    engine = make_engine()
    params = engine.sync(masters, 0)
    keys = np.arange(2 * SLOTS, dtype=np.uint32).reshape(SLOTS, 2)
    together = decode(engine, params, start(engine, params, PROMPTS, keys=keys, **SETTINGS))
    for number in (1, 3, 5):
        own = {name: values[number : number + 1] for name, values in SETTINGS.items()}
        request = engine.make_requests(keys[number : number + 1], **own)
        prefix = engine.prefill_many(params, PROMPTS[number : number + 1])
        alone = decode(engine, params, engine.insert(prefix, engine.init_decode_state(), 2, request))[2]
        assert [token for token, *_ in alone] == [token for token, *_ in together[number]]
        np.testing.assert_allclose([x[1] for x in alone], [x[1] for x in together[number]], atol=1e-5)


def test_a_slot_that_has_ended_reads_one_token(masters):
    engine = make_engine(steps_per_call=1)
    params = engine.sync(masters, 0)
    limits = np.arange(1, SLOTS + 1)
    state = start(engine, params, PROMPTS, limits=limits)
    for step in range(1, 3):
        state, _ = engine.generate(params, state)
        fed = [len(prompt) - 1 + step if limit > step else 0 for prompt, limit in zip(PROMPTS, limits, strict=True)]
        assert np.asarray(state.positions).tolist() == fed


def goodness_of_fit(counts, probabilities):
    """p-value of the χ² test, rare tokens pooled; 0 where a token was drawn that cannot be."""
    possible = probabilities > 0
    if counts[~possible].any():
        return 0.0
    order = np.argsort(probabilities[possible])
    expected, observed = probabilities[possible][order] * counts.sum(), counts[possible][order].astype(float)
    rare = int(np.searchsorted(np.cumsum(expected), 5.0)) + 1
    expected = np.append(expected[rare:], expected[:rare].sum())
    observed = np.append(observed[rare:], observed[:rare].sum())
    return stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue if len(expected) > 1 else 1.0


# temperature, top-k, top-p
DRAWN = {
    "plain": (1.0, 0, 1.0),
    "temperature": (0.6, 0, 1.0),
    "top-k": (1.0, 5, 1.0),
    "top-p": (1.0, 8, 0.75),
    "both": (3.0, 7, 0.8),
    "greedy": (0.0, 0, 1.0),
}


@pytest.mark.parametrize("max_candidates", [pytest.param(0, marks=pytest.mark.slow), 8])
def test_first_tokens_follow_the_softmax_of_their_setting_within_one_batch(masters, max_candidates):
    samples, prompt = 1024 * len(DRAWN), [3, 1, 4]
    drawn = dict(DRAWN) if max_candidates else DRAWN | {"top-p": (1.0, 0, 0.75)}
    engine = make_engine(slots=samples, steps_per_call=1, max_response_length=1, max_candidates=max_candidates)
    params = engine.sync(masters, 0)
    setting_of = np.arange(samples) % len(drawn)
    columns = np.array(list(drawn.values()))[setting_of].T
    sampling = Sampling(
        engine,
        params,
        [prompt],
        samples_per_prompt=samples,
        key=jax.random.key(2),
        temperature=columns[0],
        top_k=columns[1].astype(int),
        top_p=columns[2],
    )
    assert sampling.advance(params)
    tokens = sampling.rollout().tokens[:, -1]

    logits = next_logits(masters, [prompt])[0]
    for number, name in enumerate(drawn):
        counts = np.bincount(tokens[setting_of == number], minlength=CONFIG.vocab_size)
        for claimed, setting in drawn.items():
            fit = goodness_of_fit(counts, truncated(logits, *setting))
            # the test tells each setting from each other
            assert fit > 1e-3 if claimed == name else fit < 1e-6, (name, claimed, fit)


# --- the compiled programs ---


def test_the_compiled_int8_program_multiplies_integers_and_keeps_an_integer_cache(masters):
    engine = make_engine("w8a8")
    params, state = engine.sync(masters, 0), engine.init_decode_state()
    cache = state.caches[0]
    assert {cache.k.dtype, cache.v.dtype} == {jnp.dtype(jnp.int8)}
    generate = module._programs(engine.decoder).generate
    compiled = generate.lower(engine.decoder, params, state, STEPS).compile().as_text()
    types = dict(re.findall(r"%([\w.\-]+) = (\w+)\[", compiled))
    dots = re.findall(r"= (\w+)\[[^=]*? dot\((?:[^%]*)%([\w.\-]+), (?:[^%]*)%([\w.\-]+)\)", compiled)
    kinds = [(types[left], types[right], out) for out, left, right in dots]
    # seven kernels a layer and the head; scores and contexts of attention, and the rotations of queries and keys, are
    # the only other products
    assert kinds.count(("s8", "s8", "s32")) == 7 * CONFIG.num_layers + 1
    assert len(kinds) <= 11 * CONFIG.num_layers + 1
    # both arrays of each layer's cache come in as they are
    shape = ",".join(map(str, cache.k.shape))
    entry = compiled[compiled.index("ENTRY") :]
    assert len(re.findall(rf"= s8\[{shape}\]\S* parameter\(\d+\)", entry)) == 2 * CONFIG.num_layers


def copies(compiled, shape):
    """How often a program copies an array of this shape, in whatever dtype."""
    sizes = ",".join(map(str, shape))
    return len(re.findall(rf"= \w+\[{sizes}\]\S* (?:copy|copy-start|concatenate|pad)\(", compiled.as_text()))


@pytest.mark.parametrize("name", [pytest.param("float32", marks=pytest.mark.slow), "int8"])
def test_the_loop_that_decodes_and_refills_updates_the_cache_in_place(masters, name):
    engine = make_engine(name)
    params = engine.sync(masters, 0)
    prefix = engine.prefill_many(params, PROMPTS)
    requests = engine.make_requests(sample_keys(jax.random.key(0), np.arange(12)))
    programs = scheduler.programs(engine.decoder)
    state = programs.begin(engine.decoder, SLOTS, 12, True)
    queue = scheduler.queue_of(prefix, np.repeat(np.arange(6, dtype=np.int32), 2), requests, range(12))
    shape = state.decode.caches[0].k.shape
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state.decode.caches))
    of_server = programs.begin(engine.decoder, SLOTS, 12, False)
    for program, given in (
        (programs.decode, (np.int32(64), state)),
        (programs.turn, (np.zeros(12, bool), np.bool_(False), of_server)),
    ):
        compiled = program.lower(engine.decoder, STEPS, params, queue, *given).compile()
        assert copies(compiled, shape) == 0
        assert compiled.memory_analysis().alias_size_in_bytes >= held
    # not donated, the cache is copied, and seen to be
    some, rows = np.arange(SLOTS) < 2, np.zeros(SLOTS, np.int32)
    asked = jax.tree.map(lambda leaf: leaf[:SLOTS], requests)
    start = jax.jit(Decoder.start, static_argnums=0)
    kept = start.lower(engine.decoder, state.decode, some, prefix, rows, asked).compile()
    assert copies(kept, shape) == 2 * CONFIG.num_layers


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


def test_prefilling_on_top_of_a_prefix_is_refused(masters):
    engine = make_engine()
    params = engine.sync(masters, 0)
    prefix = engine.prefill_many(params, [[1]])
    with pytest.raises(ValueError, match="existing prefix is not supported"):
        engine.prefill(params=params, existing_prefix=prefix, padded_tokens=np.array([1]), true_length=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "int7"}, "format is 'int7'; it must be one of float32, bf16, "),
        ({"kv_cache": "int7"}, "kv_cache is 'int7'; it must be one of auto, float32, "),
        ({"slots": 0}, "slots is 0; this engine takes at least 1"),
        ({"prefill_tokens": 0}, "prefill_tokens is 0; this engine takes at least 1"),
        ({"max_candidates": NEVER + 1}, f"max_candidates is {NEVER + 1}; this engine takes 0 to {NEVER}"),
        ({"records_experts": True}, "records_experts is True; it needs a model with experts"),
        (
            {"mismatch": MismatchConfig(routing_flips=0.5)},
            "mismatch.routing_flips is 0.5; it needs a model with experts that a token leaves out",
        ),
        ({"keep": ("nonesuch",)}, "nonesuch"),
    ],
)
def test_an_engine_that_cannot_be_is_refused_with_what_would_be_right(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Qwen3Engine(CONFIG, **(SIZES | changes))


def test_a_format_that_the_model_cannot_be_served_in_is_refused():
    config = ModelConfig(vocab_size=16, hidden_size=48, intermediate_size=64, num_layers=1, num_heads=4, head_dim=8)
    with pytest.raises(ValueError, match=r"format 'int4' stores groups of 32 weights, but \w+ is contracted over 48"):
        Qwen3Engine(config, **(SIZES | {"format": "int4"}))


@pytest.mark.parametrize("name", ["float32", "int4"])
def test_a_cache_that_does_not_fit_says_how_many_slots_would(name):
    memory = 2**20
    with pytest.raises(ValueError, match=r"slots is 100000: a KV cache in \w+ for 5 \+ 8 tokens each takes") as caught:
        Qwen3Engine(CONFIG, **(SIZES | {"format": name, "slots": 100_000, "prompts": 5}), memory=memory)
    fitting = int(re.search(r"; (\d+) slots would fit", str(caught.value))[1])
    engine = Qwen3Engine(CONFIG, **(SIZES | {"format": name, "slots": fitting, "prompts": 5}), memory=memory)
    with pytest.raises(ValueError, match=f"{fitting} slots would fit"):
        Qwen3Engine(CONFIG, **(SIZES | {"format": name, "slots": fitting + 1, "prompts": 5}), memory=memory)
    # what was reckoned is what is taken
    served = jax.eval_shape(engine.sync, abstract_params(CONFIG), 0)
    tokens, lengths = np.zeros((5, engine.max_prompt_length), np.int32), np.ones(5, np.int32)
    prompts = jax.eval_shape(engine.decoder.prefill, served, tokens, lengths).caches
    arrays = jax.tree.leaves((served, prompts, jax.eval_shape(engine.init_decode_state)))
    taken = sum(leaf.size * leaf.dtype.itemsize for leaf in arrays)
    assert taken <= memory < taken * (1 + 1 / fitting)


def test_the_kv_cache_is_chosen_apart_from_the_format():
    sizes = {"slots": 2, "max_prompt_length": 2, "max_response_length": 2, "end_tokens": [0]}
    for kv_cache, stored in {"auto": "bfloat16", "int8": "int8", "fp8": "float8_e4m3fn", "float32": "float32"}.items():
        engine = Qwen3Engine(CONFIG, format="int4", kv_cache=kv_cache, **sizes)
        assert jax.eval_shape(engine.init_decode_state).caches[1].v.dtype == stored
    assert cache_dtype(formats["int4"], "auto") == jnp.bfloat16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limits": np.array([1, 0])}, f"limit of a response is 0; this engine takes 1 to {T}"),
        ({"limits": T + 1}, f"limit of a response is {T + 1}; this engine takes 1 to {T}"),
        ({"temperatures": -0.5}, "temperature is -0.5; this engine takes at least 0"),
        ({"top_ks": 5}, "top_k is 5; this engine takes 0 to 4"),
        ({"top_ps": 0.0, "top_ks": 2}, "top_p is 0.0; this engine takes 1.17"),
        ({"top_ps": 1.5, "top_ks": 2}, "top_p is 1.5; this engine takes "),
        (
            {"top_ps": np.array([1.0, 0.9]), "top_ks": np.array([2, 0])},
            "top_p is 0.9 without top_k; this engine records",
        ),
        ({"stop_tokens": [1, 2, 3, 4, 5]}, "number of stop tokens is 5; this engine takes 1 to 4"),
    ],
)
def test_a_request_that_an_engine_which_records_does_not_take_is_refused(settings, message):
    engine = make_engine(max_candidates=4)
    with pytest.raises(ValueError, match=re.escape(message)):
        engine.make_requests(np.zeros((2, 2)), **settings)


@pytest.mark.parametrize(("ends", "held"), [(1, 4), (4, 4), (5, 8), (6, 8), (8, 8), (9, 16)])
def test_an_engine_ends_on_as_many_tokens_as_it_is_given(ends, held):
    engine = make_engine(end_tokens=tuple(range(ends)))
    stops = engine.make_requests(np.zeros((2, 2))).stop_tokens
    assert stops.tolist() == [[*range(ends), *[-1] * (held - ends)]] * 2
    # few capacities, so that engines of other ends have the same programs
    assert (engine.decoder == make_engine().decoder) == (held == 4)


def test_an_engine_that_records_nothing_takes_any_truncation():
    engine = make_engine()
    requests = engine.make_requests(np.zeros((2, 2)), top_ps=0.5, top_ks=np.array([0, NEVER]))
    assert requests.sampling.top_ps.tolist() == [0.5, 0.5]
    with pytest.raises(ValueError, match=f"top_k is {NEVER + 1}; this engine takes 0 to {NEVER}"):
        engine.make_requests(np.zeros((2, 2)), top_ks=NEVER + 1)


def test_a_token_that_the_vocabulary_lacks_is_refused(masters):
    engine = make_engine()
    with pytest.raises(ValueError, match=f"token of a prompt is {NEVER}; this engine takes 0 to {NEVER - 1}"):
        engine.prefill_many(engine.sync(masters, 0), [[NEVER]])


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
    assert len(np.unique(np.asarray(state.requests.keys)[:3], axis=0)) == 3
