"""Spans of what a process does, which are timed and shown in a trace while a run is profiled, and else cost nothing."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Self

import jax

COMPILE, OTHER = "compile", "other"
"""The parts of tracing, lowering and compiling, or of reading a program from the cache; and of what is in no span."""

_COMPILE_EVENTS = "/jax/core/compile/"
"""JAX's events for these begin so: each is a scalar at its start, and a duration at its end, in one thread."""

_UNTIMED = contextlib.nullcontext(lambda tree: tree)

_recorder: Recorder | None = None


def span(part: str) -> AbstractContextManager[Callable[[Any], Any]]:
    """A context of one part of an iteration's work: timed in a `Recorder`'s context, and else nothing.

    Its value is a function that returns the tree of arrays that it is given: in a `Recorder`'s context once they are
    computed, so that a program is not timed where its result is first needed, and else at once.
    """
    return _UNTIMED if _recorder is None else _recorder.span(part)


class Lap(NamedTuple):
    """Seconds by part, since the lap before."""

    # of the recorder's own thread, which add up to the time that has passed
    parts: dict[str, float]
    # of all other threads, meanwhile
    beside: dict[str, float]


class Recorder:
    """Times the spans of all threads while it is entered, and shows them in JAX's trace; of one there is at most one.

    Every moment of a thread counts for one part: for `COMPILE` while JAX compiles, else for the outermost span, so that
    an evaluation's decoding is evaluation. What the recorder's own thread does in no span counts for `OTHER`.
    """

    def __init__(self):
        self._owner, self._lock = threading.get_ident(), threading.Lock()
        self._clocks: dict[int, _Clock] = {self._owner: _Clock()}

    def __enter__(self) -> Self:
        global _recorder
        jax.monitoring.register_scalar_listener(self._compiles)
        jax.monitoring.register_event_duration_secs_listener(self._compiled)
        _recorder = self
        return self

    def __exit__(self, *error: object) -> None:
        global _recorder
        _recorder = None
        jax.monitoring.unregister_scalar_listener(self._compiles)
        jax.monitoring.unregister_event_duration_listener(self._compiled)

    @contextlib.contextmanager
    def span(self, part: str) -> Iterator[Callable[[Any], Any]]:
        """As the function of this name."""
        self._begin(part)
        try:
            with jax.profiler.TraceAnnotation(part):
                yield jax.block_until_ready
        finally:
            self._end(part)

    def lap(self) -> Lap:
        """What has passed since the last lap, or since the recorder was made; a span under way counts so far."""
        with self._lock:
            taken = {thread: clock.take() for thread, clock in self._clocks.items()}
        parts, beside = taken.pop(self._owner), defaultdict(float)
        for others in taken.values():
            for part, seconds in others.items():
                if part != OTHER:
                    beside[part] += seconds
        return Lap(parts, dict(beside))

    def _begin(self, part: str) -> None:
        with self._lock:
            self._clocks.setdefault(threading.get_ident(), _Clock()).begin(part)

    def _end(self, part: str) -> None:
        with self._lock:
            self._clocks.setdefault(threading.get_ident(), _Clock()).end(part)

    def _compiles(self, event: str, value: float, **details: Any) -> None:
        if event.startswith(_COMPILE_EVENTS):
            self._begin(COMPILE)

    def _compiled(self, event: str, duration_secs: float, **details: Any) -> None:
        if event.startswith(_COMPILE_EVENTS):
            self._end(COMPILE)


class _Clock:
    """The parts of one thread."""

    def __init__(self):
        self._open: list[str] = []
        self._seconds: dict[str, float] = defaultdict(float)
        self._since = time.perf_counter()

    def begin(self, part: str) -> None:
        self._count()
        self._open.append(part)

    def end(self, part: str) -> None:
        """Ends the innermost span; nothing if it is another one, as where it began before there was a recorder."""
        self._count()
        if self._open[-1:] == [part]:
            self._open.pop()

    def take(self) -> dict[str, float]:
        """The seconds of each part until now, which are forgotten."""
        self._count()
        taken, self._seconds = self._seconds, defaultdict(float)
        return dict(taken)

    def _count(self) -> None:
        now = time.perf_counter()
        part = COMPILE if COMPILE in self._open else next(iter(self._open), OTHER)
        self._seconds[part] += now - self._since
        self._since = now
