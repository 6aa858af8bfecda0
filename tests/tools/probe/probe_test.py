import dataclasses
import functools
import itertools
import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pretend
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from launching import complaints
from probes import RESULT

import dcjax.recipe.forward
import dcjax.tools.probe.probe
import dcjax.tools.probe.tables
from dcjax.cli import main
from dcjax.data.arithmetic import build_tokenizer
from dcjax.data.task import encode_prompts
from dcjax.errors import RunError
from dcjax.models import forward, init_params
from dcjax.recipe.serving import ServingConfig
from dcjax.serving.formats import formats
from dcjax.serving.mismatch import MismatchConfig
from dcjax.sharding.mesh import MeshConfig, make_mesh
from dcjax.tools.open_model import OpenedModel
from dcjax.tools.probe.gaps import (
    FIGURES,
    bucketed,
    by_layer,
    changed_experts,
    decompose,
    gap,
    position_edges,
    visible,
    worst_tokens,
)
from dcjax.tools.probe.ladder import Served, ladder
from dcjax.tools.probe.policies import Policies, Weights
from dcjax.tools.probe.probe import PROBABILITIES, probe
from dcjax.tools.probe.source import Source, load_sources, read_prompts
from dcjax.tools.probe.tables import to_summary
from dcjax.types import Rollout

pytestmark = pytest.mark.heavy

DATA = Path(__file__).parents[2] / "data"
P, SLOTS = tiny.PROMPT_LENGTH, tiny.SLOTS
CONFIG = dataclasses.replace(
    tiny.CONFIG,
    rollout=dataclasses.replace(tiny.CONFIG.rollout, temperature=0.8),
    serving=dataclasses.replace(tiny.CONFIG.serving, format="bf16"),
)
MOE = dataclasses.replace(tiny.EXPERTS, num_layers=1)
TRUNCATED = dataclasses.replace(CONFIG.rollout, top_k=5, top_p=0.9)


@functools.cache
def tokenizer():
    return build_tokenizer()


@functools.cache
def prompts(count=11):
    """More than there are slots, and no multiple of them."""
    return encode_prompts(tokenizer(), CONFIG.task.problems("heldout", 0, 0, count))


@functools.cache
def params_of(model, seed=0):
    return jax.jit(init_params, static_argnums=0)(model, jax.random.key(seed))


@functools.cache
def policies(**changes):
    return Policies(dataclasses.replace(CONFIG, **changes), [tokenizer().eos_token_id])


def source_of(config, *, stale=None, prompts=prompts):
    model = OpenedModel(
        name="planted",
        step=3,
        config=config,
        trained_on=MeshConfig(),
        mesh=make_mesh(MeshConfig()),
        tokenizer=tokenizer(),
        chat_template=None,
        end_tokens=[tokenizer().eos_token_id],
        directory=Path("nowhere"),
    )
    weights = Weights(params_of(config.model), stale, 2)
    return Source(model, prompts(), weights, stale_step=None if stale is None else 2, out=Path("probe"))


# --- the ladder ---


@pytest.mark.parametrize(
    ("format", "expected"),
    [
        ("float32", ["decode_path float32 float32/float32"]),
        ("bf16", ["decode_path float32 float32/float32", "dtype bf16 bf16/bf16"]),
        ("fp16", ["decode_path float32 float32/float32", "dtype fp16 fp16/fp16"]),
        (
            "int4",
            ["decode_path float32 float32/float32", "dtype bf16 bf16/bf16", "weights int4 int4/bf16"],
        ),
        (
            "int8",
            [
                "decode_path float32 float32/float32",
                "dtype bf16 bf16/bf16",
                "weights int8 int8/bf16",
                "kv_cache int8 int8/int8",
            ],
        ),
        (
            "fp8_weight_only",
            ["decode_path float32 float32/float32", "dtype bf16 bf16/bf16", "weights fp8 fp8_weight_only/bf16"],
        ),
        (
            "w8a8",
            [
                "decode_path float32 float32/float32",
                "dtype bf16 bf16/bf16",
                "weights int8 int8_channel/bf16",
                "activations int8 w8a8/bf16",
                "kv_cache int8 w8a8/int8",
            ],
        ),
        (
            "fp8",
            [
                "decode_path float32 float32/float32",
                "dtype bf16 bf16/bf16",
                "weights fp8 fp8_weight_only/bf16",
                "activations fp8 fp8/bf16",
                "kv_cache fp8 fp8/fp8",
            ],
        ),
    ],
)
def test_each_rung_adds_one_thing_and_what_a_format_lacks_is_no_rung(format, expected):
    rungs = ladder(ServingConfig(format=format), MismatchConfig(), trained_in="float32")
    shown = [f"{name} {detail} {served.format.name}/{served.kv_cache}" for name, detail, served in rungs]
    assert shown == expected


