"""The scheduler: samples that come one by one are those of a rollout, whoever is beside them."""

import jax
import numpy as np
import pytest
from served import PROMPTS, TEMPERATURE, G, engine_of, params_of, rollout_of

from dcjax.serving.rollout import sample_keys
from dcjax.serving.scheduler import Scheduler

pytestmark = pytest.mark.heavy

TOTAL = len(PROMPTS) * G


def scheduler_of(engine):
    """One for the samples of `rollout_of`, none of which waits."""
    rows = np.repeat(np.arange(len(PROMPTS), dtype=np.int32), G)
    prefix = engine.prefill_many(params_of(engine), PROMPTS)
    requests = engine.make_requests(sample_keys(jax.random.key(1), np.arange(TOTAL)), temperatures=TEMPERATURE)
    return Scheduler(engine, prefix, rows, requests)


def test_samples_that_come_at_any_time_in_any_order_are_those_of_a_rollout():
    engine = engine_of("float32")
    scheduler, generator = scheduler_of(engine), np.random.default_rng(0)
    coming, ended = generator.permutation(TOTAL).tolist(), []
    while len(ended) < TOTAL:
        now = int(generator.integers(0, 4))
        scheduler.wait(coming[:now])
        del coming[:now]
        ended += scheduler.advance(params_of(engine), 1).tolist()
    assert sorted(ended) == list(range(TOTAL))
    samples, expected = jax.device_get(scheduler.samples), rollout_of("float32")
    np.testing.assert_array_equal(samples.lengths, expected.response_mask.sum(axis=1))
    np.testing.assert_array_equal(samples.tokens, expected.tokens[:, -samples.tokens.shape[1] :])
    np.testing.assert_allclose(samples.logps, expected.rollout_logps, atol=1e-6)


def test_samples_begin_in_their_order_one_turn_behind_a_free_slot():
    engine = engine_of("float32")
    scheduler, params = scheduler_of(engine), params_of(engine)
    order = np.random.default_rng(1).permutation(TOTAL)
    scheduler.wait(order.tolist())
    begun, free = engine.slots, 0
    for _ in range(TOTAL):
        ended = scheduler.advance(params, 1)
        has_begun = jax.device_get(scheduler.samples.lengths)[order] > 0
        np.testing.assert_array_equal(np.flatnonzero(has_begun), np.arange(min(begun, TOTAL)))
        # those that ended leave their slots to as many in the next turn
        begun, free = begun + len(ended), free + len(ended)
    assert free == TOTAL


def test_nothing_is_decoded_where_nothing_waits():
    engine = engine_of("float32")
    scheduler, params = scheduler_of(engine), params_of(engine)
    assert not len(scheduler.advance(params, 5))
    scheduler.wait([3])
    ended = []
    for _ in range(20):
        ended += scheduler.advance(params, 1).tolist()
    assert ended == [3]
    assert np.flatnonzero(jax.device_get(scheduler.samples.lengths)).tolist() == [3]
