"""How a command's process is set up for JAX, and how it ends when something fails."""

from __future__ import annotations

import _thread
import contextlib
import inspect
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from typing import Any

from dcjax.allocator import keep_freed_memory
from dcjax.errors import RunError
from dcjax.user_code import failures_of_files

INTERRUPTION_HINTS = {
    "train": "; run the same command again to resume from the last checkpoint",
    "convert": "; nothing is left half-written",
}
"""What a user wants to know after interrupting a command, by command."""


@contextlib.contextmanager
def jax_session() -> Iterator[None]:
    """Sets up the process for JAX: settings, memory allocator, logging, compilation cache, reports of compilations."""
    keep_freed_memory()
    _silence_libraries()
    _pin_settings()
    from dcjax.cli.compilation import enable_compilation_cache, report_slow_compilations

    enable_compilation_cache()
    with report_slow_compilations(), failures_of_files():
        yield


PINNED = {
    "jax_enable_x64": False,
    "jax_numpy_rank_promotion": "allow",
    "jax_numpy_dtype_promotion": "standard",
    "jax_threefry_partitionable": True,
}
"""Settings of JAX that would change what is computed or sampled, or stop it, and what dcjax is written for."""


def _pin_settings() -> None:
    """Sets what is pinned, and reports each setting that the environment has otherwise."""
    import jax

    settings: Any = jax.config
    for name, value in PINNED.items():
        if (found := getattr(settings, name)) != value:
            print(f"dcjax: {name.upper()} is {found}; dcjax sets it to {value}", file=sys.stderr)
            settings.update(name, value)


def _silence_libraries() -> None:
    """Turns the logging of libraries off."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Orbax both logs a failed save and raises it; the exception is reported in one line.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _hide_late_errors


def _hide_late_errors(unraisable) -> None:
    """An unraisable hook that is silent about reads and writes that end after their checkpoint has failed.

    An interrupt that arrived in a callback of JAX's, which cannot raise it, is raised again in the main thread.
    """
    error, source = unraisable.exc_value, unraisable.object
    if isinstance(error, KeyboardInterrupt):
        _thread.interrupt_main()
        return
    is_late_write = isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
    is_late_read = inspect.iscoroutine(source) and "orbax" in source.cr_code.co_filename
    if not (is_late_write or is_late_read):
        sys.__unraisablehook__(unraisable)


@contextlib.contextmanager
def leave_on_failure(command: str) -> Iterator[None]:
    """Ends a process that fails at once if it is one of several: an ordinary exit would wait for the others.

    Where it fails because another one has gone, it says so.
    """
    from dcjax.sharding.hosts import as_loss, has_joined, leave

    try:
        yield
    except BaseException as error:
        if has_joined():
            leave(report_error(as_loss(error) or error, command))
        raise


def report_error(error: BaseException, command: str) -> int:
    """Prints why `command` failed, in one line unless it is a bug, and returns the exit status."""
    match error:
        case RunError():
            message, status = f"error: {error}", error.status
        case OSError():
            message, status = f"error: {f'{error.filename}: {error.strerror}' if error.filename else error}", 2
        case KeyboardInterrupt():
            told = f"; {error}" if error.args else INTERRUPTION_HINTS.get(command, "")
            message, status = f"interrupted{told}", 130
        case _:
            traceback.print_exception(error)
            return 1
    print(f"dcjax: {' '.join(message.split())}", file=sys.stderr)
    return status
