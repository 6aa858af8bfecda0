import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import UNOPTIMISED, jit
from jax.sharding import PartitionSpec
from tiny import DENSE, EXPERTS, masters

from dcjax.models import (
    Precision,
    abstract_params,
    forward,
    init_params,
    logical_axes,
)
from dcjax.models.attention import causal_attention
from dcjax.models.block import block, training_products
from dcjax.models.layers import rope_table
from dcjax.models.parameters import layer_params
from dcjax.models.transformer import Transformer, hidden_states, logits
from dcjax.sharding.rules import RULES

pytestmark = pytest.mark.heavy

QWEN2 = dataclasses.replace(DENSE, family="qwen2")
LLAMA = dataclasses.replace(DENSE, family="llama")
# layers 1 and 3 have experts; and in the second, only layer 2 has
ALTERNATING = dataclasses.replace(EXPERTS, num_layers=4, decoder_sparse_step=2)
IRREGULAR = dataclasses.replace(EXPERTS, num_layers=3, mlp_only_layers=(0, 1))
ARCHITECTURES = {
    "qwen3": DENSE,
    "qwen2": QWEN2,
    "llama": LLAMA,
    "moe": EXPERTS,
    "alternating": ALTERNATING,
    "irregular": IRREGULAR,
}


def of_architectures(*everyday, others=tuple(ARCHITECTURES)):
    """These every day, and the others with the slow tests."""
    cases = [
        pytest.param(ARCHITECTURES[name], id=name, marks=() if name in everyday else pytest.mark.slow)
        for name in dict.fromkeys([*everyday, *others])
    ]
    return pytest.mark.parametrize("config", cases)


# what is run a few times takes its time compiling
ROWS, COLUMNS = 4, 10
EVERYTHING = np.ones((ROWS, COLUMNS), bool)

fresh = jax.jit(init_params, static_argnums=0)


@functools.partial(jit, static_argnums=0)
def run(config, params, tokens, mask=None, segment_ids=None, experts=None):
    """Logits, hidden states, and what the routers did."""
    hidden, record = hidden_states(config, params, tokens, mask, segment_ids=segment_ids, experts=experts)
    return logits(config, params, hidden), hidden, record


def random_tokens(seed=0):
    return np.random.default_rng(seed).integers(0, DENSE.vocab_size, (ROWS, COLUMNS)).astype(np.int32)


def logits_alone(config, tokens):
    """Of tokens with padding behind them."""
    length = tokens.shape[1]
    padded = np.pad(tokens, ((0, 0), (0, COLUMNS - length)))
    return run(config, masters(config), padded, EVERYTHING & (np.arange(COLUMNS) < length))[0][:, :length]


@of_architectures("qwen3", "qwen2", "alternating", "irregular")
def test_a_later_token_changes_nothing_earlier(config):
    tokens = random_tokens()
    changed = tokens.copy()
    changed[:, 4] = (changed[:, 4] + 1) % config.vocab_size
    before, after = (run(config, masters(config), x, EVERYTHING)[0] for x in (tokens, changed))
    np.testing.assert_allclose(before[:, :4], after[:, :4], atol=1e-5)
    assert (np.abs(before - after)[:, 4:].max(-1) > 1e-3).all()


@of_architectures("qwen3", "qwen2", "alternating", "irregular")
@pytest.mark.parametrize("holes", [[0, 1, 2, 3], [6, 7, 8, 9], [0, 1, 2, 9], [0, 3, 4, 8]])
def test_padding_anywhere_changes_nothing(config, holes):
    tokens = random_tokens()[:, :6]
    # padding of any ids, not of one that happens to be harmless
    padded = random_tokens(seed=1)
    real = np.setdiff1d(np.arange(COLUMNS), holes)
    padded[:, real] = tokens
    mask = EVERYTHING.copy()
    mask[:, holes] = False
    padded_logits = run(config, masters(config), padded, mask)[0]
    np.testing.assert_allclose(padded_logits[:, real], logits_alone(config, tokens), atol=1e-5)
    assert np.isfinite(padded_logits).all()


@of_architectures("qwen3", "alternating")
def test_packed_segments_are_rows_of_their_own(config):
    tokens = random_tokens()
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 2, 0], [3, 3, 3, 3, 7, 7, 7, 7, 7, 0]]).repeat(2, axis=0)
    packed = run(config, masters(config), tokens, segment_ids=segments)[0]
    np.testing.assert_allclose(packed[:, :4], logits_alone(config, tokens[:, :4]), atol=1e-5)
    np.testing.assert_allclose(packed[:, 4:9], logits_alone(config, tokens[:, 4:9]), atol=1e-5)
    assert np.isfinite(packed).all()


def test_segments_and_a_mask_together_are_refused():
    tokens = random_tokens()
    with pytest.raises(ValueError, match="attention_mask and segment_ids were both given"):
        hidden_states(DENSE, masters(DENSE), tokens, EVERYTHING, segment_ids=tokens)