@pytest.mark.parametrize("format", formats)
@pytest.mark.parametrize("kv_cache", ["auto", "float32", "bf16", "fp16", "int8", "fp8"])
def test_the_last_rung_is_the_deployed_policy(format, kv_cache):
    added = MismatchConfig(
        weight_noise=0.1, logit_noise=0.2, routing_flips=0.3, rounded_masters=True, raw_logps=True, staleness=2
    )
    rungs = ladder(ServingConfig(format=format, kv_cache=kv_cache), added, trained_in="float32", stale_step=5)
    last = rungs[-1].served
    assert (last.format.name, last.kv_cache) == (format, Served.of(format, kv_cache).kv_cache)
    assert last.mismatch == dataclasses.replace(added, staleness=0) and last.stale
    assert [rung[:2] for rung in rungs[-6:]] == [
        ("rounded_masters", "bf16"),
        ("weight_noise", "0.1"),
        ("logit_noise", "0.2"),
        ("routing_flips", "0.3"),
        ("stale_weights", "step 5"),
        ("raw_logps", "temperature 1, whole softmax"),
    ]
    assert len({rung.served for rung in rungs}) == len(rungs)


def test_a_trainer_in_bf16_is_compared_with_an_engine_in_bf16_first():
    names = [rung.name for rung in ladder(ServingConfig(format="w8a8"), MismatchConfig(), trained_in="bf16")]
    assert names == ["decode_path", "weights", "activations", "kv_cache"]
    rungs = ladder(ServingConfig(format="float32"), MismatchConfig(), trained_in="bf16")
    assert [rung[:2] for rung in rungs] == [("decode_path", "bf16"), ("dtype", "float32")]


def test_equal_policies_are_equal_however_their_cache_is_named():
    assert Served.of("int8") == Served.of("int8", "int8") != Served.of("int8", "bf16")


# --- figures ---


@st.composite
def scored(draw):
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    lengths = rng.integers(1, 8, 4)
    mask = np.arange(7) < lengths[:, None]
    old, new = (np.where(mask, -rng.exponential(size=mask.shape), 0).astype(np.float32) for _ in range(2))
    return old, new, mask


@given(scored())
def test_a_gap_is_what_loops_over_tokens_and_responses_find(case):
    old, new, mask = case
    differences, k3, whole, each = [], [], [], []
    for row in range(len(mask)):
        total = 0.0
        for column in np.flatnonzero(mask[row]):
            p, q = float(old[row, column]), float(new[row, column])
            differences.append(abs(math.exp(p) - math.exp(q)))
            k3.append(math.exp(p - q) - 1 - (p - q))
            total += p - q
        whole.append(abs(total))
        each.append(abs(total) / mask[row].sum())
    found = gap(old_logps=old, rollout_logps=new, mask=mask)
    assert tuple(found) == FIGURES
    ordered = sorted(differences)
    for percent in (50, 90, 99):
        exact = ordered[math.ceil(percent * len(ordered) / 100) - 1]
        assert found[f"prob_diff_p{percent}"] == pytest.approx(exact, rel=0.01, abs=1e-7)
    assert found["prob_diff_mean"] == pytest.approx(np.mean(differences), rel=1e-4, abs=1e-7)
    assert found["prob_diff_max"] == pytest.approx(max(differences), rel=1e-4, abs=1e-7)
    assert found["k3"] == pytest.approx(np.mean(k3), rel=1e-3, abs=1e-6)
    assert found["log_ppl_abs_diff"] == pytest.approx(np.mean(whole), rel=1e-4, abs=1e-5)
    assert found["log_ppl_abs_diff_per_token"] == pytest.approx(np.mean(each), rel=1e-4, abs=1e-5)


def test_a_stages_own_gap_is_to_the_policy_before_it():
    trained, first, second = (np.log(np.array([[p, 0.5]], np.float32)) for p in (0.5, 0.6, 0.3))
    mask = np.array([[True, False]])
    stages = decompose(trained, [("a", "x", first), ("b", "", second)], mask)
    assert [(stage.name, stage.detail) for stage in stages] == [("a", "x"), ("b", "")]
    assert [stage.own["prob_diff_max"] for stage in stages] == pytest.approx([0.1, 0.3], abs=1e-6)
    assert [stage.cumulative["prob_diff_max"] for stage in stages] == pytest.approx([0.1, 0.2], abs=1e-6)


def test_buckets_hold_every_token_once():
    rng = np.random.default_rng(0)
    difference, p, mask = rng.random((4, 9)), rng.random((4, 9)), rng.random((4, 9)) < 0.7
    p[0, :3] = 0, 1, 0.5
    mask[0, :3] = True
    rows = bucketed(difference, p, PROBABILITIES, mask)
    assert sum(row["tokens"] for row in rows) == mask.sum()
    for row in rows:
        # 1 belongs to the last
        inside = (p >= row["from"]) & ((p < row["to"]) | (row["to"] == 1)) & mask
        assert row["tokens"] == inside.sum()
        assert row["prob_diff_mean"] == pytest.approx(difference[inside].mean())
        assert row["prob_diff_max"] == difference[inside].max()


def test_a_bucket_without_a_token_is_left_out():
    rows = bucketed(np.full((1, 1), 0.25), np.full((1, 1), 0.95), PROBABILITIES, np.ones((1, 1), bool))
    assert rows == [{"from": 0.9, "to": 0.99, "tokens": 1, "prob_diff_mean": 0.25, "prob_diff_max": 0.25}]


