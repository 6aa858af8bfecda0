import dataclasses
import itertools

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file
from tiny import DENSE, EXPERTS, masters

from dcjax.models import abstract_params, count_params, init_params, logical_axes, presets, save_hf
from dcjax.models.parameters import layer_params, parameter_named, parameters
from dcjax.models.transformer import Transformer

pytestmark = pytest.mark.heavy

QWEN2 = dataclasses.replace(DENSE, family="qwen2")
LLAMA = dataclasses.replace(DENSE, family="llama")
# layers 1 and 3 have experts; and in the second, only layer 2 has
ALTERNATING = dataclasses.replace(EXPERTS, num_layers=4, decoder_sparse_step=2, tie_embeddings=False)
IRREGULAR = dataclasses.replace(EXPERTS, num_layers=3, mlp_only_layers=(0, 1))
ARCHITECTURES = {"dense": DENSE, "qwen2": QWEN2, "llama": LLAMA, "experts": EXPERTS, "alternating": ALTERNATING}

# of 20 tokens, width 32, 4 heads and 2 key-value heads of 16, a SwiGLU of 64, 4 experts of 32
OUTER = {"embed_tokens": (20, 32), "norm": (32,)}
ATTENTION = {
    "input_layernorm": (2, 32),
    "post_attention_layernorm": (2, 32),
    "q_proj": (2, 32, 64),
    "k_proj": (2, 32, 32),
    "v_proj": (2, 32, 32),
    "o_proj": (2, 64, 32),
}
HEAD_NORMS = {"q_norm": (2, 16), "k_norm": (2, 16)}
MLP = {"gate_proj": (2, 32, 64), "up_proj": (2, 32, 64), "down_proj": (2, 64, 32)}
OF_EXPERTS = {
    "router": (2, 32, 4),
    "experts_gate_proj": (2, 4, 32, 32),
    "experts_up_proj": (2, 4, 32, 32),
    "experts_down_proj": (2, 4, 32, 32),
}
FOUR_LAYERS = {name: (4, *shape[1:]) for name, shape in (ATTENTION | HEAD_NORMS).items()}
SHAPES = {
    "dense": (OUTER, ATTENTION | HEAD_NORMS | MLP),
    "qwen2": (OUTER, ATTENTION | {"q_bias": (2, 64), "k_bias": (2, 32), "v_bias": (2, 32)} | MLP),
    "llama": (OUTER, ATTENTION | MLP),
    "experts": (OUTER, ATTENTION | HEAD_NORMS | OF_EXPERTS),
    # of each kind there are two layers
    "alternating": (OUTER | {"lm_head": (20, 32)}, FOUR_LAYERS | MLP | OF_EXPERTS),
}

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def flat(tree):
    """The leaves by their paths of keys."""
    pairs = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, PartitionSpec))
    return {tuple(key.key for key in path): leaf for path, leaf in pairs}


@every_architecture
def test_shapes_are_those_written_by_hand(name):
    outer, layered = SHAPES[name]
    shapes = jax.tree.map(lambda leaf: leaf.shape, abstract_params(ARCHITECTURES[name]))
    assert shapes == {**outer, "layers": layered}


@every_architecture
def test_the_table_is_what_flax_declares(name):
    config = ARCHITECTURES[name]
    boxed = jax.eval_shape(lambda: Transformer(config).init(jax.random.key(0), method="parameters")["params"])
    declared, axes = flat(nn.unbox(boxed)), flat(nn.get_partition_spec(boxed))
    table = {parameter.path: parameter for parameter in parameters(config)}
    assert {path: leaf.shape for path, leaf in declared.items()} == {
        path: parameter.stacked_shape for path, parameter in table.items()
    }
    assert axes == {path: PartitionSpec(*parameter.stacked_axes) for path, parameter in table.items()}
    assert axes == flat(logical_axes(config))
    assert declared == flat(abstract_params(config))
    assert len({parameter.name for parameter in table.values()}) == len(table)


AXES = {
    "embed_tokens": ("vocab", "embed"),
    "q_norm": ("layers", "head_dim"),
    "q_proj": ("layers", "embed", "heads"),
    "v_proj": ("layers", "embed", "kv_heads"),
    "o_proj": ("layers", "heads", "embed"),
    "down_proj": ("layers", "mlp", "embed"),
    "router": ("layers", "embed", "choices"),
    "experts_up_proj": ("layers", "experts", "embed", "expert_mlp"),
    "experts_down_proj": ("layers", "experts", "expert_mlp", "embed"),
}


def test_axes_are_those_written_by_hand():
    assert {name: parameter_named(ALTERNATING, name).stacked_axes for name in AXES} == AXES
    assert parameter_named(QWEN2, "k_bias").stacked_axes == ("layers", "kv_heads")


