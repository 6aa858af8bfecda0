"""The engine's thread: when samples begin, in which order, and what is left of those that are given up."""

import contextlib
import threading

import pytest
from listening import small_policy
from served import PROMPTS, SLOTS

from dcjax.serving.continuous import Continuous, rehearse
from dcjax.serving.server.http.engine_thread import EngineThread, Sample
from dcjax.serving.server.weights import Weights

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def served():
    return small_policy(rehearse)


@pytest.fixture
def turns(monkeypatch):
    """Turns that wait to be let through, and the number that have been; each is one of the thread."""
    let, waiting, turn = threading.Semaphore(0), threading.Semaphore(0), Continuous.turn

    def gated(*given, **asked):
        waiting.release()
        assert let.acquire(timeout=30)
        return turn(*given, **asked)

    monkeypatch.setattr(Continuous, "turn", gated)
    return let, waiting


class Told:
    """What is told of samples, by their names, in order."""

    def __init__(self, engine):
        self._engine = engine
        self.names, self._new = [], threading.Condition()

    def sample(self, name, limit=20):
        def told(piece):
            with self._new:
                self.names.append((name, piece.finish_reason))
                self._new.notify_all()

        request = self._engine.make_requests([[0, 1]], limits=limit, stop_tokens=[0])
        return Sample(prompt=tuple(PROMPTS[0]), request=request, told=told)

    def wait(self, count):
        with self._new:
            assert self._new.wait_for(lambda: len(self.names) >= count, 30)
            return self.names[:count]


@contextlib.contextmanager
def thread_of(served, let, waiting=100):
    """A thread whose turns are let through, those that are left too once the test is over."""
    failures, weights = [], Weights(served.version, served.params)
    with EngineThread(served.engine, weights, waiting=waiting, on_failure=failures.append) as thread:
        yield thread
        let.release(1000)
    assert not failures


def test_a_sample_that_comes_within_a_turn_is_told_of_behind_the_next(served, turns):
    let, waiting = turns
    told = Told(served.engine)
    with thread_of(served, let) as thread:
        assert thread.submit([told.sample("first")])
        assert waiting.acquire(timeout=30)
        thread.submit([told.sample("second")])
        let.release()
        assert [name for name, _ in told.wait(1)] == ["first"]
        assert waiting.acquire(timeout=30)
        let.release()
        assert sorted(name for name, _ in told.wait(3)[1:]) == ["first", "second"]


def test_those_that_wait_begin_in_their_order_one_turn_behind_a_free_slot(served, turns):
    let, waiting = turns
    told = Told(served.engine)
    with thread_of(served, let) as thread:
        # all slots for one turn
        thread.submit([told.sample(f"short {n}", limit=1) for n in range(SLOTS)])
        thread.submit([told.sample(f"later {n}", limit=1) for n in range(2 * SLOTS)])
        for turn in range(3):
            assert waiting.acquire(timeout=30)
            let.release()
            told.wait((turn + 1) * SLOTS)
    expected = [f"short {n}" for n in range(SLOTS)] + [f"later {n}" for n in range(2 * SLOTS)]
    for turn in range(3):
        part = slice(turn * SLOTS, (turn + 1) * SLOTS)
        assert sorted(name for name, _ in told.names[part]) == sorted(expected[part])
    assert {reason for _, reason in told.names} == {"length"}


def test_who_is_given_up_while_waiting_or_decoded_is_told_nothing_more_and_makes_room(served, turns):
    let, waiting = turns
    told = Told(served.engine)
    with thread_of(served, let, waiting=1) as thread:
        running = [told.sample(f"running {n}") for n in range(SLOTS)]
        late = told.sample("late")
        assert thread.submit([*running, late]) and thread.running == SLOTS + 1
        assert not thread.submit([told.sample("too much")])
        assert waiting.acquire(timeout=30)
        thread.cancel([late, *running[1:]])
        assert thread.running == SLOTS
        let.release()
        assert waiting.acquire(timeout=30)
        # decoded to the end of the turn, and let go of before the next
        assert thread.running == 1 and told.names == [("running 0", None)]
        assert thread.submit([told.sample("after")])
        let.release()
        told.wait(2)
        assert waiting.acquire(timeout=30)
        let.release()
        assert "after" in [name for name, _ in told.wait(4)]


def test_what_ends_the_thread_is_told_to_all_and_to_the_server(served, monkeypatch):
    monkeypatch.setattr(Continuous, "turn", lambda *given, **asked: 1 / 0)
    heard, failures = [], []
    sample = Told(served.engine).sample("any")
    sample.told = heard.append
    done = threading.Event()

    def fail(error):
        failures.append(error)
        done.set()

    weights = Weights(served.version, served.params)
    with EngineThread(served.engine, weights, waiting=1, on_failure=fail) as thread:
        thread.submit([sample])
        assert done.wait(30)
        with pytest.raises(RuntimeError, match="has ended"):
            thread.submit([sample])
    assert isinstance(failures[0], ZeroDivisionError) and heard == failures
