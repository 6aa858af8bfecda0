"""Masks, ids and lengths as people have them: every dtype of 0 and 1, of NumPy and of JAX."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from compiling import jit
from served import DENSE, EXPERTS, engine_of, params_of, rollout_of

from dcjax.arguments import as_integers, as_mask
from dcjax.models import forward, token_logps
from dcjax.models.transformer import checked_inputs
from dcjax.reporting import statistics
from dcjax.rl import corrections, discrepancy, losses, masked, metrics, penalties, verl
from dcjax.rl.transforms import Terms
from dcjax.serving.engine import Qwen3Engine
from dcjax.serving.scoring import score_responses
from dcjax.tools.probe import gaps

MASK = np.array([[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
DTYPES = (np.int8, np.uint8, np.int32, np.int64, np.float16, np.float32, np.float64)


def ways_of(mask):
    """The same mask in other dtypes, on the host and on a device."""
    for dtype in DTYPES:
        yield mask.astype(dtype)
        yield jnp.asarray(mask.astype(dtype))
    yield mask.tolist()
    yield jnp.asarray(mask, jnp.bfloat16)


def test_a_mask_is_what_it_says_in_every_dtype():
    assert as_mask("mask", MASK) is MASK
    for mask in ways_of(MASK):
        np.testing.assert_array_equal(taken := as_mask("mask", mask), MASK)
        assert taken.dtype == bool
        np.testing.assert_array_equal(jax.jit(lambda x: as_mask("mask", x))(jnp.asarray(mask)), MASK)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ([[0, 2]], "holds 2"),
        ([[0.0, 0.5]], "holds 0.5"),
        ([[0.0, np.nan]], "holds nan"),
        ([[0.0, -np.inf]], "holds -inf"),  # what is added to scores elsewhere
        ([["a", "b"]], "holds a"),
    ],
)
def test_what_is_no_mask_is_refused_with_the_value(other, said):
    with pytest.raises(ValueError, match=f"attention_mask {said}; a mask holds False and True, or 0 and 1"):
        as_mask("attention_mask", np.array(other))


@pytest.mark.parametrize("ids", [np.array([1.0]), jnp.ones(2), np.array([True]), jnp.array([True]), ["one"]])
def test_ids_of_other_kinds_are_refused(ids):
    with pytest.raises(ValueError, match=r"tokens is of .*; it must be of whole numbers"):
        as_integers("tokens", ids)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.int64, np.uint32])
def test_ids_of_every_integer_dtype_are_taken(dtype):
    for ids in (np.array([0, 7], dtype), jnp.asarray(np.array([0, 7], dtype))):
        assert as_integers("tokens", ids, 0, 7) is ids
        with pytest.raises(ValueError, match="tokens holds 7; it must be from 0 to 6"):
            as_integers("tokens", ids, 0, 6)
        # of what is hidden nothing is asked
        as_integers("tokens", ids, 0, 6, where=np.array([True, False]))


RNG = np.random.default_rng(0)
LOGPS, OTHER = np.log(RNG.uniform(0.1, 1, (2, *MASK.shape))).astype(np.float32)
RESIDUALS = RNG.normal(size=(*MASK.shape, 2, 5)).astype(np.float32)
CORRECTION = verl.Correction(
    rollout_is="sequence", rollout_rs="seq_sum_k1", rollout_rs_threshold="0.5_2.0", rollout_token_veto_threshold=0.2
)
GIVEN = {
    **dict.fromkeys(("logps", "old_logps", "losses", "x", "penalty"), LOGPS),
    **dict.fromkeys(("rollout_logps", "reference_logps", "advantages", "weights"), OTHER),
    "discrepancy": np.exp(LOGPS),
    "budget": 0.3,
    "level": "token",
    "kind": "k3",
    "clip_max": 1.5,
    "low": 0.5,
    "high": 2.0,
    "eps_low": 0.2,
    "eps_high": 0.2,
    "threshold": 0.4,
    "bounds": CORRECTION.bounds,
    "correction": CORRECTION,
    "difference": np.exp(OTHER),
    "of": np.exp(LOGPS),
    "edges": [0, 0.5, 1],
    "residuals": RESIDUALS,
    "reference": RESIDUALS + 1,
    "trained": LOGPS,
    "policies": [("int8", "weights", OTHER)],
    "terms": Terms(OTHER, np.exp(OTHER), MASK, np.zeros_like(OTHER), {}),
    "name": "method",
    "kept": OTHER > LOGPS,
    "references": {"engine": OTHER},
}


def functions_of_masks():
    found = []
    for module in (corrections, discrepancy, losses, masked, metrics, penalties, verl, gaps):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            own = function.__module__ == module.__name__ and not name.startswith("_")
            if own and "mask" in inspect.signature(function).parameters:
                found.append(pytest.param(function, id=f"{module.__name__.split('.')[-1]}.{name}"))
    return found


@pytest.mark.parametrize("function", functions_of_masks())
def test_a_function_gives_the_same_for_masks_of_numbers(function):
    needs = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD and name != "mask"
    ]
    given = {name: GIVEN[name] for name in needs}
    expected = function(**given, mask=MASK)
    for mask in (MASK.astype(np.int32), jnp.asarray(MASK, jnp.float32)):
        jax.tree.map(np.testing.assert_array_equal, function(**given, mask=mask), expected)


def test_functions_that_are_made_take_masks_of_numbers_too():
    made = {
        "aggregation": lambda mask: masked.seq_mean_token_sum_norm(7)(LOGPS, mask),
        "verl's": lambda mask: verl.seq_mean_token_sum_norm(7)(LOGPS, mask),
        "δ": lambda mask: discrepancy.measure(discrepancy.probability_difference, level="sequence", sides="one")(
            old_logps=LOGPS, rollout_logps=OTHER, mask=mask
        ),
    }
    for function in made.values():
        jax.tree.map(np.testing.assert_array_equal, function(MASK.astype(np.int64)), function(MASK))


SEQUENCES = np.array([[3, 5, 7, 2, 0, 0], [4, 6, 1, 9, 8, 2]])
REAL = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], bool)
logits = jit(forward, static_argnums=0)


@pytest.mark.parametrize("config", [DENSE, EXPERTS])
def test_logits_are_the_same_for_masks_as_tokenizers_give_them(config):
    """Padded on the right with int32, wrong logits and NaN once."""
    params = tiny.masters(config)
    expected = np.asarray(logits(config, params, SEQUENCES, REAL))
    alone = np.asarray(logits(config, params, SEQUENCES[:1, :4]))
    np.testing.assert_allclose(expected[0, :4], alone[0], atol=1e-5)
    for mask in (REAL.astype(np.int32), REAL.astype(np.int64), jnp.asarray(REAL, jnp.float32)):
        np.testing.assert_array_equal(logits(config, params, SEQUENCES.astype(np.int64), mask), expected)


def test_ids_that_the_vocabulary_has_not_are_refused_where_they_can_be_seen():
    params, beyond = tiny.masters(DENSE), np.where(REAL, SEQUENCES, -100)
    scored = {"response_length": 2, "temperature": np.ones(2, np.float32)}
    with pytest.raises(ValueError, match="tokens holds -100; it must be from 0 to 19"):
        forward(DENSE, params, beyond)
    with pytest.raises(ValueError, match="tokens holds 20; it must be from 0 to 19"):
        token_logps(DENSE, params, np.full((2, 6), 20), **scored)
    with pytest.raises(ValueError, match="attention_mask holds -inf"):
        forward(DENSE, params, SEQUENCES, np.where(REAL, 0, -np.inf))
    unchecked = inspect.unwrap(checked_inputs)  # by the types that tests check
    with pytest.raises(ValueError, match="tokens is of float64"):
        unchecked(DENSE, SEQUENCES.astype(np.float64), None, None)
    with pytest.raises(ValueError, match="segment_ids is of bool"):
        unchecked(DENSE, SEQUENCES, None, REAL)
    # behind a mask may stand what Hugging Face's collators write
    jax.eval_shape(lambda: forward(DENSE, params, beyond, REAL))


def test_a_rollout_with_masks_of_numbers_is_scored_as_itself():
    engine, rollout = engine_of(), rollout_of()
    numbers = dataclasses.replace(
        rollout,
        tokens=rollout.tokens.astype(np.int64),
        attention_mask=rollout.attention_mask.astype(np.int64),
        response_mask=rollout.response_mask.astype(np.float32),
    )
    same, expected = (
        score_responses(engine, params_of(engine), each, key=jax.random.key(1)).logps for each in (numbers, rollout)
    )
    np.testing.assert_array_equal(same, expected)


def test_an_engine_takes_whole_numbers_only():
    engine = engine_of()
    params, keys = params_of(engine), np.zeros((2, 2), np.uint32)
    padded, prefill, requests = map(
        inspect.unwrap, (Qwen3Engine.padded, Qwen3Engine.prefill, Qwen3Engine.make_requests)
    )
    with pytest.raises(ValueError, match="a prompt is of float64"):
        padded(engine, [[1.0, 2.5]])
    with pytest.raises(ValueError, match="true_length is of float64"):
        prefill(engine, params=params, padded_tokens=np.array([1, 2, 0]), true_length=2.0)
    with pytest.raises(ValueError, match="limit of a response is of float64"):
        requests(engine, keys, limits=3.5)
    with pytest.raises(ValueError, match="top_k is of bool"):
        requests(engine, keys, top_ks=True)
    with pytest.raises(ValueError, match="stop_tokens is of float64"):
        requests(engine, keys, stop_tokens=[1.5])


def test_what_is_right_is_counted_in_every_dtype():
    expected = statistics.pass_at_k(MASK, 2)
    for correct in (MASK.astype(int), MASK.astype(float)):
        np.testing.assert_array_equal(statistics.pass_at_k(correct, 2), expected)
    with pytest.raises(ValueError, match=r"correct holds 0\.5"):
        statistics.pass_at_k(MASK * 0.5, 2)
