import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import UNOPTIMISED
from served import (
    DENSE,
    END,
    EXPERTS,
    MIXED,
    OTHER,
    PROMPTS,
    TEMPERATURE,
    G,
    P,
    T,
    engine_of,
    params_of,
    rollout_of,
    sample,
    trained_scores,
)
from tiny import masters

from dcjax.models.cache import forward_cached, init_cache
from dcjax.models.layers import EXACT
from dcjax.serving import decoder
from dcjax.serving import rollout as module
from dcjax.serving.decoder import NO_EXCESS_PRECISION
from dcjax.serving.formats.served import products
from dcjax.serving.rollout import Sampling, sample_responses

pytestmark = pytest.mark.heavy

FORMATS = ["float32", "int8"]
CONTROL = 1e-4
"""Largest |p − q| of a token where both policies compute in float32."""

SLOW = pytest.mark.slow


def trained_logps(config, rollout, **replayed):
    return np.asarray(trained_scores(config, rollout, **replayed).logps)


def served_logps(engine, config, rollout):
    """Teacher forcing in the serving format: each whole sequence in one call, through the layer that decodes."""
    tokens = np.zeros((len(rollout.tokens), P + T), np.int32)
    lengths = rollout.prompt_mask.sum(1)
    for row, length in enumerate(lengths):
        tokens[row, : length + T] = rollout.tokens[row, P - length :]
    weights = params_of(engine, config).weights

    @functools.partial(jax.jit, compiler_options=UNOPTIMISED | NO_EXCESS_PRECISION)
    def run(weights, tokens):
        positions = jnp.broadcast_to(jnp.arange(P + T), tokens.shape)
        caches = tuple(init_cache(config, len(tokens), P + T, engine.kv_cache) for _ in range(config.num_layers))
        x = weights["embed_tokens"].lookup(tokens, engine.format.activations)
        hidden = forward_cached(config, weights, x, positions, caches, products(config)).hidden
        head = weights["embed_tokens" if config.tie_embeddings else "lm_head"]
        return head.logits(hidden.reshape(-1, config.hidden_size), EXACT).reshape(*tokens.shape, -1)

    logits = np.asarray(run(weights, tokens), np.float64) / TEMPERATURE
    distribution = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
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


@pytest.mark.parametrize(
    "config",
    [DENSE, pytest.param(OTHER, marks=SLOW), MIXED, pytest.param(EXPERTS, marks=SLOW)],
    ids=["dense", "qwen2 untied", "mixed", "experts"],
)
def test_in_float32_log_probs_are_those_of_teacher_forcing_on_every_token(config):
    rollout = rollout_of("float32", config)
    assert rollout.finished.any()
    assert not rollout.finished.all()
    assert largest_gap(trained_logps(config, rollout), rollout) <= CONTROL


def test_log_probs_shifted_by_one_token_fail_that_very_check():
    rollout = rollout_of("float32")
    for shift in (-1, 1):
        shifted = dataclasses.replace(rollout, rollout_logps=np.roll(rollout.rollout_logps, shift, axis=1))
        assert largest_gap(trained_logps(DENSE, rollout), shifted) > 100 * CONTROL


def test_log_probs_at_another_temperature_fail_that_very_check():
    rollout = rollout_of("float32")
    other = dataclasses.replace(rollout, temperature=np.ones_like(rollout.temperature))
    assert largest_gap(trained_logps(DENSE, other), other) > 100 * CONTROL


def test_experts_are_served_in_narrow_formats():
    rollout = rollout_of("int8", MIXED)
    gap = np.abs(np.exp(trained_logps(MIXED, rollout)) - np.exp(rollout.rollout_logps))[rollout.response_mask]
    # a token whose experts flip may be far off; most are near, and none is exact
    assert 1e-5 < np.median(gap) < 0.02


@pytest.mark.parametrize(("name", "tolerance"), [pytest.param("float32", 1e-5, marks=SLOW), ("int8", 0.02)])
def test_in_any_format_log_probs_are_those_of_that_formats_own_numerics(name, tolerance):
    rollout = rollout_of(name)
    mask = rollout.response_mask
    error = np.abs(served_logps(engine_of(name), DENSE, rollout) - rollout.rollout_logps)[mask]
    assert error.max() <= tolerance
    if name != "float32":
        # a real mismatch: the training policy is further away
        assert np.abs(trained_logps(DENSE, rollout) - rollout.rollout_logps)[mask].mean() > 4 * error.mean()