@given(st.integers(1, 300))
def test_positions_fall_into_doubling_buckets(length):
    edges = position_edges(length)
    assert edges[0] == 0 and edges[-1] >= length and (length == 1 or edges[-2] < length)
    assert edges[1:] == [2**power for power in range(len(edges) - 1)]


def test_the_error_of_a_layer_is_relative_to_its_own_stream():
    reference = np.array([[[[3.0, 4.0], [1.0, 0.0]], [[9.0, 9.0], [9.0, 9.0]]]], np.float32)
    residuals = reference + np.array([[0.5, 0.0], [0.0, 2.0]], np.float32)
    rows = by_layer(residuals, reference, np.array([[True, False]]))
    assert rows == [{"layer": 0, "relative_error": 0.1}, {"layer": 1, "relative_error": 2.0}]


def test_experts_are_compared_whatever_their_order():
    sampled = np.array([[[[0, 1], [2, 3]], [[0, 1], [2, 3]], [[0, 1], [2, 3]]]])
    trained = np.array([[[[1, 0], [3, 2]], [[0, 2], [2, 3]], [[3, 2], [0, 1]]]])
    assert changed_experts(trained, sampled, np.array([[True, True, False]])) == {"any_layer": 0.5, "mean_layer": 0.25}


def rollout_of(rows, p):
    """Rows of (prompt, response), padded as a rollout is."""
    width, length = (max(len(row[part]) for row in rows) for part in (0, 1))
    tokens = np.zeros((len(rows), width + length), np.int32)
    prompt_mask, mask = np.zeros((len(rows), width), bool), np.zeros((len(rows), length), bool)
    for number, (prompt, response) in enumerate(rows):
        tokens[number, width - len(prompt) : width + len(response)] = [*prompt, *response]
        prompt_mask[number, width - len(prompt) :], mask[number, : len(response)] = True, True
    zeros = np.zeros(mask.shape, np.float32)
    ones = np.ones(len(rows), np.float32)
    return Rollout(
        tokens,
        np.concatenate([prompt_mask, mask], axis=1),
        mask,
        p,
        ones,
        np.zeros(mask.shape, np.int32),
        ones > 0,
        zeros,
    )


def test_the_worst_token_comes_first_with_what_stood_around_it():
    p, q = (np.log(np.array(x, np.float32)) for x in ([[0.5, 0.5], [0.5, 1.0]], [[0.4, 0.5], [0.9, 0.1]]))
    rollout = rollout_of([([5, 6], [7, 8]), ([1], [2])], q)
    first, second = worst_tokens(rollout, old_logps=p, rollout_logps=q, decode=str, count=2)
    shown = {"response": 1, "position": 0, "before": "[1]", "token": "[2]", "behind": "[]"}
    assert first == shown | {
        "trained": pytest.approx(0.5),
        "sampled": pytest.approx(0.9),
        "prob_diff": pytest.approx(0.4),
    }
    assert (second["before"], second["token"], second["behind"]) == ("[5, 6]", "[7]", "[8]")
    assert len(worst_tokens(rollout, old_logps=p, rollout_logps=q, decode=str, count=99)) == 3


@given(st.text())
def test_what_is_shown_prints_and_tells_all_texts_of_a_letter_apart(text):
    assert visible(text).isprintable()
    assert visible(visible(text)) == visible(text)
    assert text.isprintable() == (visible(text) == text)


def test_escape_sequences_and_marks_of_direction_are_shown_as_escapes():
    assert visible("a\x1b[2J\n\u202eé\ud800") == r"a\x1b[2J\n\u202eé\ud800"


# --- causes that are planted are found ---

CAUSES = {
    "weights": ServingConfig(format="int4", slots=SLOTS),
    "kv_cache": ServingConfig(format="bf16", kv_cache="fp8", slots=SLOTS),
    "logit_noise": ServingConfig(format="bf16", slots=SLOTS),
    "stale_weights": ServingConfig(format="bf16", slots=SLOTS),
}


def stages_with(cause, seed):
    """The stages of a model whose engine is bf16 and has one more cause, on tokens that bf16 sampled."""
    mismatch = MismatchConfig(logit_noise=0.05 if cause == "logit_noise" else 0)
    stale = 1 if cause == "stale_weights" else None
    rungs = ladder(CAUSES[cause], mismatch, trained_in="float32", stale_step=stale)
    masters, rng = params_of(CONFIG.model, seed), np.random.default_rng(seed)
    moved = jax.tree.map(lambda x: x * (1 + 0.05 * rng.normal(size=x.shape).astype(np.float32)), masters)
    weights, key, own = Weights(masters, moved, seed), jax.random.key(seed), policies()
    rollout = own.sample(dataclasses.replace(Served.of("bf16"), stale=stale is not None), weights, prompts(), key)
    trained = own.train(masters, rollout).logps
    scores = [(rung.name, rung.detail, own.score(rung.served, weights, rollout, key).logps) for rung in rungs]
    if stale is not None:
        scores.append(("as_sampled", "", rollout.rollout_logps))
    return decompose(trained, scores, rollout.response_mask)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))])
