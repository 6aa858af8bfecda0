"""An engine that loops over its layers is one that does not."""

import functools

import jax
import numpy as np
import pytest
import tiny

from dcjax.serving import Qwen3Engine, engine, rollout
from dcjax.serving.rollout import sample_responses
from dcjax.serving.scoring import score_responses

pytestmark = pytest.mark.heavy

PROMPTS = [[1, 2, 4], [5], [6, 7, 8, 9, 10, 1]]
KEY = jax.random.key(3)


@functools.cache
def served(deep):
    """An engine, what it samples, and what it says of that: in several passes of the prefill, calls and refills."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "DEEP", tiny.DENSE.num_layers + (0 if deep else 1))
        patch.setattr(rollout, "REFILLS_PER_CALL", 2)
        sizes = tiny.SIZES | {"prefill_tokens": 2 * tiny.PROMPT_LENGTH}
        made = Qwen3Engine(tiny.DENSE, format="w8a8", end_tokens=[3], **sizes)
        params = made.sync(tiny.masters(tiny.DENSE), 5)
        samples = sample_responses(made, params, PROMPTS, samples_per_prompt=4, temperature=1.0, key=KEY)
        return made, params, samples


def test_it_samples_the_same_tokens_with_the_same_log_probs():
    (looped, stacked, ours), (unrolled, separate, theirs) = served(True), served(False)
    assert looped.decoder.loops and not unrolled.decoder.loops
    assert stacked.weights["layers"]["q_proj"].values.shape[0] == len(separate.weights["layers"])
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_allclose(ours.rollout_logps, theirs.rollout_logps, atol=1e-5)
    assert len({len(np.unique(row)) for row in ours.tokens}) > 1


def test_it_scores_the_same_with_the_same_residual_stream():
    (looped, stacked, samples), (unrolled, separate, _) = served(True), served(False)
    ours = score_responses(looped, stacked, samples, key=KEY, keeps_residuals=True)
    theirs = score_responses(unrolled, separate, samples, key=KEY, keeps_residuals=True)
    np.testing.assert_allclose(ours.logps, theirs.logps, atol=1e-5)
    np.testing.assert_allclose(ours.residuals, theirs.residuals, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("changes", "format"),
    [({"num_layers": 7}, "w8a8"), ({}, "float32"), ({}, "int8"), ({"num_experts": 4}, "w8a8")],
)
def test_what_is_faster_unrolled_is_unrolled(changes, format):
    experts = {"num_experts_per_tok": 2, "moe_intermediate_size": 32} if "num_experts" in changes else {}
    config = tiny.replace(tiny.DENSE, **{"num_layers": 8} | changes | experts)
    assert not Qwen3Engine(config, format=format, end_tokens=[3], **tiny.SIZES).decoder.loops
    assert Qwen3Engine(
        tiny.replace(tiny.DENSE, num_layers=8), format="w8a8", end_tokens=[3], **tiny.SIZES
    ).decoder.loops
