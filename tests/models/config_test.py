import dataclasses

import pytest

from dcjax.models import ModelConfig, presets
from dcjax.models.rope import Llama3Scaling, YarnScaling

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


@pytest.mark.parametrize("bad", ["yarn", {"factor": 4.0}, presets["tiny"].precision])
def test_a_scaling_of_another_kind_is_refused(bad):
    with pytest.raises(
        ValueError, match=r"^model\.rope_scaling is .*; it must be None, or a Llama3Scaling or YarnScaling$"
    ):
        ModelConfig(rope_scaling=bad)


@pytest.mark.parametrize("theta", [0.5, 1.0])
def test_yarn_needs_frequencies_that_fall(theta):
    with pytest.raises(ValueError, match=rf"model\.rope_theta is {theta}; with YaRN it must be above 1"):
        ModelConfig(rope_theta=theta, rope_scaling=YarnScaling(4.0, 64))
    assert ModelConfig(rope_theta=theta, rope_scaling=Llama3Scaling(4.0, 1.0, 4.0, 64)).rope_theta == theta


def test_how_long_a_model_is_made_for():
    def longest(scaling, positions):
        return ModelConfig(rope_scaling=scaling, max_position_embeddings=positions).longest_sequence

    assert longest(None, 40_960) == 40_960
    # Qwen3 as its card extends it, and DeepSeek-V3 as it was published
    assert longest(YarnScaling(4.0, 32_768), 40_960) == 131_072
    assert longest(YarnScaling(40.0, 4096), 163_840) == 163_840
    # a factor of one takes nothing away, and Llama 3.1 is made for more than its factor times the length before
    assert longest(YarnScaling(1.0, 32_768), 40_960) == 40_960
    assert longest(Llama3Scaling(8.0, 1.0, 4.0, 8192), 131_072) == 131_072


def test_rope_in_words():
    assert presets["tiny"].described_rope == "RoPE of theta 10000, without scaling"
    assert presets["llama-3.2-1b"].described_rope == "RoPE of theta 500000, scaled by 32 (llama3) from 8192 tokens"


def test_the_smallest_model_is_allowed():
    smallest = ModelConfig(**(dict.fromkeys(SIZES, 1) | {"head_dim": 2}))
    assert (smallest.num_heads, smallest.head_dim) == (1, 2)


def test_a_configuration_is_frozen_and_hashable():
    config = presets["tiny"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_layers = 3
    assert len({config, dataclasses.replace(config), dataclasses.replace(config, num_layers=3)}) == 2
    scaled = {dataclasses.replace(config, rope_scaling=YarnScaling(factor, 64)) for factor in (2.0, 2.0, 4.0)}
    assert len(scaled | {config}) == 3
