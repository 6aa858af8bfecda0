"""Two samplers with one face, `sampled, cursor = sampler(state, cursor)`: in turns with training, and asynchronous."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from dcjax.loop.checkpoint import Cursor
from dcjax.spans import span
from dcjax.types import Params, TrainState

Samples = TypeVar("Samples")
Drawing = Callable[[Any, Cursor], tuple[Samples, Cursor]]
"""(what serves, cursor) -> (samples for the iteration that the cursor stands before, the cursor behind it)."""
Sync = Callable[[Params, int], Any]
"""(float32 masters, version) -> what serves, serving params for example."""


class InTurns(Generic[Samples]):
    """Draws when asked, with the state's own weights, or with the oldest of its history where they lag on purpose."""

    def __init__(self, draw: Drawing[Samples], sync: Sync):
        self._draw, self._sync = draw, sync

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def __call__(self, state: TrainState, cursor: Cursor) -> tuple[Samples, Cursor]:
        """Samples for the iteration that `cursor` stands before, and the cursor behind it."""
        params = state.history[0] if state.history else state.params
        with span("sync") as ready:
            serving = ready(self._sync(params, max(cursor.step - len(state.history), 0)))
        return self._draw(serving, cursor)

    def settle(self) -> None:
        """The engines are free: nothing is ever under way."""


class Asynchronous(Generic[Samples]):
    """Draws up to k iterations ahead of the one that is trained on.

    Samples for iteration t come from the weights of version max(t − k, 0), whether they are waited for or not: the
    staleness is bounded, a run does not depend on who is faster, and one that is resumed goes on to the same bits, as
    the k versions before the newest are the state's history. The engines do what they are asked to in the order in
    which they were asked, so that their devices meet the same programs in the same order on every host.

    Args:
      draw: samples of one iteration.
      sync: makes what serves.
      level: k, at least 1.
      steps: iterations of the run; nothing is drawn for those behind it.
      in_thread: samples are drawn while the trainer is at work, rather than when they are asked for.
    """

    def __init__(self, draw: Drawing[Samples], sync: Sync, *, level: int, steps: int, in_thread: bool):
        self._draw, self._sync, self._level, self._steps = draw, sync, level, steps
        self._engines: Executor = ThreadPoolExecutor(1, "sampler") if in_thread else _AtOnce()
        self._under_way: deque[Future[tuple[Samples, Cursor]]] = deque()
        # of the next samples; only the engines' thread moves it once they are at work
        self._cursor: Cursor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._engines.shutdown(cancel_futures=True)

    def __call__(self, state: TrainState, cursor: Cursor) -> tuple[Samples, Cursor]:
        """Samples for the iteration that `cursor` stands before, and the cursor behind it; raises what `draw` did."""
        if not self._under_way:
            self._cursor = cursor
            for version, params in enumerate(state.history, cursor.step - self._level):
                self._begin(params, version)
        self._begin(state.params, cursor.step)
        under_way = self._under_way.popleft()
        with span("wait"):
            return under_way.result()

    def settle(self) -> None:
        """Waits until all that was asked for is drawn, and the engines are free."""
        with span("wait"):
            wait(self._under_way)

    def _begin(self, params: Params, version: int) -> None:
        """Begins to draw for the iteration that is k behind the version, unless the run ends before."""
        if version + self._level < self._steps:
            with span("sync") as ready:
                serving = ready(self._sync(params, max(version, 0)))
            self._under_way.append(self._engines.submit(self._next, serving))

    def _next(self, serving: Any) -> tuple[Samples, Cursor]:
        assert self._cursor is not None
        sampled, self._cursor = self._draw(serving, self._cursor)
        return sampled, self._cursor


Sampler = InTurns | Asynchronous


class _AtOnce(Executor):
    """Runs what is submitted where it is submitted."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future
