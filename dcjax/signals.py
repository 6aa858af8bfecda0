"""How a process ends that is told to stop while Python cannot listen: while it imports libraries, or XLA compiles.

Python runs the handler of a signal between two instructions of the main thread, and so only once a compilation, which
may take minutes, is over. A thread of its own hears of each signal at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

RESUMABLE, INTERRUPTED = 75, 130
"""Exit statuses: start the same command again; stopped from the keyboard."""

GRACE = 10.0
"""Seconds that an interrupted command has to end by itself, with what it has to write or to remove."""

_last_words: Callable[[], str] | None = None


def listen(command: str) -> None:
    """Begins to listen for SIGTERM and SIGINT, for a process that runs one command.

    `train` ends at once with `RESUMABLE` on SIGTERM, and with `INTERRUPTED` on SIGINT, until its loop begins, which
    takes both for itself (`Preemption`): nothing is to be saved before. Otherwise a command has `GRACE` seconds to end
    after SIGINT.

    Args:
      command: the name of the command.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    if command == "train":
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _before_the_loop)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_hear, args=(reading, command), name="signals", daemon=True).start()


@contextlib.contextmanager
def last_words(tell: Callable[[], str]) -> Iterator[None]:
    """Around work of a command that SIGINT may end at any moment: what is to be told of it then.

    Args:
      tell: called where the work was interrupted, by another thread if the main one does not come back within `GRACE`;
        it may print, and returns the rest of the line that says so.

    Raises:
      KeyboardInterrupt: with that text.
    """
    global _last_words
    _last_words = tell
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(tell()) from None
    finally:
        _last_words = None


def leave(status: int) -> NoReturn:
    """Ends the process without waiting for threads, some of which may be compiling: they would crash at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue
    os._exit(status)


def _before_the_loop(number: int, frame: FrameType | None) -> None:
    """Marks that the loop does not take signals yet, so that `_hear` acts on them; an exception might be swallowed."""


def _hear(reading: int, command: str) -> None:
    while received := os.read(reading, 1):
        beginning = command == "train" and signal.getsignal(signal.SIGTERM) is _before_the_loop
        if received[0] == signal.SIGTERM and beginning:
            _say("stopped by SIGTERM before the first step; start the same command again")
            os._exit(RESUMABLE)
        if received[0] == signal.SIGINT:
            if beginning:
                _say("interrupted; run the same command again to resume from the last checkpoint")
                os._exit(INTERRUPTED)
            late = threading.Timer(GRACE, _end_late)
            late.daemon = True
            late.start()


def _end_late() -> None:
    """Ends a command whose main thread has not come back, from a compilation for example, whose line is unfinished."""
    try:
        told = "" if _last_words is None else f"; {_last_words()}"
        os.write(2, b"\n")
        _say(f"interrupted{told}")
    finally:
        leave(INTERRUPTED)


def _say(line: str) -> None:
    os.write(2, f"dcjax: {line}\n".encode())