@pytest.mark.parametrize("cause", CAUSES)
def test_the_stage_of_the_planted_cause_has_the_largest_gap(cause, seed):
    stages = {stage.name: stage.own for stage in stages_with(cause, seed)}
    assert max(stages, key=lambda name: stages[name]["prob_diff_mean"]) == cause
    # in float32 the engine is the trainer
    assert stages["decode_path"]["prob_diff_max"] <= 5e-5
    assert stages.get("as_sampled", {"prob_diff_max": 0})["prob_diff_max"] <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("format", formats)
def test_the_ladder_explains_all_of_what_was_sampled(format):
    weights, key, own = Weights(params_of(CONFIG.model), None, 0), jax.random.key(0), policies()
    rollout = own.sample(Served.of(format), weights, prompts(), key)
    scores = own.score(Served.of(format), weights, rollout, key).logps
    explained = gap(old_logps=scores, rollout_logps=rollout.rollout_logps, mask=rollout.response_mask)
    assert explained["prob_diff_max"] <= 1e-6


# --- knobs that users meet ---

FLOAT32 = dataclasses.replace(CONFIG.serving, format="float32")


def names_and_largest(found):
    own = {stage.name: stage.own["prob_diff_mean"] for stage in found.stages}
    return list(own), max(own, key=lambda name: own[name])


def test_masters_that_were_rounded_are_the_cause_with_the_gap_that_rounding_them_makes(only_float32):
    config = dataclasses.replace(CONFIG, serving=FLOAT32, mismatch=MismatchConfig(rounded_masters=True))
    found = probe(source_of(config))
    assert names_and_largest(found) == (["decode_path", "rounded_masters", "as_sampled"], "rounded_masters")
    own = policies(mismatch=config.mismatch, serving=FLOAT32)
    served = dataclasses.replace(Served.of("float32"), mismatch=config.mismatch)
    rollout = own.sample(served, source_of(config).weights, prompts(), jax.random.key(0))
    # by the training forward, of masters that NumPy rounded
    rounded = jax.tree_util.tree_map_with_path(
        lambda path, x: x if "norm" in path[-1].key else np.asarray(x).astype(jnp.bfloat16).astype(np.float32),
        params_of(CONFIG.model),
    )
    of_each = [own.train(p, rollout).logps for p in (params_of(CONFIG.model), rounded)]
    difference = np.abs(np.diff(np.exp(of_each), axis=0))[0][rollout.response_mask]
    assert found.stages[1].own["prob_diff_mean"] == pytest.approx(difference.mean(), rel=1e-2)
    assert difference.mean() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("truncated", [False, True])
def test_log_probs_without_the_samplers_transform_are_the_cause_with_the_transforms_gap(only_float32, truncated):
    rollout = TRUNCATED if truncated else CONFIG.rollout
    mismatch = MismatchConfig(raw_logps=True)
    config = dataclasses.replace(CONFIG, serving=FLOAT32, mismatch=mismatch, rollout=rollout)
    found = probe(source_of(config))
    assert names_and_largest(found) == (["decode_path", "raw_logps", "as_sampled"], "raw_logps")
    assert found.stages[0].own["prob_diff_max"] <= 5e-5 and found.stages[2].own["prob_diff_max"] <= 1e-6
    # by hand, from whole logits
    served = dataclasses.replace(Served.of("float32"), mismatch=mismatch)
    sampled = policies(mismatch=mismatch, serving=FLOAT32, rollout=rollout).sample(
        served, source_of(config).weights, prompts(), jax.random.key(0)
    )
    logits = np.asarray(
        forward(config.model, params_of(config.model), sampled.tokens, sampled.attention_mask), np.float64
    )
    differences = []
    for row, column in np.argwhere(sampled.response_mask):
        at, token = logits[row, P - 1 + column], sampled.tokens[row, P + column]
        left = [t for t in sampled.candidate_tokens[row, column] if t >= 0] if truncated else np.arange(len(at))
        drawn_from = np.exp(at[token] / 0.8) / np.exp(at[left] / 0.8).sum()
        differences.append(abs(drawn_from - np.exp(at[token]) / np.exp(at).sum()))
    assert found.stages[1].own["prob_diff_mean"] == pytest.approx(np.mean(differences), rel=1e-3)
    assert found.total["prob_diff_mean"] == pytest.approx(np.mean(differences), rel=1e-3)
    assert found.stages[-1].cumulative == found.total


def test_a_forward_that_depends_on_its_chunks_is_found_by_what_is_cut_otherwise(only_float32, monkeypatch):
    """Planted: a thousandth of log-prob where one sequence is alone, a hundredth where the head's chunks are short."""
    compiled_forward = dcjax.recipe.forward._compiled

    def depending(rounds):
        def shifted(model, numerics, width, mesh, params, tokens, *inputs):
            logps, experts = compiled_forward(rounds)(model, numerics, width, mesh, params, tokens, *inputs)
            return logps + 0.001 * (len(tokens) == 1) + 0.01 * (model.head_chunk < width), experts

        return shifted

    monkeypatch.setattr(dcjax.recipe.forward, "_compiled", depending)
    found = probe(source_of(dataclasses.replace(CONFIG, serving=FLOAT32)))
    for name, sizes, shift in (("sequences", (3, 1), 0.001), ("head", (20, 2), 0.01)):
        row = found.chunks[name]
        assert (row["own"], row["other"]) == sizes
        assert row["log_ppl_abs_diff_per_token"] == pytest.approx(shift, rel=1e-2)