def test_no_mask_means_that_every_token_is_real():
    params, tokens = masters(DENSE), random_tokens()
    unmasked = jit(functools.partial(forward, DENSE))(params, tokens)
    np.testing.assert_allclose(unmasked, run(DENSE, params, tokens, EVERYTHING)[0], atol=1e-6)


@of_architectures("qwen3", others=["alternating"])
def test_what_is_kept_for_the_backward_pass_changes_neither_values_nor_gradients(config):
    params, tokens = masters(config), random_tokens()
    weights = np.random.default_rng(3).normal(size=(ROWS, COLUMNS, config.vocab_size)).astype(np.float32)

    def differentiate(remat):
        kept = dataclasses.replace(config, remat=remat)
        loss = jax.jit(jax.value_and_grad(lambda p: jnp.sum(forward(kept, p, tokens) * weights))).trace(params)
        return loss.lower().compile(UNOPTIMISED)(params), "remat" in str(loss.jaxpr)

    everything, is_recomputed = differentiate("none")
    assert not is_recomputed
    for remat in ("products", "full"):
        rebuilt, is_recomputed = differentiate(remat)
        assert is_recomputed
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), everything, rebuilt)


def test_less_is_kept_the_more_is_computed_again():
    config = dataclasses.replace(DENSE, num_layers=8)
    tokens = jax.ShapeDtypeStruct((8, 64), jnp.int32)

    def temporaries(remat):
        kept = dataclasses.replace(config, remat=remat)
        loss = jax.jit(jax.grad(lambda p, tokens: jnp.sum(forward(kept, p, tokens))), compiler_options=UNOPTIMISED)
        return loss.lower(abstract_params(config), tokens).compile().memory_analysis().temp_size_in_bytes

    assert temporaries("none") > 1.5 * temporaries("products") > 1.5 * 1.5 * temporaries("full")


@pytest.mark.parametrize("remat", ["products", "full"])
@of_architectures("qwen3", others=["moe"])
def test_the_program_does_not_grow_with_depth(config, remat):
    def lines(num_layers):
        deep = dataclasses.replace(config, remat=remat, num_layers=num_layers)
        loss = jax.jit(jax.grad(lambda p, tokens: jnp.sum(forward(deep, p, tokens))))
        return len(loss.lower(abstract_params(deep), jax.ShapeDtypeStruct((2, 6), jnp.int32)).as_text().splitlines())

    assert lines(4) == lines(36)


head_of = jax.jit(logits, static_argnums=0)


def test_an_untied_head_is_a_table_of_its_own():
    config = dataclasses.replace(DENSE, tie_embeddings=False)
    params = masters(config)
    assert params["lm_head"].shape == (config.vocab_size, config.hidden_size)
    as_tied, hidden, _ = run(DENSE, {name: params[name] for name in masters(DENSE)}, random_tokens(), EVERYTHING)
    untied = head_of(config, params, hidden)
    assert np.abs(untied - as_tied).max() > 1e-2
    # with the same table in both places the two are one model, and the head is linear in its table
    same = head_of(config, params | {"lm_head": params["embed_tokens"]}, hidden)
    np.testing.assert_allclose(same, as_tied, atol=1e-6)
    tripled = head_of(config, params | {"lm_head": 3 * np.asarray(params["lm_head"])}, hidden)
    np.testing.assert_allclose(tripled, 3 * np.asarray(untied), rtol=1e-5, atol=1e-5)


@jit
def one_layer(weights, x):
    """What a layer leaves in the residual stream, with experts where its weights have a router."""
    rope = rope_table(np.arange(COLUMNS)[None], COLUMNS, EXPERTS.head_dim, EXPERTS.rope_theta)

    def attend(q, k, v):
        return causal_attention(q, k, v, kernel="xla"), None

    return block(EXPERTS, weights, x, rope, attend, training_products(Precision()))[0]


@of_architectures("qwen3", "alternating", "irregular", others=["moe"])
def test_the_stack_is_its_layers_one_by_one(config):
    params, tokens = masters(config), random_tokens()
    x = np.asarray(params["embed_tokens"])[tokens]
    for layer in range(config.num_layers):
        x = one_layer(layer_params(config, jax.tree.map(np.asarray, params["layers"]), layer), x)
    wide = np.asarray(x, np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + config.rms_norm_eps) * np.asarray(params["norm"])
    np.testing.assert_allclose(run(config, params, tokens, EVERYTHING)[1], expected, atol=2e-5)


def test_own_choices_of_experts_replayed_change_nothing_and_others_do():
    params, tokens = masters(ALTERNATING), random_tokens()
    mask = EVERYTHING.copy()
    mask[0, :2] = mask[1, -3:] = mask[2, 4] = False
    _, hidden, record = run(ALTERNATING, params, tokens, mask)
    assert record.experts.shape == (2, ROWS, COLUMNS, 2)
    _, again, replayed = run(ALTERNATING, params, tokens, mask, experts=record.experts)
    np.testing.assert_allclose(again[mask], hidden[mask], atol=1e-6)
    np.testing.assert_array_equal(replayed.experts[:, mask], record.experts[:, mask])
    # another choice at one real token moves that token and later ones of its row, and no other
    experts = np.array(record.experts)
    experts[0, 0, 5] = (experts[0, 0, 5] + 1) % ALTERNATING.num_experts
    moved = np.abs(np.asarray(run(ALTERNATING, params, tokens, mask, experts=experts)[1]) - hidden).max(-1)
    assert (moved[0, 5:] > 1e-4).all()
    assert moved[0, 2:5].max() < 1e-5
    assert moved[1:][mask[1:]].max() < 1e-5


