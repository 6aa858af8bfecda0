"""A trace of a process's first iterations, and where their time went."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax

from dcjax.errors import RunError
from dcjax.reporting.record import write_atomically
from dcjax.reporting.times import PROFILE, TIMES, read_times, times_table
from dcjax.sharding.hosts import is_main
from dcjax.spans import Recorder


class Profiler:
    """Records the first iterations that this process makes; a context manager, which tells at its end what it found.

    JAX's trace and `reporting.times.TIMES` are written into RUN/profile once these iterations are made, or when the run
    ends before. Of several processes, the first is recorded.

    Args:
      run_dir: the run directory.
      iterations: how many are recorded, at least 1; None records nothing.

    Raises:
      RunError: when a trace is written, and cannot be.
    """

    def __init__(self, run_dir: Path, iterations: int | None):
        self._folder, self._left = run_dir / PROFILE, (iterations or 0) if is_main() else 0
        self._asked, self._made = self._left > 0, []
        self._recorder, self._recording = Recorder(), ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish()
        if self._made:
            print(f"{times_table(read_times(self._folder))}\ntrace and times: {self._folder}", file=sys.stderr)
        elif self._asked:
            print("dcjax: nothing is profiled: no iteration was made to its end", file=sys.stderr)

    def iteration(self, step: int) -> AbstractContextManager[None]:
        """The context of a whole iteration, by its number; recorded while there are iterations to record."""
        return self._recorded(step) if self._left else nullcontext()

    @contextmanager
    def _recorded(self, step: int) -> Iterator[None]:
        if not self._made:
            self._begin()
        self._recorder.lap()
        with jax.profiler.StepTraceAnnotation("iteration", step_num=step):
            yield
        lap = self._recorder.lap()
        self._made.append({"step": step, "seconds": sum(lap.parts.values()), **lap._asdict()})
        self._left -= 1
        if not self._left:
            self._finish()

    def _begin(self) -> None:
        options: Any = jax.profiler.ProfileOptions()
        # a trace of every Python call would take longer than what it shows
        options.python_tracer_level = 0
        self._folder.mkdir(exist_ok=True)
        jax.profiler.start_trace(self._folder, profiler_options=options)
        self._recording.callback(self._write_trace)
        self._recording.enter_context(self._recorder)

    def _write_trace(self) -> None:
        try:
            jax.profiler.stop_trace()
        except RuntimeError as error:
            raise RunError(f"cannot write the trace into {self._folder}: {error}") from error

    def _finish(self) -> None:
        """Writes what is recorded; nothing the second time."""
        self._left = 0
        self._recording.close()
        if self._made:
            write_atomically(self._folder / TIMES, json.dumps({"iterations": self._made}, indent=1).encode())