def test_in_float32_chunks_change_next_to_nothing(only_float32):
    found = probe(source_of(dataclasses.replace(CONFIG, serving=FLOAT32)))
    assert max(row["prob_diff_max"] for row in found.chunks.values()) <= 5e-6


# --- the whole probe ---


@pytest.fixture
def only_float32(monkeypatch):
    """Formats are what takes the time; the run below has them all."""
    monkeypatch.setattr(dcjax.tools.probe.probe, "formats", {"float32": formats["float32"], "bf16": formats["bf16"]})


def finite(tree):
    return all(math.isfinite(x) for x in jax.tree.leaves(tree) if isinstance(x, float))


@pytest.mark.slow
def test_where_the_distribution_is_cut_the_total_is_of_what_is_left(only_float32):
    model = dataclasses.replace(CONFIG.model, num_layers=1)
    config = dataclasses.replace(CONFIG, rollout=TRUNCATED, model=model)
    found = probe(source_of(config))
    assert finite(dataclasses.asdict(found))
    assert found.stages[-1].own["prob_diff_max"] <= 1e-5
    # by hand, from whole logits
    own = policies(rollout=TRUNCATED, model=model)
    rollout = own.sample(Served.of("bf16"), source_of(config).weights, prompts(), jax.random.key(0))
    mask = rollout.attention_mask
    logits = np.asarray(forward(config.model, params_of(config.model), rollout.tokens, mask), np.float64) / 0.8
    differences, uncut = [], []
    for row, column in np.argwhere(rollout.response_mask):
        weights = np.exp(logits[row, P - 1 + column] - logits[row, P - 1 + column].max())
        left = [token for token in rollout.candidate_tokens[row, column] if token >= 0]
        sampled = math.exp(rollout.rollout_logps[row, column])
        token = rollout.tokens[row, P + column]
        differences.append(abs(weights[token] / weights[left].sum() - sampled))
        uncut.append(abs(weights[token] / weights.sum() - sampled))
    assert found.total["prob_diff_mean"] == pytest.approx(np.mean(differences), rel=1e-2)
    assert np.mean(uncut) > 10 * found.total["prob_diff_mean"]
    assert found.sampling["prob_diff_mean"] > 10 * found.total["prob_diff_mean"]


@pytest.mark.slow
def test_flipped_experts_are_counted_attributed_and_replayed(only_float32):
    serving = dataclasses.replace(CONFIG.serving, format="float32")
    flipped = MismatchConfig(routing_flips=0.2)
    found = probe(source_of(dataclasses.replace(CONFIG, model=MOE, serving=serving, mismatch=flipped)))
    assert [stage.name for stage in found.stages] == ["decode_path", "routing_flips", "as_sampled"]
    assert found.stages[0].own["prob_diff_max"] <= 5e-5 and found.stages[2].own["prob_diff_max"] <= 1e-6
    assert found.routing is not None
    # one sparse layer; prompts, about a fifth of the tokens, are prefilled without flips
    shares = found.routing["changed_experts"]
    assert 0.1 < shares["mean_layer"] == shares["any_layer"] < 0.25
    assert found.routing["with_replay"]["prob_diff_max"] <= 5e-5
    # this run replays nothing
    assert found.total == found.routing["without_replay"] and found.total["prob_diff_mean"] > 1e-4
    assert found.sharding["mesh"] == {"tensor": 2} and found.sharding["prob_diff_max"] <= 5e-5


def test_the_trainer_on_two_devices_is_compared_with_one(only_float32):
    # A run that samples ahead is no exception, though training on two devices would need others to serve on.
    ahead = dataclasses.replace(CONFIG, rollout=dataclasses.replace(CONFIG.rollout, async_level=1))
    found = probe(source_of(ahead))
    assert found.routing is None
    assert found.sharding["mesh"] == {"tensor": 2}
    assert 0 < found.sharding["prob_diff_max"] <= 5e-5
    # the temperature alone
    assert found.sampling["temperature"] == 0.8 and found.sampling["prob_diff_mean"] > 0.001
    # 1.5 times the mean over responses, which are of unequal lengths
    assert 1 < found.recommended_budget / found.total["prob_diff_mean"] < 2


def test_log_probs_that_are_no_numbers_are_refused_by_their_place():
    broken = jax.tree.map(lambda x: x * jnp.float32("nan"), params_of(CONFIG.model))
    source = dataclasses.replace(source_of(CONFIG), weights=Weights(broken, None, 0))
    with pytest.raises(RunError, match=r"the trainer gives log-prob nan at response, token \(0, 0\)"):
        probe(source)


