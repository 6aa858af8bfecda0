import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file

from dcjax.models import ModelConfig, count_params, forward, init_params, logical_axes, presets, token_logps
from dcjax.sharding.rules import RULES

HF = Path(__file__).parents[1] / "data" / "hf_tiny_qwen3"
SMALL = ModelConfig(vocab_size=17, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, head_dim=8)

# for what is run once, so that compiling it is what takes time
FAST_COMPILE = {"xla_backend_optimization_level": 0}

logits_of = jax.jit(forward, static_argnums=0)
scores_of = jax.jit(token_logps, static_argnums=0, static_argnames="response_length")
fresh = jax.jit(init_params, static_argnums=0)


@functools.cache
def perturbed(config, seed=0):
    """Random parameters whose norms are not all one."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        x = rng.normal(size=leaf.shape)
        return jnp.array(1 + 0.1 * x if "norm" in path[-1].key else x * leaf.shape[-1] ** -0.5, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(lambda: init_params(config, jax.random.key(0))))


def random_tokens(config, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, config.vocab_size, shape).astype(np.int32)


def log_softmax(logits):
    wide = np.asarray(logits, np.float64)
    shifted = wide - wide.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def at_tokens(values, tokens):
    return np.take_along_axis(values, tokens[..., None], -1)[..., 0]


@pytest.fixture(scope="module")
def hugging_face():
    """A checkpoint that `transformers` wrote, renamed here: kernels are [out, in] there and [in, out] here."""
    written = json.loads((HF / "config.json").read_text())
    config = ModelConfig(
        vocab_size=written["vocab_size"],
        hidden_size=written["hidden_size"],
        intermediate_size=written["intermediate_size"],
        num_layers=written["num_hidden_layers"],
        num_heads=written["num_attention_heads"],
        num_kv_heads=written["num_key_value_heads"],
        head_dim=written["head_dim"],
        rope_theta=written["rope_parameters"]["rope_theta"],
        rms_norm_eps=written["rms_norm_eps"],
        tie_embeddings=written["tie_word_embeddings"],
    )
    weights = load_file(HF / "model.safetensors")
    layers = {}
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        layers[name] = f"self_attn.{name}.weight"
    for name in ("gate_proj", "up_proj", "down_proj"):
        layers[name] = f"mlp.{name}.weight"
    transposed = set(layers)
    layers |= {name: f"self_attn.{name}.weight" for name in ("q_norm", "k_norm")}
    layers |= {name: f"{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")}

    def stacked(name):
        leaves = [weights[f"model.layers.{i}.{layers[name]}"] for i in range(config.num_layers)]
        return jnp.array(np.stack([leaf.T if name in transposed else leaf for leaf in leaves]))

    params = {
        "embed_tokens": jnp.array(weights["model.embed_tokens.weight"]),
        "lm_head": jnp.array(weights["lm_head.weight"]),
        "norm": jnp.array(weights["model.norm.weight"]),
        "layers": {name: stacked(name) for name in layers},
    }
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sum(leaf.size for leaf in weights.values())
    with np.load(HF / "reference.npz") as reference:
        return config, params, dict(reference)


@pytest.mark.parametrize("padding", ["", "left_", "right_"])
def test_logits_and_log_probs_are_those_of_hugging_face(hugging_face, padding):
    config, params, reference = hugging_face
    tokens = reference[f"{padding}input_ids"]
    mask = reference[f"{padding}attention_mask"].astype(bool) if padding else None
    logits = np.asarray(logits_of(config, params, tokens, mask))
    assert logits.dtype == np.float32
    real = np.ones(tokens.shape, bool) if mask is None else mask
    np.testing.assert_allclose(logits[real], reference[f"{padding}logits"][real], atol=1e-4)

    predicted = reference[f"{padding}logprob_mask"].astype(bool) if padding else real[:, 1:]
    assert predicted.sum() >= 23
    logps = at_tokens(log_softmax(logits[:, :-1]), tokens[:, 1:])
    np.testing.assert_allclose(logps[predicted], reference[f"{padding}logprobs"][predicted], atol=1e-4)
    ours, _ = scores_of(config, params, tokens, real, response_length=tokens.shape[1] - 1, temperature=np.ones(4, "f"))
    np.testing.assert_allclose(np.asarray(ours)[predicted], reference[f"{padding}logprobs"][predicted], atol=1e-4)


def test_greedy_tokens_are_those_of_hugging_face(hugging_face):
    config, params, reference = hugging_face
    prompt, expected = reference["greedy_prompt"], reference["greedy_tokens"]
    length, steps = prompt.shape[1], expected.shape[1]
    tokens = np.zeros((len(prompt), length + steps), np.int32)
    tokens[:, :length] = prompt
    for end in range(length, length + steps):
        mask = np.broadcast_to(np.arange(length + steps) < end, tokens.shape)
        tokens[:, end] = np.argmax(logits_of(config, params, tokens, mask)[:, end - 1], axis=-1)
    np.testing.assert_array_equal(tokens[:, length:], expected)


def test_a_later_token_changes_nothing_earlier():
    params = perturbed(SMALL)
    tokens = random_tokens(SMALL, 4, 6)
    changed = tokens.copy()
    changed[:, 4] = (changed[:, 4] + 1) % SMALL.vocab_size
    before, after = logits_of(SMALL, params, tokens), logits_of(SMALL, params, changed)
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert (np.abs(before - after)[:, 4:].max(-1) > 1e-3).all()


@pytest.mark.parametrize(("left", "right"), [(4, 0), (0, 4), (3, 1)])
def test_padding_on_either_side_changes_nothing(left, right):
    params = perturbed(SMALL)
    tokens = random_tokens(SMALL, 4, 6)
    plain = logits_of(SMALL, params, tokens)
    # padding of any ids, not of one that happens to be harmless
    padded = random_tokens(SMALL, 4, left + 6 + right, seed=1)
    padded[:, left : left + 6] = tokens
    mask = np.zeros(padded.shape, bool)
    mask[:, left : left + 6] = True
    logits = logits_of(SMALL, params, padded, mask)
    np.testing.assert_allclose(logits[:, left : left + 6], plain, atol=1e-5)
    assert np.isfinite(logits).all()


def test_no_mask_means_that_every_token_is_real():
    params, tokens = perturbed(SMALL), random_tokens(SMALL, 4, 10)
    everything = logits_of(SMALL, params, tokens, np.ones((4, 10), bool))
    np.testing.assert_allclose(logits_of(SMALL, params, tokens), everything, atol=1e-6)


def test_remat_changes_neither_values_nor_gradients():
    params, tokens = perturbed(SMALL), random_tokens(SMALL, 2, 6)
    weights = np.random.default_rng(3).normal(size=(2, 6, SMALL.vocab_size)).astype(np.float32)

    def differentiate(config):
        loss = jax.jit(jax.value_and_grad(lambda p: jnp.sum(forward(config, p, tokens) * weights))).trace(params)
        return loss.lower().compile(FAST_COMPILE)(params), "remat" in str(loss.jaxpr)

    kept, kept_remats = differentiate(SMALL)
    rebuilt, rebuilt_remats = differentiate(dataclasses.replace(SMALL, remat=True))
    assert (kept_remats, rebuilt_remats) == (False, True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), kept, rebuilt)


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


def test_token_log_probs_and_entropies_against_numpy():
    params, tokens = perturbed(SMALL), random_tokens(SMALL, 4, 10)
    mask = np.ones(tokens.shape, bool)
    mask[1, :2] = mask[3, -2:] = False
    temperature = np.array([1.0, 0.3, 0.7, 2.5], np.float32)
    response = 4
    logps, entropy = scores_of(SMALL, params, tokens, mask, response_length=response, temperature=temperature)
    logits = np.asarray(logits_of(SMALL, params, tokens, mask), np.float64)
    distribution = log_softmax(logits[:, -response - 1 : -1] / temperature[:, None, None])
    np.testing.assert_allclose(logps, at_tokens(distribution, tokens[:, -response:]), atol=2e-5)
    np.testing.assert_allclose(entropy, -(np.exp(distribution) * distribution).sum(-1), atol=2e-5)
    assert logps.dtype == entropy.dtype == jnp.float32
    # a response of T tokens is scored by T columns, the first of them the prompt's last
    np.testing.assert_allclose(logps[:, 0], at_tokens(distribution[:, 0], tokens[:, -response]), atol=2e-5)


def test_entropy_of_a_flat_head_is_the_log_of_the_vocabulary():
    config = dataclasses.replace(SMALL, tie_embeddings=False)
    params = perturbed(config)
    params = params | {"lm_head": jnp.zeros_like(params["lm_head"])}
    logps, entropy = scores_of(
        config,
        params,
        random_tokens(config, 2, 6),
        np.ones((2, 6), bool),
        response_length=3,
        temperature=np.array([0.5, 1], "f"),
    )
    np.testing.assert_allclose(entropy, np.full((2, 3), np.log(config.vocab_size)), rtol=1e-6)
    np.testing.assert_allclose(logps, np.full((2, 3), -np.log(config.vocab_size)), rtol=1e-6)


def test_parameters_counted_by_hand():
    vocab, embed, mlp, layers, heads, kv_heads, head_dim = 32, 64, 192, 2, 4, 2, 16
    attention = embed * (heads + 2 * kv_heads) * head_dim + heads * head_dim * embed + 2 * head_dim
    by_hand = vocab * embed + layers * (attention + 3 * embed * mlp + 2 * embed) + embed
    assert by_hand == 100_736
    assert count_params(presets["tiny"]) == by_hand
    assert count_params(dataclasses.replace(presets["tiny"], tie_embeddings=False)) == by_hand + vocab * embed


def test_fresh_parameters_are_float32_and_of_the_key():
    first, again, other = (fresh(SMALL, jax.random.key(seed)) for seed in (0, 0, 1))
    assert {leaf.dtype for leaf in jax.tree.leaves(first)} == {jnp.dtype(jnp.float32)}
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert np.abs(first["embed_tokens"] - other["embed_tokens"]).max() > 0.1
    # layers are stacked, and each drawn from a key of its own
    kernel = first["layers"]["q_proj"]
    assert kernel.shape[0] == SMALL.num_layers
    assert np.abs(kernel[0] - kernel[1]).max() > 0.1


@pytest.mark.parametrize("tied", [True, False])
def test_every_axis_has_a_name_that_the_sharding_rules_know(tied):
    config = dataclasses.replace(SMALL, tie_embeddings=tied)
    axes = logical_axes(config)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    named = jax.tree.map(lambda spec, leaf: (tuple(spec), leaf.ndim), axes, shapes, is_leaf=is_spec)
    pairs = jax.tree.leaves(named, is_leaf=lambda x: isinstance(x, tuple))
    assert len(pairs) == 13 + (not tied)
    for names, ndim in pairs:
        assert len(names) == ndim
        assert set(names) <= set(RULES)
    assert axes["layers"]["down_proj"] == PartitionSpec("layers", "mlp", "embed")


def is_spec(x):
    return isinstance(x, PartitionSpec)