@pytest.mark.parametrize("name", FORMATS)
def test_the_formats_sample_their_own_distributions(name):
    exact, rollout = rollout_of("float32"), rollout_of(name)
    same = np.array_equal(rollout.rollout_logps, exact.rollout_logps)
    assert same == (name == "float32")


def assert_same_samples(other, expected):
    for field in (
        "tokens",
        "attention_mask",
        "response_mask",
        "versions",
        "finished",
        "temperature",
        "candidate_tokens",
    ):
        np.testing.assert_array_equal(getattr(other, field), getattr(expected, field), err_msg=field)
    for field in ("rollout_logps", "log_mass"):
        np.testing.assert_allclose(getattr(other, field), getattr(expected, field), rtol=0, atol=1e-5, err_msg=field)


def test_slots_steps_a_call_pieces_of_prompts_and_when_noise_is_drawn_change_no_sample(monkeypatch):
    """All at once, with experts recorded; each of its own with the slow tests."""
    monkeypatch.setattr(decoder, "NOISE_AHEAD", 0)
    monkeypatch.setattr(module, "REFILLS_PER_CALL", 2)
    # 7 does not divide the tokens of a response, and 4 not the prompts' width
    engine = engine_of("float32", MIXED, slots=3, steps_per_call=7, prefill_tokens=4)
    other, expected = sample(engine, MIXED), rollout_of("float32", MIXED)
    assert_same_samples(other, expected)
    np.testing.assert_array_equal(other.experts, expected.experts)


@SLOW
@pytest.mark.parametrize(("name", "slots", "steps_per_call"), [("float32", 3, 1), ("float32", 32, 7), ("int8", 3, 1)])
def test_the_tokens_depend_neither_on_the_slots_nor_on_the_steps_a_call(name, slots, steps_per_call):
    assert_same_samples(sample(engine_of(name, slots=slots, steps_per_call=steps_per_call)), rollout_of(name))


@SLOW
@pytest.mark.parametrize("prefill_tokens", [4, P, 2 * P])
def test_the_samples_do_not_depend_on_how_prompts_are_prefilled(prefill_tokens):
    """In pieces of 4 tokens that the prompts' width is no multiple of, one prompt a pass, and two of three."""
    assert_same_samples(sample(engine_of("float32", prefill_tokens=prefill_tokens)), rollout_of("float32"))


@pytest.mark.parametrize("prefill_tokens", [4, P, 2 * P])
def test_prompts_leave_the_same_behind_however_they_are_prefilled(prefill_tokens):
    """In pieces, one prompt a pass, and two of three."""
    whole, other = (
        engine.prefill_many(params_of(engine, MIXED), PROMPTS)
        for engine in (engine_of("float32", MIXED), engine_of("float32", MIXED, prefill_tokens=prefill_tokens))
    )
    for name in ("tokens", "positions"):
        np.testing.assert_array_equal(getattr(other, name), getattr(whole, name))
    for row, prompt in enumerate(PROMPTS):
        real = len(prompt)
        np.testing.assert_array_equal(np.asarray(other.experts)[row, :real], np.asarray(whole.experts)[row, :real])
        for ours, theirs in zip(jax.tree.leaves(other.caches), jax.tree.leaves(whole.caches), strict=True):
            ours, theirs = (np.asarray(leaf)[row, :, :real] for leaf in (ours, theirs))
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


@SLOW
def test_neither_when_noise_is_drawn_nor_how_long_a_call_runs_changes_a_sample(monkeypatch):
    monkeypatch.setattr(decoder, "NOISE_AHEAD", 0)
    monkeypatch.setattr(module, "REFILLS_PER_CALL", 2)
    # another engine, so that its programs are compiled with these
    assert_same_samples(sample(engine_of("float32", max_stop_tokens=3)), rollout_of("float32"))


def test_how_long_a_call_runs_changes_no_sample(monkeypatch):
    monkeypatch.setattr(module, "REFILLS_PER_CALL", 2)
    engine = engine_of("float32")
    params = params_of(engine)
    sampling = Sampling(engine, params, PROMPTS, samples_per_prompt=G, key=jax.random.key(1), temperature=TEMPERATURE)
    calls = 1
    while not sampling.advance(params):
        calls += 1
    # 24 samples of at most 20 tokens, over 8 slots in calls of 2 × 4 tokens
    assert 2 < calls <= 8
    assert_same_samples(sampling.rollout(), rollout_of("float32"))


