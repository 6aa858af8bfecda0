"""Checkpoints: the TrainState by Orbax, and beside it where the loop stands."""

from __future__ import annotations

import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orbax.checkpoint as ocp

from dcjax.errors import RunError
from dcjax.types import TrainState


@dataclass(frozen=True)
class LoopState:
    """What the loop carries beside the TrainState."""

    step: int
    """RL iterations done."""
    data_cursor: int
    """Train prompts consumed."""
    rollout_key: list[int]
    """Raw data of the PRNG key that the next rollout's key is split from."""


class Checkpoints:
    """The checkpoints of one run, in `directory/STEP`; saved in the background, visible only when whole.

    Args:
      directory: made with the first save.
      keep: newest checkpoints kept; None to only read.
    """

    def __init__(self, directory: Path, *, keep: int | None = None):
        self.directory = directory.resolve()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=keep is not None, read_only=keep is None)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def steps(self) -> list[int]:
        """Steps that can be restored, in order."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int:
        """The newest step that can be restored.

        Raises:
          RunError: there is none.
        """
        if not (steps := self.steps()):
            raise RunError(f"no checkpoint in {self.directory}; dcjax train writes the first one after the warm start")
        return steps[-1]

    def save(self, state: TrainState, loop: LoopState) -> None:
        """Starts saving; the arrays may be donated as soon as this returns.

        Raises:
          RunError: this or an earlier save failed, for want of space say.
        """
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), loop=ocp.args.JsonSave(asdict(loop)))
        self._guard(lambda: self._manager.save(loop.step, args=items))

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, LoopState]:
        """The checkpoint of a step, placed as `like` (shapes, dtypes and shardings).

        Raises:
          RunError: there is none, or it is damaged.
        """
        if step not in self.steps():
            there = ", ".join(map(str, self.steps())) or "none"
            raise RunError(f"no checkpoint of step {step} in {self.directory}; there: {there}")
        items = ocp.args.Composite(state=ocp.args.StandardRestore(like), loop=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=items)
            return restored["state"], LoopState(**restored["loop"])
        except Exception as error:  # Orbax and tensorstore raise whatever the damage happens to trip
            raise RunError(f"checkpoint {self.directory / str(step)} is damaged: {_first_line(error)}") from error

    def restore_latest(self, like: TrainState) -> tuple[TrainState, LoopState] | None:
        """The newest checkpoint that can be read, or None in a run without any.

        A damaged one is named on standard error and renamed to STEP.damaged, and the one before it is tried.

        Raises:
          RunError: there are checkpoints and all are damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return self.restore(step, like)
            except RunError as error:
                print(f"dcjax: {error}; trying the one before it", file=sys.stderr)
                self._set_aside(step)
        if steps:
            raise RunError(f"all checkpoints in {self.directory} are damaged; choose another --run-dir to start anew")
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except RunError:
            # a save that failed while the loop was already failing would hide why
            if error is None:
                raise

    def close(self) -> None:
        """Waits for the last save.

        Raises:
          RunError: it failed.
        """
        self._guard(self._manager.wait_until_finished)
        self._manager.close()

    def _set_aside(self, step: int) -> None:
        damaged = self.directory / str(step)
        aside = damaged.with_name(f"{step}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        damaged.rename(aside)
        self._manager.reload()

    def _guard(self, write: Any) -> None:
        try:
            write()
        except Exception as error:  # background threads hand on OSError, ValueError or XlaRuntimeError for a full disk
            raise RunError(f"cannot write to {self.directory}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
