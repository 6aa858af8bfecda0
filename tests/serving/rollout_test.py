import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcjax.models import ModelConfig, init_params, token_logps
from dcjax.models.cache import forward_cached, init_cache
from dcjax.serving import Qwen3Engine, quantize
from dcjax.serving.rollout import sample_responses

CONFIG = ModelConfig(vocab_size=16, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, head_dim=8)
UNTIED = dataclasses.replace(CONFIG, tie_embeddings=False)
QWEN2 = dataclasses.replace(CONFIG, family="qwen2")
MOE = dataclasses.replace(CONFIG, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
MIXED = dataclasses.replace(MOE, mlp_only_layers=(0,))
MODELS = {"tied": CONFIG, "untied": UNTIED, "qwen2": QWEN2, "moe": MOE, "mixed": MIXED}
FORMATS = ["float32", "bf16", "int8"]
P, T, END, G = 6, 10, 3, 8
PROMPTS = [[1, 2, 4], [5], [6, 7, 8, 9, 10, 1]]
TEMPERATURE = 0.8
CONTROL = 1e-4
"""Largest |p − q| of a token where both policies compute in float32."""


@functools.cache
def masters_of(config):
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        x = rng.normal(size=leaf.shape)
        return jnp.array(1 + 0.1 * x if "norm" in path[-1].key else x * leaf.shape[-1] ** -0.5, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(lambda: init_params(config, jax.random.key(0))))


@functools.cache
def make_engine(format, slots=8, steps_per_call=4, config=CONFIG):
    return Qwen3Engine(
        config,
        format=format,
        slots=slots,
        max_prompt_length=P,
        max_response_length=T,
        end_token=END,
        steps_per_call=steps_per_call,
    )


@functools.cache
def rollout_of(format, slots=8, steps_per_call=4, config=CONFIG, seed=1, temperature=TEMPERATURE):
    engine = make_engine(format, slots, steps_per_call, config)
    return sample_responses(
        engine,
        engine.sync(masters_of(config), 7),
        PROMPTS,
        samples_per_prompt=G,
        temperature=temperature,
        key=jax.random.key(seed),
    )


# for what is run once, so that compiling it is what takes time
FAST_COMPILE = {"xla_backend_optimization_level": 0}
scores = jax.jit(token_logps, static_argnums=0, static_argnames="response_length", compiler_options=FAST_COMPILE)


def trained_logps(config, rollout):
    """Teacher forcing through the training forward."""
    mask = np.concatenate([rollout.prompt_mask, rollout.response_mask], axis=1)
    arguments = {"response_length": T, "temperature": rollout.temperature}
    return np.asarray(scores(config, masters_of(config), rollout.tokens, mask, **arguments).logps)


def served_logps(engine, config, rollout):
    """Teacher forcing in the serving format: each whole sequence in one call, through the layer that decodes."""
    tokens = np.zeros((len(rollout.tokens), P + T), np.int32)
    lengths = rollout.prompt_mask.sum(1)
    for row, length in enumerate(lengths):
        tokens[row, : length + T] = rollout.tokens[row, P - length :]
    weights = engine.sync(masters_of(config), 0).weights

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def run(weights, tokens):
        positions = jnp.broadcast_to(jnp.arange(P + T), tokens.shape)
        caches = tuple(init_cache(config, len(tokens), P + T, engine.format.kv_cache) for _ in range(config.num_layers))
        x = quantize.lookup(weights["embed_tokens"], tokens, engine.format.activations)
        hidden, _, _ = forward_cached(config, weights, x, positions, caches, quantize.PRODUCTS)
        head = weights["embed_tokens" if config.tie_embeddings else "lm_head"]
        return quantize.logits(hidden.reshape(-1, config.hidden_size), head).reshape(*tokens.shape, -1)

    distribution = np.asarray(jax.nn.log_softmax(run(weights, tokens) / TEMPERATURE))
    logps = np.zeros((len(tokens), T), np.float32)
    for row, length in enumerate(lengths):
        columns = length + np.arange(T)
        logps[row] = distribution[row, columns - 1, tokens[row, columns]]
    return logps


def largest_gap(old_logps, rollout):
    """Of |exp old − exp rollout| over every response token, the first and the end token included."""
    gap = np.abs(np.exp(old_logps) - np.exp(rollout.rollout_logps))
    assert rollout.response_mask[:, 0].all()
    return gap[rollout.response_mask].max()


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_in_float32_log_probs_are_those_of_teacher_forcing_on_every_token(config):
    rollout = rollout_of("float32", config=config)
    assert rollout.finished.any()
    assert not rollout.finished.all()
    assert largest_gap(trained_logps(config, rollout), rollout) <= CONTROL


def test_log_probs_shifted_by_one_token_fail_that_very_check():
    rollout = rollout_of("float32")
    for shift in (-1, 1):
        shifted = dataclasses.replace(rollout, rollout_logps=np.roll(rollout.rollout_logps, shift, axis=1))
        assert largest_gap(trained_logps(CONFIG, rollout), shifted) > 100 * CONTROL


def test_log_probs_at_another_temperature_fail_that_very_check():
    rollout = rollout_of("float32")
    other = dataclasses.replace(rollout, temperature=np.ones_like(rollout.temperature))
    assert largest_gap(trained_logps(CONFIG, other), other) > 100 * CONTROL


@pytest.mark.parametrize("name", ["bf16", "int8"])
def test_experts_are_served_in_narrow_formats(name):
    rollout = rollout_of(name, config=MOE)
    gap = np.abs(np.exp(trained_logps(MOE, rollout)) - np.exp(rollout.rollout_logps))[rollout.response_mask]
    # a token whose experts flip may be far off; most are near, and none is exact
    assert 1e-5 < np.median(gap) < 0.02


@pytest.mark.parametrize(("name", "tolerance"), [("float32", 1e-5), ("bf16", 0.02), ("int8", 0.02)])
def test_in_any_format_log_probs_are_those_of_that_formats_own_numerics(name, tolerance):
    rollout = rollout_of(name)
    mask = rollout.response_mask
    error = np.abs(served_logps(make_engine(name), CONFIG, rollout) - rollout.rollout_logps)[mask]
    assert error.max() <= tolerance
    if name != "float32":
        # a real mismatch: the training policy is further away
        assert np.abs(trained_logps(CONFIG, rollout) - rollout.rollout_logps)[mask].mean() > 4 * error.mean()


@pytest.mark.parametrize("name", FORMATS)
def test_the_formats_sample_their_own_distributions(name):
    exact, rollout = rollout_of("float32"), rollout_of(name)
    same = np.array_equal(rollout.rollout_logps, exact.rollout_logps)
    assert same == (name == "float32")


@pytest.mark.parametrize("name", ["float32", "int8"])
@pytest.mark.parametrize(("slots", "steps_per_call"), [(3, 1), (32, 7)])
def test_the_tokens_depend_neither_on_the_slots_nor_on_the_steps_a_call(name, slots, steps_per_call):
    expected, other = rollout_of(name), rollout_of(name, slots, steps_per_call)
    for field in ("tokens", "prompt_mask", "response_mask", "versions", "finished", "temperature"):
        np.testing.assert_array_equal(getattr(other, field), getattr(expected, field), err_msg=field)
    np.testing.assert_allclose(other.rollout_logps, expected.rollout_logps, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FORMATS)
def test_a_rollout_is_what_its_types_say(name):
    rollout = rollout_of(name)
    rows, mask = len(PROMPTS) * G, rollout.response_mask
    lengths = mask.sum(1)
    assert rollout.tokens.shape == (rows, P + T)
    assert rollout.rollout_logps.dtype == np.float32
    # the samples of a prompt next to each other, prompts padded on the left
    for row in range(rows):
        prompt = PROMPTS[row // G]
        assert rollout.tokens[row, :P].tolist() == [0] * (P - len(prompt)) + prompt
        assert rollout.prompt_mask[row].tolist() == [False] * (P - len(prompt)) + [True] * len(prompt)
    # responses without holes, of at least one token
    np.testing.assert_array_equal(mask, np.arange(T) < lengths[:, None])
    assert lengths.min() >= 1
    responses = rollout.tokens[:, P:]
    assert (responses[~mask] == 0).all()
    assert (rollout.rollout_logps[~mask] == 0).all()
    assert (rollout.rollout_logps[mask] < 0).all()
    np.testing.assert_array_equal(rollout.versions, np.where(mask, 7, -1))
    np.testing.assert_array_equal(rollout.temperature, np.full(rows, TEMPERATURE, np.float32))


@pytest.mark.parametrize("name", FORMATS)
def test_the_end_token_is_the_last_one_counted_and_ends_the_response(name):
    rollout = rollout_of(name)
    responses, mask = rollout.tokens[:, P:], rollout.response_mask
    lengths = mask.sum(1)
    last = responses[np.arange(len(responses)), lengths - 1]
    np.testing.assert_array_equal(rollout.finished, last == END)
    assert ((responses == END) & mask).sum() == rollout.finished.sum() > 0
    assert (lengths[~rollout.finished] == T).all()
    assert (lengths[rollout.finished] < T).any()
    ends = rollout.rollout_logps[np.arange(len(responses)), lengths - 1][rollout.finished]
    assert (ends < 0).all()


def test_samples_of_one_prompt_differ_and_the_key_decides():
    rollout = rollout_of("float32")
    for prompt in range(len(PROMPTS)):
        assert len(np.unique(rollout.tokens[prompt * G : (prompt + 1) * G], axis=0)) > 1
    again = sample_responses(
        make_engine("float32"),
        make_engine("float32").sync(masters_of(CONFIG), 7),
        PROMPTS,
        samples_per_prompt=G,
        temperature=TEMPERATURE,
        key=jax.random.key(1),
    )
    for name, values in vars(rollout).items():
        np.testing.assert_array_equal(getattr(again, name), values, err_msg=name)
    assert not np.array_equal(rollout_of("float32", seed=2).tokens, rollout.tokens)


def test_at_temperature_zero_all_samples_of_a_prompt_are_one():
    rollout = rollout_of("float32", temperature=0.0)
    for prompt in range(len(PROMPTS)):
        assert len(np.unique(rollout.tokens[prompt * G : (prompt + 1) * G], axis=0)) == 1
    assert (rollout.rollout_logps == 0).all()
    assert len(np.unique(rollout.tokens, axis=0)) == len(PROMPTS)


def test_fewer_samples_than_slots_are_enough():
    engine = make_engine("float32")
    params = engine.sync(masters_of(CONFIG), 0)
    one = sample_responses(
        engine, params, PROMPTS[:1], samples_per_prompt=1, temperature=TEMPERATURE, key=jax.random.key(1)
    )
    full = rollout_of("float32")
    np.testing.assert_array_equal(one.tokens, full.tokens[:1])
    np.testing.assert_allclose(one.rollout_logps, full.rollout_logps[:1], atol=1e-5)


def test_hosts_that_share_the_prompts_sample_what_one_host_would():
    engine = make_engine("float32")
    params = engine.sync(masters_of(CONFIG), 7)
    rest = sample_responses(
        engine,
        params,
        PROMPTS[1:],
        samples_per_prompt=G,
        temperature=TEMPERATURE,
        key=jax.random.key(1),
        first_sample=G,
    )
    np.testing.assert_array_equal(rest.tokens, rollout_of("float32").tokens[G:])


def test_a_prompt_that_does_not_fit_is_refused():
    engine = make_engine("float32")
    params = engine.sync(masters_of(CONFIG), 0)
    for prompt in ([], [1] * (P + 1)):
        with pytest.raises(ValueError, match=f"prompt is {len(prompt)}; this engine takes 1 to {P}"):
            sample_responses(
                engine, params, [[1], prompt], samples_per_prompt=2, temperature=1.0, key=jax.random.key(0)
            )
