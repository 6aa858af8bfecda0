"""What a run leaves to be read, step by step: metrics, transcripts, progress."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from dcjax.errors import RunError
from dcjax.loop.setup import Setup
from dcjax.reporting.progress import Progress
from dcjax.reporting.record import MetricsLog, Transcripts
from dcjax.reporting.trackers import Trackers
from dcjax.sharding.hosts import is_main


class RunLog:
    """Writes and shows each step, on process 0; nothing on others. A context manager.

    Args:
      setup: of the run.
      last_step: of the checkpoint that the run goes on from; None for one that begins.
      trackers: that are told each step too; None on processes that write nothing.

    Raises:
      RunError: on entering, what was logged before is gone or damaged.
    """

    def __init__(self, setup: Setup, last_step: int | None, trackers: Trackers | None):
        self._setup, self._last_step, self._trackers = setup, last_step, trackers
        self._deployed_accuracy: float | None = None
        self._open = ExitStack()

    def __enter__(self) -> Self:
        if is_main():
            config = self._setup.config
            self._metrics, self._transcripts = self._logs()
            self._open.enter_context(self._metrics)
            self._open.enter_context(self._transcripts)
            self._progress = self._open.enter_context(
                Progress(config.steps, initial=self._last_step or 0, description="step")
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def phase(self, name: str) -> None:
        """Shows what is done from now on."""
        if is_main():
            self._progress.phase(name)

    def write(self, step: int, metrics: dict[str, float], samples: Iterable[Mapping[str, Any]] = ()) -> None:
        """Logs a step, and samples as `transcribe` gives them; shows it if it was trained.

        Step 0 was not, behind which the first one begins.
        """
        self._deployed_accuracy = metrics.get("eval/deployed_accuracy", self._deployed_accuracy)
        if not is_main():
            return
        for sample in samples:
            self._transcripts.write(step, **sample)
        self._metrics.write(step, metrics)
        if self._trackers is not None:
            self._trackers.write(step, metrics)
        if step == 0:
            self._progress.begin()
        else:
            self._progress.update(step, **self._shown(metrics))

    def _logs(self) -> tuple[MetricsLog, Transcripts]:
        directory, last_step = self._setup.config.directory, self._last_step
        path = directory / "metrics.jsonl"
        if last_step is not None and not path.exists():
            raise RunError(
                f"{path} is gone, of a run that has a checkpoint of step {last_step}; put it back, or remove both"
            )
        try:
            log = MetricsLog(directory, "metrics", last_step=last_step, tensorboard=True)
            return log, Transcripts(directory, last_step=last_step)
        except ValueError as error:
            raise RunError(f"{error}; mend that line, or choose another --run-dir to start anew") from error

    def _shown(self, metrics: dict[str, float]) -> dict[str, str]:
        deployed = self._deployed_accuracy
        budget = f"/{metrics['dual/budget']:.4f}" if "dual/budget" in metrics else ""
        return {
            "reward": f"{metrics['reward']:.2f}",
            "deployed": "-" if deployed is None else f"{deployed:.2f}",
            "δ̄": f"{metrics['dual/discrepancy']:.4f}{budget}",
            "λ": f"{metrics['dual/multiplier']:.3f}",
            "length": f"{metrics['response_length']:.1f}",
            "tok/s": f"{metrics['tokens_per_second']:.0f}",
        }
