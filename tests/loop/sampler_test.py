"""Which weights sample for which iteration, when, and what of it a run depends on."""

import dataclasses
import threading
import time

import pytest

from dcjax.loop.checkpoint import Cursor
from dcjax.loop.sampler import Asynchronous, InTurns
from dcjax.spans import Recorder, span

pytestmark = pytest.mark.heavy

STEPS = 6


@dataclasses.dataclass
class State:
    """The parameters of version n are n."""

    params: int = 0
    history: tuple = ()

    def moved_on(self):
        return State(self.params + 1, (*self.history, self.params)[1:] if self.history else ())


def sample(serving, loop):
    """What was sampled with, and for which; a batch takes as many prompts as its number says."""
    following = dataclasses.replace(loop, step=loop.step + 1, data_cursor=loop.data_cursor + loop.step)
    return (serving, loop.step, loop.data_cursor), following


def sync(params, version):
    return params, version


def sampler_of(sample, ahead, *, steps=STEPS, in_thread=True):
    return Asynchronous(sample, sync, level=ahead, steps=steps, in_thread=in_thread) if ahead else InTurns(sample, sync)


def run(ahead, state=None, loop=None, steps=STEPS, sample=sample, in_thread=True):
    """All samples, and state and loop behind each iteration."""
    state = State(history=(0,) * ahead) if state is None else state
    loop = Cursor(step=0, data_cursor=0, rollout_key=[0, 0]) if loop is None else loop
    told = []
    with sampler_of(sample, ahead, steps=steps, in_thread=in_thread) as sampler:
        while loop.step < steps:
            sampled, loop = sampler(state, loop)
            state = state.moved_on()
            told.append((sampled, state, loop))
    return told


@pytest.mark.parametrize("in_thread", [False, True])
@pytest.mark.parametrize("ahead", [0, 1, 2, 4])
def test_iteration_t_is_sampled_with_weights_that_are_k_updates_old(ahead, in_thread):
    cursors = [0, 0, 1, 3, 6, 10]
    drawn = [sampled for sampled, *_ in run(ahead, in_thread=in_thread)]
    assert drawn == [((max(t - ahead, 0),) * 2, t, cursors[t]) for t in range(STEPS)]


def test_weights_that_lag_on_purpose_are_the_oldest_that_are_kept():
    drawn = [sampled for sampled, *_ in run(0, State(history=(0, 0)))]
    assert [serving for serving, *_ in drawn] == [(max(t - 2, 0),) * 2 for t in range(STEPS)]


@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.parametrize("at", [1, 2, 5])
def test_a_run_that_is_resumed_samples_what_it_would_have(ahead, at):
    told = run(ahead)
    _, state, loop = told[at - 1]
    assert run(ahead, state, loop) == told[at:]


@pytest.mark.parametrize("ahead", [0, 2])
def test_nothing_is_sampled_for_iterations_that_the_run_does_not_have(ahead):
    drawn = []

    def counted(serving, loop):
        drawn.append(loop.step)
        return sample(serving, loop)

    run(ahead, sample=counted)
    assert drawn == list(range(STEPS))


def test_samples_are_drawn_while_the_trainer_is_at_work_and_no_more_than_k_iterations_ahead():
    reached = [threading.Event() for _ in range(STEPS)]

    def watched(serving, loop):
        reached[loop.step].set()
        return sample(serving, loop)

    state = State(history=(0, 0))
    with sampler_of(watched, 2) as sampler:
        _, loop = sampler(state, Cursor(step=0, data_cursor=0, rollout_key=[0, 0]))
        # meanwhile
        assert reached[2].wait(10)
        assert not reached[3].wait(0.2)
        sampler(state.moved_on(), loop)
        assert reached[3].wait(10)


@pytest.mark.parametrize(("ahead", "in_thread"), [(0, False), (2, False), (2, True)])
def test_what_sampling_raises_reaches_the_trainer_and_ends_it(ahead, in_thread):
    def failing(serving, loop):
        if loop.step == 1:
            raise ValueError("no prompts are left")
        return sample(serving, loop)

    with pytest.raises(ValueError, match="no prompts are left"):
        run(ahead, sample=failing, in_thread=in_thread)


@pytest.mark.parametrize("in_thread", [False, True])
def test_the_engines_are_used_in_the_order_in_which_they_are_asked_for(in_thread):
    """On every host the same, whoever is faster."""
    used = []

    def slow(serving, loop):
        time.sleep(0.05)
        used.append(f"samples for {loop.step}")
        return sample(serving, loop)

    state, loop = State(history=(0, 0)), Cursor(step=0, data_cursor=0, rollout_key=[0, 0])
    with sampler_of(slow, 2, in_thread=in_thread) as sampler:
        sampler.settle()
        used.append("evaluation")
        _, loop = sampler(state, loop)
        sampler.settle()
        used.append("evaluation")
        sampler(state.moved_on(), loop)
    first = ["evaluation", "samples for 0", "samples for 1", "samples for 2", "evaluation"]
    # what nobody takes is not drawn at the end
    assert used[:5] == first and used[5:] in ([], ["samples for 3"])


@pytest.mark.parametrize("in_thread", [False, True])
def test_where_a_thread_samples_its_time_is_beside_the_trainers(in_thread):
    def slow(serving, loop):
        with span("decode"):
            time.sleep(0.02)
        return sample(serving, loop)

    with Recorder() as recorder:
        run(1, sample=slow, in_thread=in_thread)
        parts, beside = recorder.lap()
    if in_thread:
        assert beside["decode"] > 0.02 * STEPS and "decode" not in parts
        assert beside["decode"] - 0.02 < parts["wait"] + parts["sync"] + parts["other"]
    else:
        assert parts["decode"] > 0.02 * STEPS and beside == {}