def test_a_format_that_the_model_cannot_be_served_in_says_why(monkeypatch):
    narrow = Policies(dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, intermediate_size=72)), 1)
    with pytest.raises(RunError, match="down_proj is contracted over 72") as refused:
        narrow.score(Served.of("int4"), Weights(params_of(narrow.config.model), None, 0), None, None)
    read = Policies.read

    def refusing(self, served, *arguments):
        if served.format.name == "int4":
            raise refused.value
        return read(self, served, *arguments)

    monkeypatch.setattr(Policies, "read", refusing)
    monkeypatch.setattr(
        dcjax.tools.probe.probe, "formats", {name: formats[name] for name in ("float32", "bf16", "int4")}
    )
    found = probe(source_of(CONFIG))
    assert found.formats["float32"]["prob_diff_max"] <= 5e-5
    assert found.formats["int4"] == {"not_served": str(refused.value)}


# --- the command ---


@pytest.fixture
def run(finished_run, tmp_path):
    """Of eight steps, with a checkpoint every two."""
    return shutil.copytree(finished_run, tmp_path / "run")


@pytest.fixture
def probed(capfd):
    """Runs `dcjax probe ... --json`; returns what it printed."""

    def run(*arguments):
        capfd.readouterr()
        status = main(["probe", *map(str, arguments), "--json"])
        output, errors = capfd.readouterr()
        assert status == 0, errors
        assert complaints(errors) == []
        assert output.count("\n") == 1
        return json.loads(output, parse_constant=pytest.fail)

    return run


def test_a_run_is_probed_with_the_weights_of_an_earlier_step(run, probed, monkeypatch):
    monkeypatch.setattr(
        dcjax.tools.probe.probe, "formats", {name: formats[name] for name in ("float32", "bf16", "int4")}
    )
    found = probed(run, "--prompts", 11, "--formats", "bf16", "--stale", 6)
    assert (found["step"], found["format"], found["kv_cache"], found["responses"]) == (8, "bf16", "bf16", 11)
    means = {name: row["prob_diff_mean"] for name, row in found["formats"].items()}
    assert list(means) == ["float32", "bf16", "int4"] and means["float32"] < means["bf16"] < means["int4"]
    assert found["formats"]["float32"]["prob_diff_max"] <= 5e-5
    assert [stage["name"] for stage in found["stages"]] == ["decode_path", "dtype", "stale_weights", "as_sampled"]
    assert found["stages"][-2]["detail"] == "step 6"
    largest = max(found["stages"], key=lambda stage: stage["own"]["prob_diff_mean"])
    assert largest["name"] == "stale_weights"
    assert_consistent(found, run)


@pytest.mark.slow
def test_a_run_is_probed_in_every_format(run, probed):
    found = probed(run, "--prompts", 11, "--stale", 6)
    assert (found["step"], found["format"], found["kv_cache"], found["responses"]) == (8, "int8", "int8", 11)
    assert set(found["formats"]) == set(formats)
    for row in found["formats"].values():
        assert 0 < row["prob_diff_mean"] <= row["prob_diff_max"] <= 1 and row["bytes"] <= row["float32_bytes"]
    means = {name: row["prob_diff_mean"] for name, row in found["formats"].items()}
    assert means["float32"] < means["bf16"] < means["int8"] and means["bf16"] < means["fp8"]
    assert found["formats"]["float32"]["prob_diff_max"] <= 5e-5
    assert found["formats"]["int8"]["bytes"] < 0.3 * found["formats"]["float32"]["bytes"]
    assert [stage["name"] for stage in found["stages"]] == [
        *("decode_path", "dtype", "weights", "kv_cache", "stale_weights", "as_sampled")
    ]
    assert_consistent(found, run)


def assert_consistent(found, run):
    """The stages add up to what was sampled, the parts to the whole, and the files hold what was printed."""
    assert found["stages"][-1]["own"]["prob_diff_max"] <= 1e-6
    assert found["stages"][-1]["cumulative"] == found["total"]
    assert sum(row["tokens"] for row in found["by_position"]) == found["tokens"]
    assert len(found["by_layer"]) == 2
    assert json.loads((run / "probe" / f"probe-{found['format']}.json").read_text()) == found
    assert (run / "probe" / f"probe-{found['format']}.png").read_bytes().startswith(b"\x89PNG")


def test_of_a_run_whose_weights_lag_those_it_kept_are_served(recipe, tmp_path, monkeypatch):
    pretend.install(monkeypatch)
    lagging = ["--mismatch.staleness", "2", "--warm_start.steps", "0", "--steps", "3", "--checkpoint.every", "1"]
    assert main(["train", str(recipe), "--run-dir", str(tmp_path / "run"), *lagging]) == 0
    checkpoints = tmp_path / "run" / "checkpoints"
    ((newest,), (before,), (last,)) = map(load_sources, (checkpoints / "3", checkpoints / "1", tmp_path / "run"))
    assert (newest.model.step, newest.stale_step, newest.weights.version) == (3, 1, 1)
    assert (before.model.step, before.stale_step) == (1, 0)
    jax.tree.map(np.testing.assert_array_equal, newest.weights.stale, last.weights.stale)
    norms = [float(np.asarray(params["norm"])[0]) for params in (newest.weights.params, newest.weights.stale)]
    assert norms[0] != norms[1]


