"""Checkpoints: the TrainState by Orbax, and beside it where the loop stands."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from dcjax.errors import Interrupted, RunError
from dcjax.sharding.hosts import as_loss, is_main, total
from dcjax.types import TrainState

LOOKS = 5
"""How often checkpoints are listed anew where one is removed meanwhile."""

Part = Callable[[TrainState], Any]
"""TrainState -> a tree of some of its arrays."""


def whole(state: TrainState) -> TrainState:
    """The `Part` that is all of it."""
    return state


@dataclass(frozen=True)
class Cursor:
    """Where a run stands in its steps, its prompts and its random keys: what the loop carries beside the TrainState."""

    step: int
    """RL iterations done."""
    data_cursor: int
    """Train prompts consumed."""
    rollout_key: list[int]
    """Raw data of the PRNG key that the next rollout's key is split from."""
    progress: dict[str, Any] = field(default_factory=dict)
    """Where a curriculum stands (`dcjax.data.task.Curriculum`), in values of JSON."""


class Checkpoints:
    """The checkpoints of one run, in `directory/STEP`; saved in the background, visible only when whole.

    Args:
      directory: made unless it is only read.
      keep: newest checkpoints kept; None to only read.
    """

    def __init__(self, directory: Path, *, keep: int | None = None):
        self.directory = directory.resolve()
        if keep is not None:
            if is_main():
                self.directory.mkdir(parents=True, exist_ok=True)
            # the others must not look before it is there
            total(0)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            # Orbax makes no directory for processes that are named; unnamed, they would meet in programs on all
            # devices, which may be at other work
            create=False,
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                active_processes=set(range(jax.process_count()))
            ),
            read_only=keep is None,
            # made in the background, a directory that cannot be made leaves threads that wait minutes for it
            async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
        )
        self._only_read = keep is None
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def steps(self) -> list[int]:
        """Steps that can be restored, in order: also those that another process has saved meanwhile, if only read."""
        if self._only_read:
            self._look_again()
        return sorted(self._manager.all_steps())

    def _look_again(self) -> None:
        for _ in range(LOOKS):
            # one may be removed by the run that saves them, after it is listed and before it is looked into
            with contextlib.suppress(FileNotFoundError):
                return self._manager.reload()
        self._manager.reload()

    def latest(self) -> int:
        """The newest step that can be restored.

        Raises:
          RunError: there is none.
        """
        if not (steps := self.steps()):
            raise RunError(f"no checkpoint in {self.directory}; dcjax train writes the first one after the warm start")
        return steps[-1]

    def require(self, step: int) -> None:
        """Refuses a step that cannot be restored, before anything is read.

        Raises:
          RunError: there is no checkpoint of it.
        """
        if step not in self.steps():
            there = ", ".join(map(str, self.steps())) or "none"
            raise RunError(f"no checkpoint of step {step} in {self.directory}; there: {there}")

    def save(self, state: TrainState, cursor: Cursor) -> None:
        """Starts saving, unless that step or a later one is saved; the arrays may be donated as soon as this returns.

        Raises:
          RunError: this or an earlier save failed, for want of space say.
        """
        described = asdict(cursor) | {"sums": sums_of_bits(state)}
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(state), loop=ocp.args.JsonSave(described))
        self._guard(lambda: self._manager.save(cursor.step, args=items))

    def restore(self, step: int, like: TrainState, part: Part = whole) -> tuple[Any, Cursor]:
        """What `part` takes of a step's state; no other array is read, unless the first versions wrote the checkpoint.

        Args:
          step: of the checkpoint.
          like: the state's shapes, dtypes and shardings; arrays are placed by it, whatever mesh they were saved from.
          part: TrainState -> a tree of some of its arrays, as they are.

        Raises:
          RunError: there is none, or it is damaged.
        """
        self.require(step)
        wanted = {id(leaf) for leaf in jax.tree.leaves(part(like))}
        partly = jax.tree.map(lambda leaf: leaf if id(leaf) in wanted else ocp.PLACEHOLDER, like)
        try:
            described = self._manager.restore(step, args=ocp.args.Composite(loop=ocp.args.JsonRestore()))["loop"]
            # the first checkpoints have one number for the whole state, which only the whole can be checked against
            like = partly if "sums" in described else like
            arrays = ocp.args.PyTreeRestore(like, restore_args=ocp.checkpoint_utils.construct_restore_args(like))
            state = self._manager.restore(step, args=ocp.args.Composite(state=arrays))["state"]
            _check_bits(state, described)
            return part(state), Cursor(**described)
        except Exception as error:  # Orbax and tensorstore raise whatever the damage happens to trip
            raise as_loss(error) or RunError(
                f"checkpoint {self.directory / str(step)} is damaged: {_first_line(error)}"
            ) from error

    def restore_latest(self, like: TrainState) -> tuple[TrainState, Cursor] | None:
        """The newest checkpoint that can be read, or None in a run without any.

        A damaged one is named on standard error, and the one before it is tried. Once that is read, the damaged ones
        are renamed to STEP.damaged, so that the run can save those steps again.

        Raises:
          RunError: there are checkpoints and all are damaged; they are left as they are.
        """
        damaged = []
        for step in reversed(self.steps()):
            restored = None
            try:
                restored = self.restore(step, like)
            except Interrupted:
                raise
            except RunError as error:
                print(f"dcjax: {error}; trying the one before it", file=sys.stderr)
            # what one process cannot read, all pass over
            if total(restored is None):
                damaged.append(step)
                continue
            for bad in damaged:
                self._set_aside(bad)
            return restored
        if damaged:
            raise RunError(f"all checkpoints in {self.directory} are damaged; choose another --run-dir to start anew")
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Interrupted):
            # saved already where it could be; a save that is under way waits for a host that is gone
            return
        try:
            self.close()
        except RunError:
            # a save that failed while the loop was already failing would hide why
            if error is None:
                raise

    def wait(self) -> None:
        """Waits for the last save.

        Raises:
          RunError: it failed.
        """
        self._guard(self._manager.wait_until_finished)

    def close(self) -> None:
        """Waits for the last save, and ends the threads behind it.

        Raises:
          RunError: it failed.
        """
        self.wait()
        self._manager.close()

    def _set_aside(self, step: int) -> None:
        damaged = self.directory / str(step)
        aside = damaged.with_name(f"{step}.damaged")
        if is_main():
            shutil.rmtree(aside, ignore_errors=True)
            damaged.rename(aside)
        # the others must not look before it is gone
        total(0)
        self._manager.reload()

    def _guard(self, write: Any) -> None:
        try:
            write()
        except Exception as error:  # background threads hand on OSError, ValueError or XlaRuntimeError for a full disk
            raise as_loss(error) or RunError(f"cannot write to {self.directory}: {_first_line(error)}") from error


