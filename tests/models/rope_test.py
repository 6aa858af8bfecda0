"""Scaled RoPE: against what transformers computes, against loops, and by hand.

rope_frequencies.json is made by tests/data/make_hf_tiny.py.
"""

import dataclasses
import functools
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcjax.models import layers
from dcjax.models.rope import Llama3Scaling, YarnScaling

KINDS = {"llama3": Llama3Scaling, "yarn": YarnScaling}
CASES = json.loads((Path(__file__).parents[1] / "data" / "rope_frequencies.json").read_text())["cases"]
OF_CASE = ("rope_type", "rope_theta", "head_dim", "frequencies", "amplitude")

rope_table = jax.jit(layers.rope_table, static_argnums=(1, 2, 3, 4))


def table(*arguments):
    """cos and sin of positions 0, 1, ..., float32 [length, pairs]."""
    length = arguments[0]
    return tuple(np.asarray(each)[0, :, 0] for each in rope_table(np.arange(length)[None], *arguments))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['rope_type']} {case['factor']:g}")
def test_sines_and_cosines_are_those_of_transformers(case):
    scaling = KINDS[case["rope_type"]](**{name: value for name, value in case.items() if name not in OF_CASE})
    theta, head_dim = case["rope_theta"], case["head_dim"]
    expected = np.array(case["frequencies"])
    plain = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    np.testing.assert_allclose(scaling.multipliers(theta, head_dim) * plain, expected, rtol=5e-7)
    assert scaling.amplitude == pytest.approx(case["amplitude"], rel=1e-12)
    angles = np.arange(50)[:, None] * expected
    cos, sin = table(50, head_dim, theta, scaling)
    np.testing.assert_allclose(cos, case["amplitude"] * np.cos(angles), atol=2e-5)
    np.testing.assert_allclose(sin, case["amplitude"] * np.sin(angles), atol=2e-5)


def test_llama3s_shares_by_hand():
    # wavelengths are 2π · 1, 2, 4, 8, and 44 is nearly 14π: 7, 3.5, 1.75 and .875 turns, so 1, 5/6, 1/4 and 0 are kept
    found = Llama3Scaling(2.0, 1.0, 4.0, original_max_position_embeddings=44).multipliers(16.0, 8)
    np.testing.assert_allclose(found, [1, 11 / 12, 5 / 8, 1 / 2], atol=1e-3)


def test_yarns_shares_by_hand():
    # pair i turns 100 / (2π · 2^i) times: log2 (100 / 2π) is 3.99, so 4 turns are at pair 1.99 and half a turn at 4.99
    cut = YarnScaling(4.0, 100, beta_fast=4.0, beta_slow=0.5)
    np.testing.assert_allclose(cut.multipliers(16.0, 8), [1, 1, 13 / 16, 5 / 8], rtol=1e-12)
    smooth = dataclasses.replace(cut, truncate=False)
    np.testing.assert_allclose(smooth.multipliers(16.0, 8), [1, 1, 1 - 0.0076 / 4, 1 - 0.3363 * 0.75], atol=1e-2)
    # .1 ln 4 + 1; and a ratio of two such
    assert cut.amplitude == pytest.approx(1.1386294, abs=1e-6)
    both = dataclasses.replace(cut, mscale=2.0, mscale_all_dim=1.0)
    assert both.amplitude == pytest.approx(1.2772589 / 1.1386294, abs=1e-6)
    assert dataclasses.replace(both, attention_factor=0.5).amplitude == 0.5


factors = st.floats(1.0, 64.0)
thetas = st.floats(1.5, 1e7)
head_dims = st.sampled_from([2, 4, 16, 64])
lengths = st.integers(1, 2**18)


