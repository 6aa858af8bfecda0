"""The benchmark of quantised formats: its arithmetic, and a planted outlier that it must find and undo."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from tiny import DENSE, masters

from dcjax.data.tokenizers import byte_tokenizer
from dcjax.models import forward, save_hf
from dcjax.models.cache import quantize_rows
from dcjax.models.transformer import hidden_states
from dcjax.serving.formats import formats
from dcjax.types import Rollout

ROOT = Path(__file__).parents[1]
SCRIPT, JSON = ROOT / "benchmarks" / "quantization", ROOT / "benchmarks" / "results" / "quantization.json"

pytestmark = pytest.mark.slow

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(SCRIPT)
    import laboratory
    import outliers
    import report
    import rounding
    import sections
    from rounding import Rounding

# --- roundings ---

NORMAL = np.random.default_rng(0).normal(size=(6, 96)).astype(np.float32)


def rounded(x, *args, **kwargs):
    return np.asarray(Rounding(*args, **kwargs)(jnp.asarray(x, jnp.float32)))


def test_groups_are_rounded_by_the_largest_of_each():
    # steps of 1, 10 and 2: the last group has one number
    x = [7, 3.4, -70, 34, 14]
    assert rounded(x, 4, 2).tolist() == [7, 3, -70, 30, 14]


def test_an_asymmetric_group_lies_between_its_least_and_its_largest():
    assert rounded([10, 11.2, 11.9, 13], 2, 4, asymmetric=True).tolist() == [10, 11, 12, 13]
    assert rounded([10, 11.2, 11.9, 13], 2, 4).tolist() == [13, 13, 13, 13]


def test_it_rounds_as_the_library_does():
    values, scale = quantize_rows(jnp.asarray(NORMAL), jnp.dtype(jnp.int8))
    np.testing.assert_allclose(rounded(NORMAL), values * scale[:, None], rtol=1e-6)
    for bits in (8, 4):
        format = formats[f"int{bits}"]
        stored = format.decode(format.encode(jnp.asarray(NORMAL)), jnp.dtype(jnp.float32), -1)
        np.testing.assert_array_equal(rounded(NORMAL, bits, 32), stored)


@pytest.mark.parametrize("block", [32, 512])
def test_rotated_rows_are_rounded_where_no_number_stands_out(block):
    matrix = scipy.linalg.hadamard(32) / np.sqrt(32)
    turned = (NORMAL.reshape(-1, 32) @ matrix).reshape(NORMAL.shape).astype(np.float32)
    expected = (rounded(turned).reshape(-1, 32) @ matrix).reshape(NORMAL.shape)
    # 32 is the largest power of two that divides 96
    np.testing.assert_allclose(rounded(NORMAL, block=block), expected, atol=1e-5)


@pytest.mark.parametrize("asymmetric", [False, True])
def test_least_squares_take_the_range_with_the_smallest_error(asymmetric):
    group = np.random.default_rng(1).standard_t(3, size=(5, 64)).astype(np.float32)
    held = rounded(group, 4, least_squares=True, asymmetric=asymmetric)
    low, high = (group.min(-1), group.max(-1)) if asymmetric else (np.zeros(5), np.abs(group).max(-1))
    steps, least = (15, 0) if asymmetric else (7, -7)
    for row, numbers in enumerate(group.astype(np.float64)):
        errors = []
        for share in rounding.RANGES:
            step = share * (high[row] - low[row]) / steps
            codes = np.clip(np.round((numbers - share * low[row]) / step), least, steps)
            errors.append(np.square(codes * step + share * low[row] - numbers).sum())
        assert np.square(held[row] - numbers).sum() == pytest.approx(min(errors), rel=1e-3)
        assert min(errors) < errors[0]  # with nothing cut off


def test_simulated_formats_have_the_bytes_that_they_would_have():
    assert Rounding(4, 32, asymmetric=True).bits_each(64) == 5
    assert Rounding(8).bits_each(64) == 8.5
    lab = laboratory.Laboratory(DENSE, None, None, None)
    for name, alike in {"int8": Rounding(8, 32), "int4": Rounding(4, 32), "int8_channel": Rounding(8)}.items():
        simulated = lab.share_of_bytes(rounding.Simulated(alike))
        assert simulated == pytest.approx(lab.share_of_bytes(formats[name]), rel=1e-6)


# --- a planted outlier ---

PLANTED, LAYER = 5, 1


def planted():
    """One channel of what enters gate and up is a hundred times as large, and its weights are as much smaller."""
    params = masters(DENSE)
    layers = dict(params["layers"])
    by = np.ones((2, 32), np.float32)
    by[LAYER, PLANTED] = 100
    layers["post_attention_layernorm"] *= by
    layers |= {name: layers[name] / by[..., None] for name in ("gate_proj", "up_proj")}
    return {**params, "layers": layers}


def make_rollout():
    rng, prompts = np.random.default_rng(0), np.array([3, 6, 1, 5])
    mask = np.arange(8) < np.array([8, 5, 7, 1])[:, None]
    prompt_mask = np.arange(6) >= 6 - prompts[:, None]
    tokens = rng.integers(1, DENSE.vocab_size, (4, 14)).astype(np.int32)
    attention_mask = np.concatenate([prompt_mask, mask], axis=1)
    zeros = np.zeros(mask.shape, np.float32)
    return Rollout(
        tokens=np.where(attention_mask, tokens, 0),
        attention_mask=attention_mask,
        response_mask=mask,
        rollout_logps=zeros,
        temperature=np.ones(4, np.float32),
        versions=np.zeros(mask.shape, np.int32),
        finished=np.zeros(4, bool),
        log_mass=zeros,
    )


@pytest.fixture(scope="module")
def rollout():
    return make_rollout()


@pytest.fixture(scope="module")
def lab(rollout):
    return laboratory.Laboratory.of(DENSE, planted(), laboratory.Text.of(rollout))


@pytest.mark.heavy
def test_a_policy_in_float32_says_what_the_trainer_says_of_the_rollout_as_it_is(lab, rollout):
    logits = forward(DENSE, lab.params, rollout.tokens, rollout.attention_mask)
    logps = np.asarray(jax.nn.log_softmax(logits))[:, 5:-1]
    expected = np.take_along_axis(logps, rollout.tokens[:, 6:, None], axis=-1)[..., 0]
    mask = rollout.response_mask
    policy = laboratory.serve(DENSE, lab.params, formats["float32"])
    scores = lab.scores(policy, formats["float32"], "float32")
    np.testing.assert_allclose(np.asarray(scores.logps)[mask], expected[mask], atol=1e-5)
    np.testing.assert_allclose(np.asarray(lab.trained)[mask], logps[mask], atol=1e-5)
    # rows of other lengths, in which the last token is left out
    seen = rollout.attention_mask.sum() - len(mask)
    assert lab.text.seen().sum() == seen


def test_figures_are_those_of_each_token(lab):
    rng, mask = np.random.default_rng(2), np.asarray(lab.text.mask)
    off = rng.normal(size=mask.shape) * 0.1
    old = np.take_along_axis(np.asarray(lab.trained), np.asarray(lab.text.responses)[..., None], -1)[..., 0]
    kl = rng.random(mask.shape)
    found = lab.figures(laboratory.Scores(old + off, kl, None))
    gaps = [np.abs(np.exp(a) - np.exp(a + b))[real] for a, b, real in zip(old, off, mask, strict=True)]
    mean = np.concatenate(gaps).mean()
    assert found["mean"] == pytest.approx(mean, rel=1e-4)
    assert found["largest"] == pytest.approx(np.concatenate(gaps).max(), rel=1e-4)
    assert found["kl"] == pytest.approx(kl[mask].mean())
    # of a ratio of sums over four responses
    sums = sum((gap.sum() - mean * len(gap)) ** 2 for gap in gaps)
    assert found["error"] == pytest.approx(np.sqrt(4 / 3 * sums) / mask.sum(), rel=1e-4)


@pytest.fixture(scope="module")
def entered(lab):
    return outliers.watch(DENSE, lab.params, lab.text)


@pytest.mark.heavy
def test_the_planted_channel_is_found_where_it_is(lab, entered, rollout):
    rows = outliers.outliers(entered, lab.text, str)
    assert [(row["product"], row["layer"]) for row in rows] == [
        *((product, layer) for product in ("q, k, v", "o", "gate, up", "down") for layer in (0, 1)),
        ("head", 0),
    ]
    (found,) = [row for row in rows if row["share"] > 0.9]
    assert (found["product"], found["layer"], found["channel"]) == ("gate, up", LAYER, PLANTED)
    assert found["mean"] > 0.9 * 32**0.5  # of a single channel
    assert all(row["mean"] < 0.75 * row["width"] ** 0.5 for row in rows if row is not found)
    for worst in found["worst"]:
        assert worst["channel"] == PLANTED and worst["ratio"] <= 32**0.5
        assert int(worst["token"].strip("[]")) in lab.text.tokens[:, worst["position"]]
    hidden, _ = hidden_states(DENSE, lab.params, lab.text.tokens)
    largest = np.abs(np.asarray(hidden))[lab.text.seen()].max(axis=0)
    np.testing.assert_allclose(entered["head"][0].largest, largest, rtol=1e-4)


@pytest.mark.heavy
def test_the_planted_part_and_layer_are_what_makes_w8a8_far_and_smoothing_undoes_it(lab, entered, monkeypatch):
    monkeypatch.setattr(sections, "IN_PARTS", {"w8a8": formats["w8a8"]})
    parts = sections.of_parts(lab)["w8a8"]
    by_kl = {name: parts[name]["kl"] for name in sections.PARTS}
    assert max(by_kl, key=by_kl.get) == "gate, up"
    assert by_kl["gate, up"] > 5 * sorted(by_kl.values())[-2]
    wide, narrow = (laboratory.serve(DENSE, lab.params, formats[name]) for name in ("bf16", "w8a8"))
    first, second = (
        lab.gap(laboratory.mixed(wide, narrow, laboratory.KERNELS, [layer]), formats["bf16"]) for layer in (0, 1)
    )
    assert second["kl"] > 5 * first["kl"]
    # all of it is the format itself, none of it bfloat16
    everywhere = lab.gap(narrow, formats["w8a8"])
    assert parts["all"] == pytest.approx(everywhere, rel=1e-3)

    largest = {name: jnp.stack([inputs.largest for inputs in entered[name]]) for name in outliers.WATCHED}
    params = rounding.smoothed(DENSE, lab.params, largest)
    logits = [forward(DENSE, p, lab.text.tokens) for p in (lab.params, params)]
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-4)
    smooth = lab.gap(laboratory.serve(DENSE, params, formats["w8a8"]), formats["w8a8"])
    assert smooth["kl"] < everywhere["kl"] / 5


@pytest.mark.heavy
def test_a_cache_of_rounded_keys_and_values_is_the_librarys(lab):
    policy, bf16 = laboratory.serve(DENSE, lab.params, formats["bf16"]), formats["bf16"]
    how = rounding.RoundedCache(Rounding(8, block=512), Rounding(8))
    scores = [lab.scores(policy, bf16, "int8"), lab.scores(policy, bf16, attention=how)]
    # but for what the bfloat16 cache rounds besides
    np.testing.assert_allclose(scores[1].logps, scores[0].logps, atol=0.05)


# --- the page, and the whole ---

RESULTS = json.loads(JSON.read_text())


def test_the_page_has_the_tables_of_the_figures():
    page = (ROOT / "docs" / "quantization.md").read_text()
    for name, table in report.tables(RESULTS).items():
        assert table in page, name


@pytest.mark.slow
def test_every_section_is_measured_written_drawn_and_printed(tmp_path):
    folder, path, picture = tmp_path / "model", tmp_path / "q.json", tmp_path / "q.png"
    config = replace(DENSE, vocab_size=258, family="qwen2")
    save_hf(folder, config, masters(config))
    byte_tokenizer().save_pretrained(folder)
    run = [sys.executable, SCRIPT, "--json", path, "--picture", picture]
    printed = subprocess.run([*run, folder], check=True, stdout=subprocess.PIPE, text=True).stdout
    assert printed == subprocess.run([*run, "--markdown"], check=True, stdout=subprocess.PIPE, text=True).stdout
    results = json.loads(path.read_text())
    assert results.keys() == RESULTS.keys() and picture.stat().st_size > 10_000
    assert {name: of.keys() for name, of in results["parts"].items()} == {
        name: of.keys() for name, of in RESULTS["parts"].items()
    }
    assert results["formats"]["float32"]["largest"] < 1e-4
    for section in ("formats", "caches", "alternatives"):
        assert results[section].keys() == RESULTS[section].keys()
        assert all(0 <= of["mean"] < 0.1 for of in results[section].values())
