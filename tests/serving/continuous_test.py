"""Continuous batching: samples that come, go and are told about differently are those of a rollout all the same."""

import jax
import numpy as np
import pytest
from served import PROMPTS, SLOTS, STEPS, TEMPERATURE, G, T, engine_of, params_of, rollout_of

from dcjax.serving.continuous import Continuous
from dcjax.serving.rollout import sample_keys

pytestmark = pytest.mark.heavy

TOTAL = len(PROMPTS) * G


class Decoded:
    """The samples of `rollout_of`, by one engine."""

    def __init__(self, engine, config=None):
        self.engine = engine
        self.params = params_of(engine) if config is None else params_of(engine, config)
        self.batching = Continuous(engine)
        self.keys = sample_keys(jax.random.key(1), np.arange(TOTAL))
        self.tokens = {sample: [] for sample in range(TOTAL)}
        self.logps = {sample: [] for sample in range(TOTAL)}
        self.turns = {sample: [] for sample in range(TOTAL)}
        # samples by their numbers
        self.decoded = {}

    def begin(self, sample):
        request = self.engine.make_requests(self.keys[sample][None], temperatures=TEMPERATURE)
        self.decoded[self.batching.begin(self.params, PROMPTS[sample // G], request)] = sample

    def turn(self, **asked):
        free = self.batching.free
        for number, turn in self.batching.turn(self.params, **asked).items():
            sample = self.decoded[number]
            self.tokens[sample] += turn.tokens.tolist()
            self.logps[sample] += turn.logps.tolist()
            self.turns[sample].append(turn)
        return self.batching.free - free

    def check(self, rollout, samples):
        for sample in samples:
            mask = rollout.response_mask[sample]
            assert self.tokens[sample] == rollout.tokens[sample, -T:][mask].tolist()
            np.testing.assert_allclose(self.logps[sample], rollout.rollout_logps[sample][mask], atol=1e-5)


@pytest.mark.parametrize("format", ["float32", pytest.param("int8", marks=pytest.mark.slow)])
def test_samples_that_come_at_any_time_are_those_of_a_rollout_whatever_is_told(format):
    decoded, generator = Decoded(engine_of(format)), np.random.default_rng(0)
    coming = generator.permutation(TOTAL).tolist()
    while coming or decoded.batching.free < SLOTS:
        for _ in range(min(int(generator.integers(0, 4)), decoded.batching.free, len(coming))):
            decoded.begin(coming.pop())
        decoded.turn(wants_top=bool(generator.integers(0, 2)))
    if format == "float32":  # in others a prompt that is prefilled alone is rounded otherwise than in a batch
        decoded.check(rollout_of(format), range(TOTAL))
    again = Decoded(engine_of(format))
    for sample in range(TOTAL):
        again.begin(sample)
        while again.batching.free < SLOTS:
            again.turn()
    assert again.tokens == decoded.tokens
    # to the bit
    assert again.logps == decoded.logps


def test_who_is_cancelled_leaves_its_slot_to_the_next_turn_and_nothing_of_itself():
    decoded = Decoded(engine_of("float32"))
    for sample in range(SLOTS):
        decoded.begin(sample)
    decoded.turn()
    assert decoded.batching.free < SLOTS
    running = list(decoded.decoded.items())[: SLOTS - decoded.batching.free]
    for number, _ in running:
        decoded.batching.cancel(number)
    assert decoded.batching.free == SLOTS
    others = range(TOTAL - SLOTS, TOTAL)
    for sample in others:
        decoded.begin(sample)
    # one that is given up before its first turn
    late = next(number for number, sample in decoded.decoded.items() if sample == TOTAL - 1)
    decoded.batching.cancel(late)
    while decoded.batching.free < SLOTS:
        decoded.turn()
    decoded.check(rollout_of("float32"), others[:-1])
    assert decoded.tokens[TOTAL - 1] == []


def test_more_prompts_than_are_kept_take_the_rows_of_those_used_longest_ago():
    engine, params = engine_of("float32"), params_of(engine_of("float32"))
    batching, calls = Continuous(engine), []
    prefill = engine.prefill_many

    class Counting:
        def __getattr__(self, name):
            return getattr(engine, name)

        def prefill_many(self, params, prompts, width):
            calls.append(tuple(prompts[0]))
            return prefill(params, prompts, width)

    batching._prompts._engine = Counting()
    request = engine.make_requests([[0, 0]], limits=1)

    def ask(prompt):
        number = batching.begin(params, [prompt], request)
        return batching.turn(params)[number].tokens.tolist()

    first = [ask(prompt) for prompt in range(SLOTS)]
    assert [ask(prompt) for prompt in range(SLOTS)] == first and len(calls) == SLOTS
    ask(SLOTS)  # takes the row of the first
    assert ask(1) == first[1] and len(calls) == SLOTS + 1
    assert ask(0) == first[0] and len(calls) == SLOTS + 2
    with pytest.raises(IndexError):
        for _ in range(SLOTS + 1):
            batching.begin(params, [1], request)


def test_a_turn_has_as_many_tokens_as_are_asked_for_and_its_weights_version():
    decoded = Decoded(engine_of("float32"))
    decoded.begin(0)
    decoded.turn()
    (turn,) = decoded.turns[0]
    assert turn.version == 7 and len(turn.tokens) == len(turn.logps) <= STEPS
