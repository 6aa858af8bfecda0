"""A process that runs one command of dcjax after another: what it has imported and compiled serves the next one too."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

from dcjax.errors import RunError

Command = Callable[[Sequence[str]], int]
"""Runs a command of dcjax in the calling process, and returns its exit status; `dcjax.cli.main`."""

COMMANDS = 50
"""How many commands a process runs before another one replaces it: its memory grows with each program it compiles."""


class Worker:
    """Runs commands on a share of the cores, one at a time, in a process that lives until it is closed."""

    def __init__(self, command: Command, cores: set[int], log: Path):
        """Starts nothing yet.

        Args:
          command: what runs them; it must be a module's function, which the process imports.
          cores: those that the process may use.
          log: the file that takes what the present command prints.
        """
        self._command, self._cores, self._log = command, cores, log
        self._serving: tuple[SpawnProcess, Connection] | None = None
        self._ran, self._stopped = 0, False

    def __call__(self, *arguments: str) -> None:
        """Runs a command.

        Raises:
          RunError: it failed, with its own last line; or the worker is stopped.
        """
        if self._stopped:
            raise RunError("stopped")
        process, pipe = self._ready()
        self._ran += 1
        try:
            pipe.send(arguments)
            status = pipe.recv()
        except (EOFError, OSError):  # the process was ended
            self.close()
            status = process.exitcode
        if status:
            last = (self._log.read_text("utf-8", errors="replace").strip().splitlines() or ["it said nothing"])[-1]
            raise RunError(f"dcjax {' '.join(arguments)} ended with {status}: {last}")

    def stop(self) -> None:
        """Ends the command that is running, as SIGTERM does, and refuses others; may be called by another thread."""
        self._stopped = True
        if self._serving is not None:
            self._serving[0].terminate()

    def close(self) -> None:
        """Ends the process once its command is done."""
        if self._serving is not None:
            process, pipe = self._serving
            pipe.close()
            process.join()
            self._serving = None

    def _ready(self) -> tuple[SpawnProcess, Connection]:
        """The process that takes the next command, and the pipe to it."""
        if self._serving is None or self._ran == COMMANDS:
            self.close()
            context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
            self._log.parent.mkdir(parents=True, exist_ok=True)
            pipe, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, self._command, self._cores, self._log))
            process.start()
            theirs.close()
            self._serving, self._ran = (process, pipe), 0
        return self._serving


def _serve(pipe: Connection, command: Command, cores: set[int], log: Path) -> None:
    """Runs the commands that come through a pipe until its other end is closed, as it is when that process dies."""
    os.sched_setaffinity(0, cores)  # before anything is imported that counts them
    with log.open("w") as told:
        for descriptor in (1, 2):
            os.dup2(told.fileno(), descriptor)
        while True:
            try:
                arguments = pipe.recv()
                os.ftruncate(told.fileno(), 0)
                os.lseek(told.fileno(), 0, os.SEEK_SET)
                pipe.send(command(arguments))
            except (EOFError, BrokenPipeError, KeyboardInterrupt):
                return