def test_samples_are_handed_over_once_each_as_they_end(monkeypatch):
    monkeypatch.setattr(module, "REFILLS_PER_CALL", 1)
    engine = engine_of("float32")
    params = params_of(engine)
    drawn = {"samples_per_prompt": G, "temperature": TEMPERATURE, "key": jax.random.key(1)}
    sampling = Sampling(engine, params, PROMPTS, **drawn)
    parts, rollout = list(sampling.as_they_end(params)), sampling.rollout()
    assert_same_samples(rollout, rollout_of("float32"))
    assert sorted(np.concatenate([part.samples for part in parts])) == list(range(len(PROMPTS) * G))
    assert sum(len(part.samples) > 0 for part in parts) > 2
    for part in parts:
        np.testing.assert_array_equal(part.finished, rollout.finished[part.samples])
        for number, response in zip(part.samples, part.responses, strict=True):
            np.testing.assert_array_equal(response, rollout.tokens[number, P:][rollout.response_mask[number]])
    assert 0 < rollout.finished.sum() < len(rollout.finished)


def test_weights_swapped_in_flight_are_those_of_each_tokens_version(monkeypatch):
    monkeypatch.setattr(module, "REFILLS_PER_CALL", 1)
    engine = engine_of("float32")
    # a final norm of its own leaves the cache as it is, so that the training forward of either tells the log-probs
    both = [masters(DENSE), masters(DENSE) | {"norm": masters(DENSE)["norm"] * 2.5}]
    served = [engine.sync(params, version) for version, params in zip((4, 9), both, strict=True)]
    key = jax.random.key(3)
    sampling = Sampling(engine, served[0], PROMPTS, samples_per_prompt=G, key=key, temperature=1.0)
    assert not sampling.advance(served[0])
    while not sampling.advance(served[1]):
        pass
    rollout, real = sampling.rollout(), sampling.rollout().response_mask
    # the first call's: the first tokens of the samples that were in the slots
    early = (np.arange(len(real)) < engine.slots)[:, None] & (np.arange(T) < engine.steps_per_call)
    np.testing.assert_array_equal(rollout.versions, np.where(real, np.where(early, 4, 9), -1))
    old, new = (np.asarray(trained_scores(DENSE, rollout, params).logps) for params in both)
    own, others = np.where(early, old, new), np.where(early, new, old)
    for part in (real & early, real & ~early):
        assert np.abs(own - rollout.rollout_logps)[part].max() < 1e-4
        assert np.median(np.abs(others - rollout.rollout_logps)[part]) > 0.05


# --- truncated sampling, replayed ---


@pytest.mark.parametrize(("top_k", "top_p"), [(4, 1.0), (6, 0.8)])
def test_truncated_log_probs_are_the_trainers_where_the_support_is_replayed_and_only_there(top_k, top_p):
    rollout = rollout_of("float32", top_k=top_k, top_p=top_p)
    real = rollout.response_mask
    replayed = trained_logps(DENSE, rollout, candidate_tokens=rollout.candidate_tokens)
    assert np.abs(replayed - rollout.rollout_logps)[real].max() <= 1e-4
    whole = trained_logps(DENSE, rollout)
    assert np.abs(whole - rollout.rollout_logps)[real].min() > 1e-3
    # what was cut off is all that lies between
    np.testing.assert_allclose((whole - rollout.log_mass)[real], rollout.rollout_logps[real], atol=1e-4)
    # each token is one of those that could be drawn, which are as many as were asked for, or fewer
    assert (rollout.candidate_tokens == rollout.tokens[:, P:, None]).any(axis=-1)[real].all()
    kept = (rollout.candidate_tokens >= 0).sum(axis=-1)[real]
    assert (kept == top_k).all() if top_p == 1 else (kept.min() < kept.max() <= top_k)
    assert (rollout.candidate_tokens[~real] == -1).all() and (rollout.log_mass[~real] == 0).all()


def test_what_is_not_truncated_is_recorded_as_whole():
    rollout = rollout_of("float32")
    assert (rollout.candidate_tokens == -1).all() and (rollout.log_mass == 0).all()
    replayed = trained_logps(DENSE, rollout, candidate_tokens=rollout.candidate_tokens)
    np.testing.assert_allclose(replayed, trained_logps(DENSE, rollout), rtol=1e-5)


# --- routing, recorded and replayed ---


@pytest.mark.parametrize("config", [pytest.param(EXPERTS, marks=SLOW), MIXED], ids=["experts", "mixed"])
def test_the_recorded_experts_are_those_of_the_training_forward(config):
    rollout = rollout_of("float32", config)
    chosen = np.moveaxis(np.asarray(trained_scores(config, rollout).router.experts), 0, 2)
    mask = rollout.attention_mask
    # what is fed predicts a token: all but each response's last
    fed = mask[:, :-1] & mask[:, 1:]
    assert rollout.experts.shape == chosen.shape == (len(mask), P + T - 1, sum(config.sparse_layers), 2)
    np.testing.assert_array_equal(rollout.experts[fed], chosen[fed])
    assert (rollout.experts[:, : P - 1][~rollout.prompt_mask[:, :-1]] == 0).all()
    # neither constant nor the same in every layer
    assert len(np.unique(chosen[fed])) == config.num_experts


