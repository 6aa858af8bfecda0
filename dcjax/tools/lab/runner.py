"""Runs what a study still needs, several at a time."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType

from dcjax.errors import RunError
from dcjax.reporting.progress import Progress
from dcjax.reporting.record import read_metrics
from dcjax.tools.lab.results import Result, Results, summarise
from dcjax.tools.lab.schedule import count_made, following, total
from dcjax.tools.lab.study import Cell, Study
from dcjax.tools.lab.worker import Command, Worker

LOCK = ".lock"
VERSIONS = ("jax", "jaxlib", "flax", "optax", "python")
"""Those that results depend on, beside the commit."""


class Runner:
    """Makes runs by `dcjax train`, in folders of their own, which are removed once their results are read.

    A context manager; leaving it ends the processes.
    """

    def __init__(self, study: Study, folder: Path, command: Command, *, commit: str, workers: int):
        """Divides the cores among the runs that are made at a time.

        Args:
          study: whose runs they are.
          folder: of the runs' folders, the warm starts and the workers' logs.
          command: what runs the commands of dcjax, in the workers' processes.
          commit: of the code, as it is recorded.
          workers: how many runs are made at a time.
        """
        self._study, self._folder, self._commit = study, folder, commit
        cores = sorted(os.sched_getaffinity(0))
        self._workers = [
            Worker(command, set(cores[first::workers]) or set(cores), folder / f"worker_{first}.log")
            for first in range(workers)
        ]
        self._idle: queue.LifoQueue[Worker] = queue.LifoQueue()  # the last one has what the next run needs
        for worker in self._workers:
            self._idle.put(worker)
        self._starting: dict[Cell, threading.Lock] = {}
        self._guard = threading.Lock()

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        for worker in self._workers:
            worker.close()

    def __call__(self, cell: Cell) -> Result:
        """Makes one run, or goes on with what a stopped one left.

        Raises:
          RunError: it failed, with its own last line.
        """
        began, directory = time.monotonic(), self._directory(cell)
        _wait_for_orphan(directory)
        start = self._start(cell.start)
        settings = (f"run_dir={directory}", f"pretrained={start}", "warm_start.steps=0")
        self._dcjax("train", self._study.task(cell.task).recipe, *self._study.settings(cell), *settings)
        try:
            figures, curves = summarise(read_metrics(directory / "metrics.jsonl"))
        except KeyError as error:
            raise RunError(f"{directory} logged no {error.args[0]}, which the study compares") from None
        config = json.loads((directory / "config.json").read_text("utf-8"))
        made_by = {"versions": {name: config["versions"][name] for name in VERSIONS}}
        made_by |= {"commit": self._commit, "start": _digest(start), "seconds": round(time.monotonic() - began, 1)}
        shutil.rmtree(directory)
        kept = {} if cell.seed in self._study.tuning_seeds else curves
        return Result(cell, self._study.identity(cell), figures, kept, made_by)

    def stop(self) -> None:
        """Ends what is running; each run goes on from its last checkpoint another time."""
        for worker in self._workers:
            worker.stop()

    def _directory(self, cell: Cell) -> Path:
        """The settings' identity is in the name, so that no run goes on with what others left."""
        return self._folder / f"{cell.name}_{self._study.identity(cell)}"

    def _start(self, cell: Cell) -> Path:
        """The folder of a warm start's weights, which is made once."""
        with self._guard:
            lock = self._starting.setdefault(cell, threading.Lock())
        directory = self._directory(cell)
        with lock:
            if not (weights := directory / "weights").exists():
                recipe = self._study.task(cell.task).recipe
                run_dir = directory / "run"
                _wait_for_orphan(run_dir)
                self._dcjax("train", recipe, *self._study.settings(cell), "steps=0", f"run_dir={run_dir}")
                self._dcjax("convert", "export", str(run_dir), str(weights))
                shutil.rmtree(run_dir)
        return weights

    def _dcjax(self, *arguments: str) -> None:
        """Runs a command in an idle worker; raises RunError where it fails."""
        worker = self._idle.get()
        try:
            worker(*arguments)
        finally:
            self._idle.put(worker)


def _digest(weights: Path) -> str:
    """16 hexadecimal digits of a warm start's weights, which another processor makes otherwise."""
    return hashlib.sha256((weights / "model.safetensors").read_bytes()).hexdigest()[:16]


def _wait_for_orphan(run_dir: Path) -> None:
    """Waits until nobody trains in a folder any more: a killed study may have left a run that still goes on."""
    if (run_dir / LOCK).exists():
        with (run_dir / LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)


def run_study(
    study: Study, results: Results, runner: Callable[[Cell], Result], *, workers: int, stop: Callable[[], None]
) -> None:
    """Makes all runs that a study still needs, each once, and keeps each result as it comes.

    Args:
      study: whose runs they are.
      results: those there are; the others are added.
      runner: makes one run; called in threads.
      workers: how many runs are made at a time.
      stop: ends the runs that are being made, where one fails or the study is interrupted.

    Raises:
      RunError: a run failed. What was running meanwhile is left in its folder, where the next call goes on with it.
    """
    made = count_made(study, results.of(study))
    running: dict[Future[Result], Cell] = {}
    with ThreadPoolExecutor(workers) as pool, Progress(total(study), initial=made, description="run") as progress:
        try:
            while True:
                done = results.of(study)
                while len(running) < workers and (cell := following(study, done, running.values())):
                    running[pool.submit(runner, cell)] = cell
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    cell, result = running.pop(future), future.result()
                    results.add(result)
                    made += 1
                    progress.update(made, last=cell.name, **{study.metric: f"{result.figures[study.metric]:.3f}"})
        except BaseException:
            stop()  # before the pool waits for them
            raise