def fingerprint(tree: Any) -> int:
    """32 bits that depend on every bit of a tree's arrays, the same on every mesh."""
    return _combined(sums_of_bits(tree))


def sums_of_bits(tree: Any) -> list[int]:
    """The sum of the elements of each array in a tree, their bits taken as unsigned numbers, modulo 2^32.

    It is a sum without rounding, and so the same on every mesh.
    """
    # one after another: XLA on CPUs copies what it takes as another type, and would copy the whole tree at once
    return [int(_sum_of_bits(leaf)) for leaf in jax.tree.leaves(tree)]


@jax.jit
def _sum_of_bits(array: jax.Array) -> jax.Array:
    narrow = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}"))
    return jnp.sum(narrow.astype(jnp.uint32), dtype=jnp.uint32)


def _combined(sums: list[int]) -> int:
    total = 0
    for number in sums:
        # the odd factor keeps arrays that changed places apart
        total = (total * 31 + number) % 2**32
    return total


def _check_bits(state: Any, described: dict[str, Any]) -> None:
    """Checks the arrays that were read against what was saved of them, and takes that out of the description."""
    read = {at: leaf for at, leaf in enumerate(jax.tree.leaves(state)) if leaf is not ocp.PLACEHOLDER}
    found = sums_of_bits(list(read.values()))
    if (saved := described.pop("sums", None)) is not None:
        intact = found == [saved[at] for at in read]
    else:
        intact = _combined(found) == described.pop("fingerprint")
    if not intact:
        raise ValueError("its arrays are not the ones that were saved")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
