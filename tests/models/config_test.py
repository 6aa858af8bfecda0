import dataclasses

import pytest

from dcjax.models import ModelConfig, presets

SIZES = ["vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"]


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [0, -3])
def test_a_size_below_one_is_refused_by_name_and_value(name, value):
    with pytest.raises(ValueError, match=rf"model\.{name} is {value}; it must be at least 1"):
        ModelConfig(**{name: value})


def test_query_heads_must_share_key_value_heads_evenly():
    with pytest.raises(ValueError, match=r"model\.num_heads 6 is not a multiple of model\.num_kv_heads 4"):
        ModelConfig(num_heads=6, num_kv_heads=4)


def test_an_odd_head_cannot_be_rotated_in_pairs():
    with pytest.raises(ValueError, match=r"model\.head_dim is 15.*even"):
        ModelConfig(head_dim=15)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_only_qwen3_has_experts(family):
    with pytest.raises(ValueError, match=rf"model\.num_experts is 4; family {family} has none, so it must be 0"):
        ModelConfig(family=family, num_experts=4, num_experts_per_tok=2)


def test_the_smallest_model_is_allowed():
    smallest = ModelConfig(**(dict.fromkeys(SIZES, 1) | {"head_dim": 2}))
    assert (smallest.num_heads, smallest.head_dim) == (1, 2)


def test_a_configuration_is_frozen_and_hashable():
    config = presets["tiny"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_layers = 3
    assert len({config, dataclasses.replace(config), dataclasses.replace(config, num_layers=3)}) == 2