@pytest.mark.parametrize("name", ["float32", "int8"])
def test_replayed_experts_bring_the_trainer_closer(name):
    rollout = rollout_of(name, MIXED)
    experts = np.moveaxis(rollout.experts, 2, 0).astype(np.int32)

    def gap(**replayed):
        return np.abs(trained_logps(MIXED, rollout, **replayed) - rollout.rollout_logps)[rollout.response_mask]

    if name == "float32":
        assert gap(experts=experts).max() <= 1e-4
        assert gap(experts=(experts + 1) % MIXED.num_experts).max() > 0.05
    else:
        assert gap(experts=experts).mean() < gap().mean()


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
    again = sample(engine_of("float32"))
    for name, values in ((name, values) for name, values in vars(rollout).items() if values is not None):
        np.testing.assert_array_equal(getattr(again, name), values, err_msg=name)
    assert not np.array_equal(rollout_of("float32", seed=2).tokens, rollout.tokens)


def test_at_temperature_zero_all_samples_of_a_prompt_are_one():
    rollout = rollout_of("float32", temperature=0.0)
    for prompt in range(len(PROMPTS)):
        assert len(np.unique(rollout.tokens[prompt * G : (prompt + 1) * G], axis=0)) == 1
    assert (rollout.rollout_logps == 0).all()
    assert len(np.unique(rollout.tokens, axis=0)) == len(PROMPTS)


def test_fewer_samples_than_slots_are_enough():
    engine = engine_of("float32")
    params = params_of(engine)
    settings = {"samples_per_prompt": 1, "temperature": TEMPERATURE, "key": jax.random.key(1)}
    one = sample_responses(engine, params, PROMPTS[:1], **settings)
    full = rollout_of("float32")
    np.testing.assert_array_equal(one.tokens, full.tokens[:1])
    np.testing.assert_allclose(one.rollout_logps, full.rollout_logps[:1], atol=1e-5)


def test_a_prompt_that_does_not_fit_is_refused():
    engine = engine_of("float32")
    params = params_of(engine)
    for prompt in ([], [1] * (P + 1)):
        with pytest.raises(ValueError, match=f"prompt is {len(prompt)}; this engine takes 1 to {P}"):
            sample_responses(
                engine, params, [[1], prompt], samples_per_prompt=2, temperature=1.0, key=jax.random.key(0)
            )


def test_six_end_tokens_cut_what_would_go_on_at_the_first_of_them():
    ends = (2, 4, 7, 11, 13, 19)
    rollout = sample(engine_of("float32", end_tokens=ends))
    unending = sample(engine_of("float32"), stop_tokens=[-1])
    tokens, whole = rollout.tokens[:, P:], unending.tokens[:, P:]
    found = np.isin(whole, ends)
    lengths = np.where(found.any(axis=1), found.argmax(axis=1) + 1, T)
    mask = np.arange(T) < lengths[:, None]
    np.testing.assert_array_equal(rollout.response_mask, mask)
    np.testing.assert_array_equal(tokens, np.where(mask, whole, 0))
    np.testing.assert_array_equal(rollout.finished, found.any(axis=1))
    # the token that ends a response is scored as it is where the response goes on
    np.testing.assert_allclose(rollout.rollout_logps, np.where(mask, unending.rollout_logps, 0), atol=1e-5)
    # more of them than a request may usually name
    assert len(np.unique(tokens[np.arange(len(tokens)), lengths - 1][rollout.finished])) > 4


def test_other_stop_tokens_end_a_response_too():
    rollout = sample(engine_of("float32"), stop_tokens=[2, 11])
    responses, real = rollout.tokens[:, P:], rollout.response_mask
    stops = np.isin(responses, [2, 11]) & real
    lengths = real.sum(axis=1)
    np.testing.assert_array_equal(rollout.finished, stops.any(axis=1))
    assert (stops.argmax(axis=1)[rollout.finished] == lengths[rollout.finished] - 1).all()
    assert (lengths[~rollout.finished] == T).all() and 0 < rollout.finished.sum() < len(lengths)
    # the engine's own does not
    assert ((responses == END) & real & (np.arange(T) < lengths[:, None] - 1)).any()