def test_router_metrics_are_of_real_tokens_and_by_row():
    params, tokens, other = masters(ALTERNATING), random_tokens(), random_tokens(seed=1)
    mask = EVERYTHING.copy()
    mask[1, 5:] = False
    metrics = run(ALTERNATING, params, tokens, mask)[2].metrics
    assert set(metrics) >= {"router/load_balance", "router/z"}
    # the same real tokens elsewhere, with other padding, beside other rows
    other[2, 3:8], elsewhere = tokens[1, :5], EVERYTHING.copy()
    elsewhere[2] = (np.arange(COLUMNS) >= 3) & (np.arange(COLUMNS) < 8)
    alone = run(ALTERNATING, params, other, elsewhere)[2].metrics
    for name, rows in metrics.items():
        assert rows.shape == (ROWS,)
        np.testing.assert_allclose(rows[1], alone[name][2], rtol=1e-5)
        assert np.abs(np.asarray(rows) - alone[name])[[0, 2, 3]].min() > 1e-4


def test_the_flax_module_is_the_same_function():
    params, tokens = masters(DENSE), random_tokens()
    module = jax.make_jaxpr(lambda params: Transformer(DENSE).apply({"params": params}, tokens))(params)
    assert str(module) == str(jax.make_jaxpr(lambda params: hidden_states(DENSE, params, tokens))(params))


@pytest.mark.parametrize("name", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_a_narrow_policy_computes_narrow_and_is_close(name):
    params, tokens = masters(ALTERNATING), random_tokens()
    narrow = dataclasses.replace(ALTERNATING, precision=Precision(compute=name))
    near, hidden, _ = run(narrow, params, tokens, EVERYTHING)
    assert hidden.dtype == {"bf16": jnp.bfloat16, "fp16": jnp.float16}[name]
    # the experts may flip, so that only most tokens are near
    error = np.abs(np.asarray(near) - run(ALTERNATING, params, tokens, EVERYTHING)[0]).max(-1)
    assert 0 < np.median(error) < 0.1
    grads = jax.eval_shape(jax.grad(lambda p: jnp.sum(forward(narrow, p, tokens))), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}


def test_parameters_are_created_in_the_dtype_of_the_policy():
    narrow = dataclasses.replace(EXPERTS, precision=Precision(parameters="bf16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract_params(narrow))} == {jnp.dtype(jnp.bfloat16)}


def test_a_float32_head_is_nearer_to_float32_than_a_bf16_one():
    params, tokens = masters(DENSE), random_tokens()
    exact = run(DENSE, params, tokens, EVERYTHING)[0]
    computed = dataclasses.replace(DENSE, precision=Precision(compute="bf16"))
    of_wide_head, hidden, _ = run(computed, params, tokens, EVERYTHING)
    of_narrow_head = head_of(
        dataclasses.replace(DENSE, precision=Precision(compute="bf16", head="bf16")), params, hidden
    )
    expected = np.asarray(hidden, np.float64) @ np.asarray(params["embed_tokens"], np.float64).T
    wide, narrow, common = (np.abs(expected - x).max() for x in (of_wide_head, of_narrow_head, exact))
    assert wide < 1e-5 < narrow < common


def test_fresh_parameters_are_float32_and_of_the_key():
    first, again, other = (fresh(DENSE, jax.random.key(seed)) for seed in (0, 0, 1))
    assert {leaf.dtype for leaf in jax.tree.leaves(first)} == {jnp.dtype(jnp.float32)}
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert np.abs(first["embed_tokens"] - other["embed_tokens"]).max() > 0.1
    # layers are stacked, and each drawn from a key of its own
    kernel = first["layers"]["q_proj"]
    assert kernel.shape[0] == DENSE.num_layers
    assert np.abs(kernel[0] - kernel[1]).max() > 0.1


@of_architectures(*ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
def test_every_axis_has_a_name_that_the_sharding_rules_know(config, tied):
    config = dataclasses.replace(config, tie_embeddings=tied)
    axes = logical_axes(config)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    named = jax.tree.map(lambda spec, leaf: (tuple(spec), leaf.ndim), axes, shapes, is_leaf=is_spec)
    pairs = jax.tree.leaves(named, is_leaf=lambda x: isinstance(x, tuple))
    assert len(pairs) == len(jax.tree.leaves(shapes))
    for names, ndim in pairs:
        assert len(names) == ndim
        assert set(names) <= set(RULES)
    if config == DENSE:
        assert axes["layers"]["down_proj"] == PartitionSpec("layers", "mlp", "embed")


def is_spec(x):
    return isinstance(x, PartitionSpec)