@settings(max_examples=60, deadline=None)
@given(factors, st.floats(0.1, 8.0), st.floats(0.1, 8.0), lengths, thetas, head_dims)
def test_llama3_against_its_three_cases(factor, low, more, length, theta, head_dim):
    high, expected = low + more, []
    for pair in range(head_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * pair / head_dim)
        if wavelength < length / high:
            expected.append(1)
        elif wavelength > length / low:
            expected.append(1 / factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            expected.append((1 - smooth) / factor + smooth)
    found = Llama3Scaling(factor, low, high, length).multipliers(theta, head_dim)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


# bounds within which neither end of the ramp is cut at the first or the last pair
@settings(max_examples=60, deadline=None)
@given(
    factors,
    st.integers(512, 2**18),
    st.floats(0.1, 4.0),
    st.floats(0.1, 60.0),
    st.floats(1e4, 1e7),
    st.sampled_from([16, 64, 128]),
)
def test_yarn_against_its_ramp(factor, length, slow, more, theta, head_dim):
    """By how often a pair turns in the first training's sequences: its share is linear in the logarithm of that."""
    fast, expected = slow + more, []
    for pair in range(head_dim // 2):
        turns = length / (2 * math.pi * theta ** (2 * pair / head_dim))
        kept = min(1.0, max(0.0, math.log(turns / slow) / math.log(fast / slow)))
        expected.append(kept + (1 - kept) / factor)
    scaling = YarnScaling(factor, length, beta_fast=fast, beta_slow=slow, truncate=False)
    np.testing.assert_allclose(scaling.multipliers(theta, head_dim), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "scaling",
    [
        Llama3Scaling(1.0, 1.0, 4.0, 16),
        YarnScaling(1.0, 16),
        YarnScaling(1.0, 16, beta_fast=3.0, beta_slow=0.3, truncate=False, mscale=0.7, mscale_all_dim=1.3),
    ],
    ids=["llama3", "yarn", "yarn of other fields"],
)
def test_a_factor_of_one_changes_nothing_to_the_bit(scaling):
    for ours, plain in zip(table(40, 16, 100.0, scaling), table(40, 16, 100.0), strict=True):
        np.testing.assert_array_equal(ours.view(np.uint32), plain.view(np.uint32))
    changed = table(40, 16, 100.0, dataclasses.replace(scaling, factor=2.0))
    assert np.abs(changed[0] - table(40, 16, 100.0)[0]).max() > 0.1


def test_pairs_that_turn_often_are_left_as_they_are_to_the_bit():
    scaling = Llama3Scaling(8.0, 1.0, 4.0, 64)
    kept = scaling.multipliers(1e4, 16) == 1
    assert 0 < kept.sum() < 8
    for ours, plain in zip(table(40, 16, 1e4, scaling), table(40, 16, 1e4), strict=True):
        np.testing.assert_array_equal(ours[:, kept], plain[:, kept])
        assert (ours[1:, ~kept] != plain[1:, ~kept]).all()


LLAMA3 = functools.partial(dataclasses.replace, Llama3Scaling(8.0, 1.0, 4.0, 8192))
YARN = functools.partial(dataclasses.replace, YarnScaling(4.0, 32_768))


@pytest.mark.parametrize(
    ("changed", "name", "bad", "right"),
    [
        *((kind, "factor", bad, "a finite number of at least 1") for kind in (LLAMA3, YARN) for bad in (0.9, -1.0)),
        *((kind, "factor", bad, "a finite number") for kind in (LLAMA3, YARN) for bad in (math.inf, math.nan)),
        *((kind, "original_max_position_embeddings", bad, "at least 1") for kind in (LLAMA3, YARN) for bad in (0, -8)),
        (LLAMA3, "low_freq_factor", 0.0, "a finite number above 0"),
        (LLAMA3, "low_freq_factor", 4.0, "below high_freq_factor, 4.0"),
        (LLAMA3, "high_freq_factor", math.nan, "a finite number above 0"),
        (YARN, "beta_fast", math.inf, "a finite number above 0"),
        (YARN, "beta_slow", 0.0, "a finite number above 0"),
        (YARN, "beta_slow", 33.0, "at most beta_fast, 32.0"),
        (YARN, "attention_factor", 0.0, "a finite number above 0"),
        (YARN, "mscale", -1.0, "a finite number above 0"),
        (YARN, "mscale_all_dim", math.nan, "a finite number above 0"),
    ],
)
def test_a_scaling_that_cannot_be_is_refused_by_field_and_value(changed, name, bad, right):
    with pytest.raises(ValueError) as caught:
        changed(**{name: bad})
    message = str(caught.value)
    assert message.startswith(f"model.rope_scaling.{name} is {bad}; it must be ") and right in message