@pytest.mark.parametrize("preset", presets)
def test_roles_are_those_of_vectors_matrices_and_routers(preset):
    roles = {parameter.name: parameter.role for parameter in parameters(presets[preset])}
    assert {name for name, role in roles.items() if role == "table"} == {"embed_tokens", "lm_head"} & set(roles)
    assert {name for name, role in roles.items() if role == "router"} == {"router"} & set(roles)
    wide = {parameter.name for parameter in parameters(presets[preset]) if len(parameter.shape) == 1}
    assert {name for name, role in roles.items() if role == "wide"} == wide
    assert all(role == "kernel" for name, role in roles.items() if name.endswith("_proj"))


def test_a_parameter_that_the_model_does_not_have_is_an_error():
    with pytest.raises(ValueError, match="this model has no parameter 'router'; it has embed_tokens, input_layernorm"):
        parameter_named(DENSE, "router")


@every_architecture
def test_every_tensor_of_a_saved_folder_is_in_the_table(tmp_path, name):
    config, params = ARCHITECTURES[name], masters(ARCHITECTURES[name])
    save_hf(tmp_path / "model", config, params)
    written = load_file(tmp_path / "model" / "model.safetensors")
    table = parameters(config)
    assert sorted(written) == sorted(itertools.chain(*(parameter.tensor_names() for parameter in table)))
    for parameter in table:
        array = np.asarray(params[parameter.name] if parameter.layers is None else params["layers"][parameter.name])
        for index in parameter.indices():
            tensor = written[parameter.tensor_name(index)]
            assert tensor.shape == parameter.tensor_shape
            np.testing.assert_array_equal(tensor, array[index].T if parameter.transposed else array[index])


def test_names_in_files_count_layers_of_the_model_and_not_of_the_kind():
    experts = parameter_named(ALTERNATING, "experts_up_proj")
    assert list(experts.tensor_names())[:5] == [
        *(f"model.layers.1.mlp.experts.{expert}.up_proj.weight" for expert in range(4)),
        "model.layers.3.mlp.experts.0.up_proj.weight",
    ]
    assert list(parameter_named(ALTERNATING, "gate_proj").tensor_names()) == [
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.2.mlp.gate_proj.weight",
    ]
    assert list(parameter_named(ALTERNATING, "lm_head").tensor_names()) == ["lm_head.weight"]


fresh = jax.jit(init_params, static_argnums=0)


@pytest.mark.parametrize("name", ["qwen2", "alternating"])
def test_fresh_values_keep_the_variance_of_activations(name):
    config = ARCHITECTURES[name]
    depth = (2 * config.num_layers) ** -0.5
    for path, leaf in flat(fresh(config, jax.random.key(1))).items():
        if "norm" in path[-1] or "bias" in path[-1]:
            np.testing.assert_array_equal(leaf, 0 if "bias" in path[-1] else 1)
            continue
        contracted = leaf.shape[-1] if path[-1] in ("embed_tokens", "lm_head") else leaf.shape[-2]
        expected = contracted**-0.5 * (depth if path[-1] in ("o_proj", "down_proj", "experts_down_proj") else 1)
        assert abs(np.std(leaf) / expected - 1) < 4 / np.sqrt(2 * leaf.size), path


# the first value of arrays that are drawn early and late
DRAWN = {
    "dense": {"embed_tokens": 0.0134602, "o_proj": -0.0101509, "k_proj": -0.1221015, "down_proj": 0.0540015},
    "qwen2": {"embed_tokens": 0.0134602, "o_proj": -0.0101509, "k_proj": -0.0835002, "down_proj": -0.0036926},
    "alternating": {
        "lm_head": 0.2300879,
        "gate_proj": 0.0615348,
        "router": -0.0104443,
        "experts_down_proj": -0.0617304,
    },
}


@pytest.mark.parametrize("name", DRAWN)
def test_a_seed_draws_what_it_always_drew(name):
    params = fresh(ARCHITECTURES[name], jax.random.key(0))
    drawn = {key: np.ravel(leaf)[0] for key, leaf in {**params, **params["layers"]}.items() if key in DRAWN[name]}
    assert drawn == pytest.approx(DRAWN[name], abs=1e-6)


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
    "smollm2-135m": 134_515_008,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.1-8b": 8_030_261_248,
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
    assert count_params(dataclasses.replace(presets["tiny"], family="llama")) == 100_736 - layers * 32


def test_layers_are_dealt_out_by_kind():
    assert ALTERNATING.sparse_layers == (False, True, False, True)
    assert IRREGULAR.sparse_layers == (False, False, True)
    stacked = {name: np.arange(4) for name in ("q_proj", "router")} | {"gate_proj": np.array([10, 20])}
    dealt = [layer_params(ALTERNATING, stacked, layer) for layer in range(4)]
    dense = [{"q_proj": 0, "gate_proj": 10}, {"q_proj": 2, "gate_proj": 20}]
    assert dealt == [dense[0], {"q_proj": 1, "router": 0}, dense[1], {"q_proj": 3, "router": 1}]
