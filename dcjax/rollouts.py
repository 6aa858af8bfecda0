"""One iteration's samples after another: in turns with training, or ahead of it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

from dcjax.checkpoint import LoopState
from dcjax.serving.sync import ServingParams
from dcjax.types import Params, TrainState

Sampled = TypeVar("Sampled")


class Rollouts(Generic[Sampled]):
    """Samples for iterations in order, k of them ahead of the one that is trained on; a context manager.

    Samples for iteration t come from the weights of version max(t − k, 0), whether they are waited for or not, so that
    a run does not depend on who is faster, and one that is resumed goes on to the same bits: the k versions before the
    newest are the state's history. With k = 0 sampling and training take turns.

    Args:
      sample: (serving params, loop) -> samples for the iteration that the loop stands before, and the loop behind it.
      sync: (masters, version) -> serving params.
      ahead: k.
      steps: iterations of the run; nothing is sampled for those behind it.
    """

    def __init__(
        self,
        sample: Callable[[ServingParams, LoopState], tuple[Sampled, LoopState]],
        sync: Callable[[Params, int], ServingParams],
        *,
        ahead: int,
        steps: int,
    ):
        self._sample, self._sync, self._ahead, self._steps = sample, sync, ahead, steps
        self._under_way: deque[Future[tuple[Sampled, LoopState]]] = deque()
        # of the next samples; the thread's own from the first of them on
        self._loop: LoopState | None = None
        self._thread = ThreadPoolExecutor(1, "rollouts") if ahead else None
        self.quiet = threading.Lock()
        """Held while samples are drawn: who else uses the engines' devices takes it, since programs of several devices
        that two threads start may wait for each other."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def take(self, state: TrainState, loop: LoopState) -> tuple[Sampled, LoopState]:
        """Samples for the iteration that `loop` stands before, and the loop behind it; raises what sampling raised."""
        if self._thread is None:
            params = state.history[0] if state.history else state.params
            return self._drawn(self._sync(params, max(loop.step - len(state.history), 0)), loop)
        if not self._under_way:
            self._loop = loop
            for number, params in enumerate(state.history, loop.step - self._ahead):
                self._begin(self._thread, params, number)
        self._begin(self._thread, state.params, loop.step)
        return self._under_way.popleft().result()

    def _begin(self, thread: ThreadPoolExecutor, params: Params, version: int) -> None:
        """Sampling for the iteration that is k behind the version, unless the run ends before."""
        if version + self._ahead < self._steps:
            self._under_way.append(thread.submit(self._next, self._sync(params, max(version, 0))))

    def _next(self, serving: ServingParams) -> tuple[Sampled, LoopState]:
        assert self._loop is not None
        sampled, self._loop = self._drawn(serving, self._loop)
        return sampled, self._loop

    def _drawn(self, serving: ServingParams, loop: LoopState) -> tuple[Sampled, LoopState]:
        with self.quiet:
            return self._sample(serving, loop)
