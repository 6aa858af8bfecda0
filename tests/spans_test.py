"""What time a recorder gives to which part: by a clock of the test's own, and by the real one."""

import threading
import time

import jax
import numpy as np
import pytest

from dcjax import spans
from dcjax.spans import COMPILE, OTHER, Recorder, span

TRACE, BACKEND = "/jax/core/compile/jaxpr_trace_duration", "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def clock(monkeypatch):
    """Moves the time by seconds."""
    now = [100.0]

    def move(seconds):
        now[0] += seconds

    monkeypatch.setattr(spans.time, "perf_counter", lambda: now[0])
    return move


def compile_for(clock, seconds, event=BACKEND):
    """What JAX tells of a program."""
    jax.monitoring.record_scalar(event, 0.0, fun_name="jit(step)")
    clock(seconds)
    jax.monitoring.record_event_duration_secs(event, seconds, fun_name="jit(step)")


def test_without_a_recorder_a_span_is_always_the_same_nothing():
    assert span("update") is span("sync")
    with span("update") as ready, span("sync"):
        assert ready(given := object()) is given


def test_the_outermost_span_counts_and_what_is_in_none_is_other(clock):
    with Recorder() as recorder:
        clock(1)
        with span("evaluation"):
            clock(2)
            with span("decode"):
                clock(4)
            clock(8)
        with span("decode"):
            clock(16)
        clock(32)
        assert recorder.lap() == ({OTHER: 33, "evaluation": 14, "decode": 16}, {})
        clock(64)
        assert recorder.lap() == ({OTHER: 64}, {})


def test_compiling_counts_as_compiling_wherever_it_is_done(clock):
    with Recorder() as recorder:
        with span("evaluation"), span("decode"):
            clock(1)
            compile_for(clock, 2, TRACE)
            compile_for(clock, 4)
        compile_for(clock, 8)
        jax.monitoring.record_event_duration_secs("/jax/other", 1.0, fun_name="jit(step)")
        assert recorder.lap() == ({OTHER: 0, "evaluation": 1, COMPILE: 14}, {})
    compile_for(clock, 16)
    assert recorder.lap() == ({OTHER: 16}, {})


def test_what_ends_that_began_before_the_recorder_is_no_end(clock):
    with Recorder() as recorder, span("update"):
        clock(1)
        jax.monitoring.record_event_duration_secs(BACKEND, 9.0, fun_name="jit(step)")
        clock(2)
        assert recorder.lap().parts == {OTHER: 0, "update": 3}


def test_a_span_that_raises_is_over(clock):
    with Recorder() as recorder:
        with pytest.raises(KeyError), span("rewards"):
            clock(1)
            raise KeyError
        clock(2)
        assert recorder.lap().parts == {OTHER: 2, "rewards": 1}


def test_other_threads_are_beside_and_a_span_under_way_counts_so_far(clock):
    begun, over = threading.Event(), threading.Event()

    def work():
        with span("decode"):
            begun.set()
            over.wait(10)

    with Recorder() as recorder:
        thread = threading.Thread(target=work)
        thread.start()
        begun.wait(10)
        with span("update"):
            clock(1)
        assert recorder.lap() == ({OTHER: 0, "update": 1}, {"decode": 1})
        clock(2)
        over.set()
        thread.join()
        clock(4)
        assert recorder.lap() == ({OTHER: 6}, {"decode": 2})


@pytest.mark.heavy
def test_jaxs_own_tracing_is_compiling_and_a_result_is_waited_for_in_its_span():
    def slow(value):
        time.sleep(0.1)
        return np.asarray(value)

    @jax.jit
    def step(x):
        # while it is traced
        time.sleep(0.2)
        return jax.pure_callback(slow, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    with Recorder() as recorder:
        with span("update"):
            jax.block_until_ready(step(np.ones(3, np.float32)))
        first = recorder.lap().parts
        with span("update") as ready:
            ready(step(np.ones(3, np.float32)))
        second = recorder.lap().parts
    assert first[COMPILE] > 0.2 and first["update"] > 0.1
    assert COMPILE not in second and second["update"] > 0.1
