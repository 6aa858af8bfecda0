import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dcjax.models import (
    ModelConfig,
    Precision,
    abstract_params,
    count_params,
    forward,
    init_params,
    logical_axes,
    presets,
)
from dcjax.models.attention import causal_attention
from dcjax.models.block import block, training_products
from dcjax.models.layers import rope_table
from dcjax.models.transformer import Transformer, hidden_states, layer_params
from dcjax.sharding.rules import RULES

SMALL = ModelConfig(vocab_size=17, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, head_dim=8)
QWEN2 = dataclasses.replace(SMALL, family="qwen2")
MOE = dataclasses.replace(SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12)
# layers 1 and 3 have experts; and in the second, only layer 2 has
ALTERNATING = dataclasses.replace(MOE, num_layers=4, decoder_sparse_step=2)
IRREGULAR = dataclasses.replace(MOE, num_layers=3, mlp_only_layers=(0, 1))
ARCHITECTURES = {"qwen3": SMALL, "qwen2": QWEN2, "moe": MOE, "alternating": ALTERNATING, "irregular": IRREGULAR}
every_architecture = pytest.mark.parametrize("config", ARCHITECTURES.values(), ids=ARCHITECTURES)

# for what is run once, so that compiling it is what takes time
FAST_COMPILE = {"xla_backend_optimization_level": 0}

logits_of = jax.jit(forward, static_argnums=0)
states_of = jax.jit(hidden_states, static_argnums=0)
fresh = jax.jit(init_params, static_argnums=0)


