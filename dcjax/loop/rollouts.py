"""One iteration's samples after another: in turns with training, or ahead of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from dcjax.loop.checkpoint import LoopState
from dcjax.serving.sync import ServingParams
from dcjax.types import Params, TrainState

Sampled = TypeVar("Sampled")
Result = TypeVar("Result")


class Rollouts(Generic[Sampled]):
    """Samples for iterations in order, k of them ahead of the one that is trained on; a context manager.

    Samples for iteration t come from the weights of version max(t − k, 0), whether they are waited for or not, so that
    a run does not depend on who is faster, and one that is resumed goes on to the same bits: the k versions before the
    newest are the state's history. With k = 0 sampling and training take turns.

    Whatever uses the engines does so in the order in which it was asked for, one after another: so their devices meet
    the same programs in the same order on every host.

    Args:
      sample: (serving params, loop) -> samples for the iteration that the loop stands before, and the loop behind it.
      sync: (masters, version) -> serving params.
      ahead: k.
      steps: iterations of the run; nothing is sampled for those behind it.
      in_thread: samples are drawn while the trainer is at work, rather than when they are asked for.
    """

    def __init__(
        self,
        sample: Callable[[ServingParams, LoopState], tuple[Sampled, LoopState]],
        sync: Callable[[Params, int], ServingParams],
        *,
        ahead: int,
        steps: int,
        in_thread: bool,
    ):
        self._sample, self._sync, self._ahead, self._steps = sample, sync, ahead, steps
        self._engines: Executor = ThreadPoolExecutor(1, "rollouts") if in_thread else _AtOnce()
        self._under_way: deque[Future[tuple[Sampled, LoopState]]] = deque()
        # of the next samples; with the engines from the first of them on
        self._loop: LoopState | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._engines.shutdown(cancel_futures=True)

    def take(self, state: TrainState, loop: LoopState) -> tuple[Sampled, LoopState]:
        """Samples for the iteration that `loop` stands before, and the loop behind it; raises what sampling raised."""
        if not self._ahead:
            # weights that lag behind on purpose are history too
            params = state.history[0] if state.history else state.params
            return self._sample(self._sync(params, max(loop.step - len(state.history), 0)), loop)
        if not self._under_way:
            self._loop = loop
            for number, params in enumerate(state.history, loop.step - self._ahead):
                self._begin(params, number)
        self._begin(state.params, loop.step)
        return self._under_way.popleft().result()

    def between(self, use: Callable[[], Result]) -> Result:
        """What `use` makes of the engines, once the samples that were asked for are drawn."""
        return self._engines.submit(use).result()

    def _begin(self, params: Params, version: int) -> None:
        """Sampling for the iteration that is k behind the version, unless the run ends before."""
        if version + self._ahead < self._steps:
            self._under_way.append(self._engines.submit(self._next, self._sync(params, max(version, 0))))

    def _next(self, serving: ServingParams) -> tuple[Sampled, LoopState]:
        assert self._loop is not None
        sampled, self._loop = self._sample(serving, self._loop)
        return sampled, self._loop


class _AtOnce(Executor):
    """Runs what is submitted where it is submitted."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future