@pytest.mark.slow
def test_other_weights_another_format_and_another_place_can_be_asked_for(run, probed, only_float32, tmp_path):
    options = ("--prompts", 5, "--stale", 2, "--formats", "float32", "--kv-cache", "fp8", "--out", tmp_path / "there")
    found = probed(run / "checkpoints" / "4", *options)
    assert (found["step"], found["format"], found["kv_cache"]) == (4, "float32", "fp8")
    assert [(stage["name"], stage["detail"]) for stage in found["stages"]] == [
        ("decode_path", "float32"),
        ("kv_cache", "fp8"),
        ("stale_weights", "step 2"),
        ("as_sampled", ""),
    ]
    largest = max(found["stages"], key=lambda stage: stage["own"]["prob_diff_mean"])
    assert largest["name"] == "stale_weights"
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["probe-float32.json", "probe-float32.png"]


@pytest.fixture
def folder(tmp_path):
    """A Hugging Face folder with a tokenizer and a file of prompts."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "hf").mkdir(exist_ok=True)
        shutil.copy(DATA / "hf_tiny_qwen3" / name, tmp_path / "hf" / name)
    build_tokenizer().save_pretrained(tmp_path / "hf")
    (tmp_path / "prompts").write_text('{"prompt": "1+2=", "answer": 3}\n\n4-3+1-1+2-2+1=\n')
    return tmp_path / "hf"


@pytest.mark.slow
def test_a_hugging_face_folder_is_probed_with_prompts_of_a_file(folder, probed, only_float32, capfd, monkeypatch):
    monkeypatch.chdir(folder.parent)
    found = probed("hf", "--formats", "float32", "--prompts-file", "prompts", "--max-response-length", 3)
    assert (found["step"], found["format"], found["responses"]) == (None, "float32", 2)
    assert 2 <= found["tokens"] <= 6 and found["by_position"][-1]["to"] <= 4
    assert found["formats"]["float32"]["prob_diff_max"] <= 5e-5
    assert (folder.parent / "probe" / "probe-float32.json").exists()


@pytest.fixture
def prompted(folder, monkeypatch):
    """`load_sources` of the folder and of its prompts, the longest of which takes 14 tokens."""
    monkeypatch.chdir(folder.parent)
    return functools.partial(load_sources, Path("hf"), prompts_file=Path("prompts"))


def rewrite(path, **fields):
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | fields))


@pytest.mark.parametrize(
    ("positions", "most", "given", "expected"),
    [
        (40_960, None, None, 256),
        (40_960, 9, None, 9),
        (40_960, 32_768, None, 256),
        (28, None, None, 14),
        (28, 9, None, 9),
        (40_960, 9, 1000, 1000),
        (28, None, 14, 14),
        (15, None, None, 1),
    ],
)
def test_the_longest_response_of_a_folder_follows_from_what_it_says_and_has(
    folder, prompted, positions, most, given, expected
):
    rewrite(folder / "config.json", max_position_embeddings=positions)
    rewrite(folder / "generation_config.json", max_new_tokens=most)
    (source,) = prompted(max_response_length=given)
    rollout = source.model.config.rollout
    assert (rollout.max_prompt_length, rollout.max_response_length) == (14, expected)


@pytest.mark.parametrize(
    ("positions", "most", "given", "told"),
    [
        (28, None, 15, r"^max-response-length is 15; hf has 28 positions, of which the longest prompt leaves 14$"),
        (14, None, None, r"^the longest prompt takes 14 tokens; hf has 14 positions, for a response too$"),
        (28, None, 0, r"^rollout\.max_response_length is 0; it must be at least 1$"),
        (28, "9", None, r"generation_config\.json: max_new_tokens is '9'; it must be an integer from 1 to \d+$"),
    ],
)
def test_a_folders_length_that_cannot_be_is_refused(folder, prompted, positions, most, given, told):
    rewrite(folder / "config.json", max_position_embeddings=positions)
    rewrite(folder / "generation_config.json", max_new_tokens=most)
    with pytest.raises(RunError, match=told):
        prompted(max_response_length=given)


def test_of_several_formats_what_does_not_depend_on_them_is_read_once(prompted, monkeypatch):
    read, params = [], OpenedModel.params
    monkeypatch.setattr(OpenedModel, "params", lambda self: read.append(self) or params(self))
    sources = prompted(formats=["fp8", "bf16", "fp8"], kv_cache="fp16", slots=3)
    served = [source.model.config.serving for source in sources]
    assert [(each.format, each.kv_cache, each.slots) for each in served] == [("fp8", "fp16", 3), ("bf16", "fp16", 3)]
    assert len(read) == 1
    assert sources[0].weights is sources[1].weights and sources[0].prompts is sources[1].prompts


@pytest.fixture
def probing(folder, monkeypatch, capfd):
    """Runs `dcjax probe FOLDER --formats bf16,int8,fp8` with results that are made up; the so manyth is interrupted."""

    def run(*options, interrupted=None):
        made = itertools.count(1)

        def made_up(source, *, seed):
            if next(made) == interrupted:
                raise KeyboardInterrupt
            return dataclasses.replace(RESULT, source="hf", step=None, format=source.model.config.serving.format)

        monkeypatch.setattr(dcjax.tools.probe.probe, "probe", made_up)
        monkeypatch.setattr(dcjax.tools.probe.tables, "draw", lambda probe: b"drawn")
        monkeypatch.chdir(folder.parent)
        capfd.readouterr()
        status = main(["probe", "hf", "--prompts-file", "prompts", "--formats", "bf16, int8,fp8", *options])
        output, errors = capfd.readouterr()
        return status, output, complaints(errors), sorted(path.name for path in Path("probe").iterdir())

    return run


def test_each_format_is_printed_and_written_and_all_are_summed_up(probing):
    status, output, told, written = probing()
    assert (status, told) == (0, [])
    headers = [line.split()[3] for line in output.splitlines() if line.startswith("hf, served in ")]
    assert headers == ["bf16", "int8", "fp8"]
    assert output.endswith("\n" + to_summary([dataclasses.replace(RESULT, format=name) for name in headers]) + "\n")
    assert written == [f"probe-{name}.{kind}" for name in sorted(headers) for kind in ("json", "png")]


def test_in_json_each_format_is_a_line(probing):
    status, output, told, _ = probing("--json")
    assert (status, told) == (0, [])
    assert [json.loads(line)["format"] for line in output.splitlines()] == ["bf16", "int8", "fp8"]


@pytest.mark.parametrize(("interrupted", "finished"), [(3, ["bf16", "int8"]), (1, [])])
def test_of_an_interrupted_probe_what_is_finished_is_kept_and_summed_up(probing, interrupted, finished, tmp_path):
    (tmp_path / "probe").mkdir()
    status, output, told, written = probing(interrupted=interrupted)
    assert (status, told) == (130, [f"dcjax: interrupted; formats finished: {len(finished)} of 3"])
    assert written == [f"probe-{name}.{kind}" for name in finished for kind in ("json", "png")]
    for name in finished:
        assert json.loads((tmp_path / "probe" / f"probe-{name}.json").read_text())["format"] == name
    summary = to_summary([dataclasses.replace(RESULT, format=name) for name in finished])
    assert output.endswith(f"\n{summary}\n") if finished else output == ""


@pytest.fixture
def refusal(capfd):
    """Runs a probe that must be refused: status 2 and one line on stderr, which is returned."""

    def run(*arguments):
        capfd.readouterr()
        status = main(["probe", *map(str, arguments)])
        output, errors = capfd.readouterr()
        assert (status, output) == (2, "")
        (told,) = complaints(errors)
        assert told.startswith("dcjax: error: "), errors
        return told

    return run


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--formats", "bf16,int3"], "serving.format is 'int3'; it must be one of float32"),
        (["--slots", "0"], "serving.slots is 0; it must be at least 1"),
        (["--kv-cache", "int3"], "serving.kv_cache is 'int3'; it must be one of auto"),
        (["--prompts", "0"], "prompts is 0; it must be at least 1"),
        (["--max-response-length", "0"], "rollout.max_response_length is 0; it must be at least 1"),
        (["--seed", "-1"], "seed is -1; it must be at least 0"),
        (["--stale", "9"], "no checkpoint of step 9"),
        (["--prompts-file", "some.jsonl"], "prompts-file is some.jsonl"),
    ],
)
def test_a_wrong_option_is_quoted(finished_run, refusal, options, told):
    assert told in refusal(finished_run, *options)


def test_where_there_is_no_run_none_is_probed(refusal, tmp_path):
    assert f"no run in {tmp_path}" in refusal(tmp_path)


def test_a_folder_needs_prompts_and_has_no_steps(folder, refusal):
    assert "give some with --prompts-file" in refusal(folder)
    assert "stale is 3;" in refusal(folder, "--stale", "3", "--prompts-file", folder.parent / "prompts")
    (folder / "tokenizer.json").unlink()
    assert "tokenizer" in refusal(folder, "--prompts-file", folder.parent / "prompts")


def test_prompts_are_lines_or_objects(tmp_path):
    path = tmp_path / "prompts"
    path.write_text('{"prompt": "a\\nb"}\r\n  \nplain "text"\r\n')
    assert read_prompts(path) == ["a\nb", 'plain "text"']


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"fine\n{broken\n", r"line 2: '{broken' is not a JSON object"),
        (b'{"text": 1}', "line 1"),
        (b'{"prompt": ' + b"[" * 100_000, "line 1"),
        (b'{"prompt": 1}', "line 1"),
        (b"\n \n", "has no prompt"),
        (b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_a_file_of_prompts_that_is_none_is_refused_by_its_line(tmp_path, data, told):
    (tmp_path / "prompts").write_bytes(data)
    with pytest.raises(RunError, match=told):
        read_prompts(tmp_path / "prompts")