@functools.cache
def perturbed(config, seed=0):
    """Random parameters whose norms are not all one."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        x = rng.normal(size=leaf.shape)
        return jnp.array(1 + 0.1 * x if "norm" in path[-1].key else x * leaf.shape[-1] ** -0.5, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(config))


def random_tokens(config, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, config.vocab_size, shape).astype(np.int32)


@every_architecture
def test_a_later_token_changes_nothing_earlier(config):
    params = perturbed(config)
    tokens = random_tokens(config, 4, 6)
    changed = tokens.copy()
    changed[:, 4] = (changed[:, 4] + 1) % config.vocab_size
    before, after = logits_of(config, params, tokens), logits_of(config, params, changed)
    np.testing.assert_allclose(before[:, :4], after[:, :4], atol=1e-5)
    assert (np.abs(before - after)[:, 4:].max(-1) > 1e-3).all()


@every_architecture
@pytest.mark.parametrize("holes", [[0, 1, 2, 3], [6, 7, 8, 9], [0, 1, 2, 9], [0, 3, 4, 8]])
def test_padding_anywhere_changes_nothing(config, holes):
    params = perturbed(config)
    tokens = random_tokens(config, 4, 6)
    plain = logits_of(config, params, tokens)
    # padding of any ids, not of one that happens to be harmless
    padded = random_tokens(config, 4, 10, seed=1)
    real = np.setdiff1d(np.arange(10), holes)
    padded[:, real] = tokens
    mask = np.zeros(padded.shape, bool)
    mask[:, real] = True
    logits = logits_of(config, params, padded, mask)
    np.testing.assert_allclose(logits[:, real], plain, atol=1e-5)
    assert np.isfinite(logits).all()


@every_architecture
def test_packed_segments_are_rows_of_their_own(config):
    params, tokens = perturbed(config), random_tokens(config, 2, 10)
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 2, 0], [3, 3, 3, 3, 7, 7, 7, 7, 7, 0]])
    packed = logits_of(config, params, tokens, segment_ids=segments)
    np.testing.assert_allclose(packed[:, :4], logits_of(config, params, tokens[:, :4]), atol=1e-5)
    np.testing.assert_allclose(packed[:, 4:9], logits_of(config, params, tokens[:, 4:9]), atol=1e-5)
    assert np.isfinite(packed).all()


def test_segments_and_a_mask_together_are_refused():
    tokens = random_tokens(SMALL, 1, 4)
    with pytest.raises(ValueError, match="attention_mask and segment_ids were both given"):
        hidden_states(SMALL, perturbed(SMALL), tokens, tokens >= 0, segment_ids=tokens)


def test_no_mask_means_that_every_token_is_real():
    params, tokens = perturbed(SMALL), random_tokens(SMALL, 4, 10)
    everything = logits_of(SMALL, params, tokens, np.ones((4, 10), bool))
    np.testing.assert_allclose(logits_of(SMALL, params, tokens), everything, atol=1e-6)


@pytest.mark.parametrize("original", [SMALL, ALTERNATING], ids=["qwen3", "alternating"])
def test_what_is_kept_for_the_backward_pass_changes_neither_values_nor_gradients(original):
    params, tokens = perturbed(original), random_tokens(original, 2, 6)
    weights = np.random.default_rng(3).normal(size=(2, 6, original.vocab_size)).astype(np.float32)

    def differentiate(remat):
        config = dataclasses.replace(original, remat=remat)
        loss = jax.jit(jax.value_and_grad(lambda p: jnp.sum(forward(config, p, tokens) * weights))).trace(params)
        return loss.lower().compile(FAST_COMPILE)(params), "remat" in str(loss.jaxpr)

    everything, is_recomputed = differentiate("none")
    assert not is_recomputed
    for remat in ("products", "full"):
        rebuilt, is_recomputed = differentiate(remat)
        assert is_recomputed
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), everything, rebuilt)


def test_less_is_kept_the_more_is_computed_again():
    config = dataclasses.replace(SMALL, num_layers=16)
    tokens = jax.ShapeDtypeStruct((8, 64), jnp.int32)

    def temporaries(remat):
        kept = dataclasses.replace(config, remat=remat)
        loss = jax.jit(jax.grad(lambda p, tokens: jnp.sum(forward(kept, p, tokens))))
        return loss.lower(abstract_params(config), tokens).compile().memory_analysis().temp_size_in_bytes

    assert temporaries("none") > 1.5 * temporaries("products") > 1.5 * 1.5 * temporaries("full")


@pytest.mark.parametrize("remat", ["products", "full"])
@pytest.mark.parametrize("original", [SMALL, MOE], ids=["qwen3", "moe"])
def test_the_program_does_not_grow_with_depth(original, remat):
    def lines(num_layers):
        config = dataclasses.replace(original, remat=remat, num_layers=num_layers)
        loss = jax.jit(jax.grad(lambda p, tokens: jnp.sum(forward(config, p, tokens))))
        return len(loss.lower(abstract_params(config), jax.ShapeDtypeStruct((2, 6), jnp.int32)).as_text().splitlines())

    assert lines(4) == lines(36)


def test_an_untied_head_is_a_table_of_its_own():
    config = dataclasses.replace(SMALL, tie_embeddings=False)
    params, tokens = perturbed(config), random_tokens(config, 4, 6)
    assert params["lm_head"].shape == (config.vocab_size, config.hidden_size)
    logits = logits_of(config, params, tokens)
    tied = {name: leaf for name, leaf in params.items() if name != "lm_head"}
    as_tied = logits_of(SMALL, tied, tokens)
    assert np.abs(logits - as_tied).max() > 1e-2
    # with the same table in both places the two are one model, and the head is linear in its table
    same = logits_of(config, params | {"lm_head": params["embed_tokens"]}, tokens)
    np.testing.assert_allclose(same, as_tied, atol=1e-6)
    tripled = logits_of(config, params | {"lm_head": 3 * params["lm_head"]}, tokens)
    np.testing.assert_allclose(tripled, 3 * logits, rtol=1e-5, atol=1e-5)


PUBLISHED = {
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "deepseek-r1-distill-qwen-1.5b": 1_777_088_000,
}


@pytest.mark.parametrize("name", presets)
def test_presets_have_the_published_numbers_of_parameters(name):
    by_hand = {"tiny": 100_736, "tiny-moe": 322_944}
    assert count_params(presets[name]) == (PUBLISHED | by_hand)[name]


def test_parameters_counted_by_hand():
    vocab, embed, mlp, layers, heads, kv_heads, head_dim = 32, 64, 192, 2, 4, 2, 16
    attention = embed * (heads + 2 * kv_heads) * head_dim + heads * head_dim * embed + 2 * head_dim
    others = vocab * embed + layers * (attention + 2 * embed) + embed
    assert count_params(presets["tiny"]) == others + layers * 3 * embed * mlp == 100_736
    experts = layers * (embed * 8 + 8 * 3 * embed * 96)
    assert count_params(presets["tiny-moe"]) == others + experts == 322_944
    assert count_params(dataclasses.replace(presets["tiny"], tie_embeddings=False)) == 100_736 + vocab * embed
    biases = layers * (heads + 2 * kv_heads) * head_dim
    assert count_params(dataclasses.replace(presets["tiny"], family="qwen2")) == 100_736 - layers * 32 + biases


def test_layers_are_dealt_out_by_kind():
    assert ALTERNATING.sparse_layers == (False, True, False, True)
    assert IRREGULAR.sparse_layers == (False, False, True)
    stacked = {name: np.arange(4) for name in ("q_proj", "router")} | {"gate_proj": np.array([10, 20])}
    dealt = [layer_params(ALTERNATING.sparse_layers, stacked, layer) for layer in range(4)]
    dense = [{"q_proj": 0, "gate_proj": 10}, {"q_proj": 2, "gate_proj": 20}]
    assert dealt == [dense[0], {"q_proj": 1, "router": 0}, dense[1], {"q_proj": 3, "router": 1}]


@pytest.mark.parametrize("config", [MOE, ALTERNATING, IRREGULAR], ids=["moe", "alternating", "irregular"])
def test_the_stack_is_its_layers_one_by_one(config):
    params, tokens = perturbed(config), random_tokens(config, 2, 6)
    kinds = config.sparse_layers
    x = params["embed_tokens"][tokens]
    for layer, is_sparse in enumerate(kinds):
        one = dataclasses.replace(
            config, num_layers=1, decoder_sparse_step=1, mlp_only_layers=() if is_sparse else (0,)
        )
        own = jax.tree.map(lambda leaf: leaf[None], layer_params(kinds, params["layers"], layer))
        # a model of one layer whose embedding table is what the layers before left in the residual stream
        table = x.reshape(-1, config.hidden_size)
        numbers = np.arange(len(table)).reshape(tokens.shape).astype(np.int32)
        weights = {"embed_tokens": table, "layers": own, "norm": jnp.ones(config.hidden_size)}
        hidden, _ = hidden_states(one, weights, numbers)
        residual = plain_residual(one, weights, numbers)
        np.testing.assert_allclose(hidden, residual / rms(residual), atol=1e-5)
        x = residual
    expected = x / rms(x) * params["norm"]
    np.testing.assert_allclose(states_of(config, params, tokens)[0], expected, atol=2e-5)


def rms(x):
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + SMALL.rms_norm_eps)


def plain_residual(config, params, tokens):
    """What one layer leaves in the residual stream, before the norm."""
    rope = rope_table(np.arange(tokens.shape[1])[None], tokens.shape[1], config.head_dim, config.rope_theta)
    weights = layer_params(config.sparse_layers, params["layers"], 0)

    def attend(q, k, v):
        return causal_attention(q, k, v, kernel="xla"), None

    return block(config, weights, params["embed_tokens"][tokens], rope, attend, training_products(Precision()))[0]


def test_own_choices_of_experts_replayed_change_nothing_and_others_do():
    params, tokens = perturbed(ALTERNATING), random_tokens(ALTERNATING, 3, 8)
    mask = np.ones(tokens.shape, bool)
    mask[0, :2] = mask[1, -3:] = mask[2, 4] = False
    hidden, record = states_of(ALTERNATING, params, tokens, mask)
    assert record.experts.shape == (2, 3, 8, 2)
    again, replayed = states_of(ALTERNATING, params, tokens, mask, experts=record.experts)
    np.testing.assert_allclose(again[mask], hidden[mask], atol=1e-6)
    np.testing.assert_array_equal(replayed.experts[:, mask], record.experts[:, mask])
    # another choice at one real token moves that token and later ones of its row, and no other
    experts = np.array(record.experts)
    experts[0, 0, 5] = (experts[0, 0, 5] + 1) % ALTERNATING.num_experts
    moved = np.abs(states_of(ALTERNATING, params, tokens, mask, experts=experts)[0] - hidden).max(-1)
    assert (moved[0, 5:] > 1e-4).all()
    assert moved[0, 2:5].max() < 1e-5
    assert moved[1:][mask[1:]].max() < 1e-5


def test_router_metrics_are_of_real_tokens_and_by_row():
    params, tokens = perturbed(MOE), random_tokens(MOE, 3, 8)
    mask = np.ones(tokens.shape, bool)
    mask[1, 5:] = False
    _, record = states_of(MOE, params, tokens, mask)
    changed = tokens.copy()
    changed[1, 5:] = (changed[1, 5:] + 3) % MOE.vocab_size
    _, other = states_of(MOE, params, changed, mask)
    assert set(record.metrics) >= {"router/load_balance", "router/z"}
    for name, rows in record.metrics.items():
        assert rows.shape == (3,)
        np.testing.assert_allclose(rows, other.metrics[name], rtol=1e-5)
        alone = states_of(MOE, params, tokens[1:2, :5])[1].metrics[name]
        np.testing.assert_allclose(rows[1], alone[0], rtol=1e-5)


def test_the_flax_module_is_the_same_function():
    params, tokens = perturbed(SMALL), random_tokens(SMALL, 2, 6)
    hidden, _ = Transformer(SMALL).apply({"params": params}, tokens)
    np.testing.assert_allclose(hidden, states_of(SMALL, params, tokens)[0], atol=1e-6)


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_a_narrow_policy_computes_narrow_and_is_close(name):
    params, tokens = perturbed(MOE), random_tokens(MOE, 2, 6)
    narrow = dataclasses.replace(MOE, precision=Precision(compute=name))
    hidden, _ = states_of(narrow, params, tokens)
    assert hidden.dtype == {"bf16": jnp.bfloat16, "fp16": jnp.float16}[name]
    # the experts may flip, so that only most tokens are near
    error = np.abs(np.asarray(logits_of(narrow, params, tokens)) - logits_of(MOE, params, tokens)).max(-1)
    assert 0 < np.median(error) < 0.1
    grads = jax.grad(lambda p: jnp.sum(forward(narrow, p, tokens)))(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}


def test_parameters_are_created_in_the_dtype_of_the_policy():
    narrow = dataclasses.replace(MOE, precision=Precision(parameters="bf16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract_params(narrow))} == {jnp.dtype(jnp.bfloat16)}


def test_a_float32_head_is_nearer_to_float32_than_a_bf16_one():
    params, tokens = perturbed(SMALL), random_tokens(SMALL, 4, 10)
    exact = logits_of(SMALL, params, tokens)

    def error(**head):
        config = dataclasses.replace(SMALL, precision=Precision(compute="bf16", **head))
        hidden, _ = states_of(config, params, tokens)
        wide = np.asarray(hidden, np.float64) @ np.asarray(params["embed_tokens"], np.float64).T
        return np.abs(logits_of(config, params, tokens) - wide).max(), np.abs(wide - exact).max()

    (wide, common), (narrow, _) = error(head="float32"), error(head="bf16")
    assert wide < 1e-5 < narrow < common


def test_fresh_parameters_are_float32_and_of_the_key():
    first, again, other = (fresh(SMALL, jax.random.key(seed)) for seed in (0, 0, 1))
    assert {leaf.dtype for leaf in jax.tree.leaves(first)} == {jnp.dtype(jnp.float32)}
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert np.abs(first["embed_tokens"] - other["embed_tokens"]).max() > 0.1
    # layers are stacked, and each drawn from a key of its own
    kernel = first["layers"]["q_proj"]
    assert kernel.shape[0] == SMALL.num_layers
    assert np.abs(kernel[0] - kernel[1]).max() > 0.1


@every_architecture
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
    if config == SMALL:
        assert axes["layers"]["down_proj"] == PartitionSpec("layers", "mlp", "embed")


def is_spec(x):
    return isinstance(x, PartitionSpec)
