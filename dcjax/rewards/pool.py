"""A reward function in worker processes, with hard limits on an answer's time and memory."""

from __future__ import annotations

import math
import os
import pickle
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import send_handle
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32

from dcjax.rewards import processes
from dcjax.rewards.processes import Reward, Score
from dcjax.user_code import code_files_in, function_of

PATIENCE = 10.0
"""Seconds that the server has to end; it needs them only if the import of the reward's module hangs."""

ATTEMPTS = 2
"""How many workers may die of an unknown cause on one answer before it scores 0."""


class RewardError(RuntimeError):
    """The reward function raised on an answer.

    Attributes:
      answer: the number of the answer among those submitted together.
      told: the exception and the line of the function's own code, as `dcjax.user_code.failure` has it.
    """

    def __init__(self, answer: int, description: str):
        told, _, traceback = description.partition("\n")
        super().__init__(f"the reward function raised on answer {answer}: {told}\n{traceback}")
        self.answer, self.told = answer, told


@dataclass
class Counters:
    """What has happened in a pool since it was entered."""

    # workers killed because an answer took too long, and workers that ran out of memory; their answers score 0
    timeouts: int = 0
    memory_kills: int = 0
    # workers replaced, for these and all other reasons
    restarts: int = 0


class Pending:
    """The scores of one `RewardPool.submit`, once they are complete."""

    def __init__(self, size: int):
        self.timeouts = 0
        """How many answers have taken too long so far; final once there is a result."""
        self.parts: dict[str, np.ndarray] = {}
        """The parts of rewards that consist of such, by name, float32 [N], NaN where an answer has none; complete once
        there is a result."""
        self._scores = np.zeros(size, np.float32)
        self._left = size
        self._raised: dict[int, str] = {}
        self._failure: Exception | None = None
        self._over = threading.Event()
        if not size:
            self._over.set()

    @classmethod
    def of(cls, scores: Sequence[Score | str]) -> Pending:
        """Scores that are known already; in place of each that could not be computed, `processes.describe`."""
        pending = cls(len(scores))
        for index, score in enumerate(scores):
            if isinstance(score, str):
                pending._set_error(index, score)
            else:
                pending._set(index, score)
        return pending

    def result(self) -> Float32[np.ndarray, "N"]:
        """Waits for the scores, in the order of the texts.

        Raises:
          RewardError: the reward function raised on an answer; the first such answer's traceback is quoted.
          RuntimeError: the pool was closed, its processes could not be started, or the reward's first call failed.
        """
        self._over.wait()
        if self._failure is not None:
            raise RuntimeError(f"answers were not scored: {self._failure}") from self._failure
        if self._raised:
            first = min(self._raised)
            raise RewardError(first, self._raised[first])
        return self._scores

    def _set(self, index: int, score: Score) -> None:
        parts = score if isinstance(score, dict) else {}
        for name, part in parts.items():
            self.parts.setdefault(name, np.full(len(self._scores), np.nan, np.float32))[index] = part
        self._scores[index] = sum(parts.values()) if isinstance(score, dict) else score
        self._left -= 1
        if not self._left:
            self._over.set()

    def _set_error(self, index: int, description: str) -> None:
        self._raised[index] = description
        self._set(index, 0.0)

    def _fail(self, failure: Exception | None) -> None:
        self._failure = failure
        self._over.set()


@dataclass(eq=False)
class _Job:
    """One answer to score."""

    pending: Pending
    index: int
    # text, gold, whether it is finished, and what else is known
    answer: tuple[str, str, bool, Mapping[str, Any]]
    deaths: int = 0


class _Worker:
    """A worker process, and what it is scoring until when."""

    def __init__(self, process: int, connection: Connection):
        self.process, self.connection = process, connection
        self.job: _Job | None = None
        self.deadline = math.inf
        # whether the reward's first call is over
        self.warm = False

    def begin(self, job: _Job, *, timeout: float, warm_up: float) -> None:
        self.job, self._timeout = job, timeout
        self.deadline = time.monotonic() + (timeout if self.warm else warm_up)
        with suppress(OSError):  # the worker has just died, which `finish` will notice
            self.connection.send(job.answer)

    def finish(self) -> bool:
        """Takes the worker's reply; returns False if it died instead."""
        try:
            reply = self.connection.recv_bytes()
        except (EOFError, OSError):
            return False
        job = self.job
        if job is None:  # it was not asked for anything
            return False
        if reply == processes.WARM:
            self.warm, self.deadline = True, time.monotonic() + self._timeout
            return True
        if reply.startswith(processes.SCORE):
            try:
                job.pending._set(job.index, processes.read_score(reply[1:]))
            except (ValueError, RecursionError):
                return False
        else:
            job.pending._set_error(job.index, reply[1:].decode())
        self.job, self.deadline = None, math.inf
        return True


class _Server:
    """The pool's side of the process that forks workers."""

    def __init__(self, pickled: bytes, module_name: str, memory: int):
        self.control, theirs = Pipe()
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", processes.__name__, str(theirs.fileno())],
            # SymPy orders sets by hashes, on which scores could otherwise depend
            env=os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": "0"},
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # an interrupt from the terminal is the pool's to handle
        )
        theirs.close()
        self.control.send((code_files_in(pickled), module_name, pickled, memory))

    def check(self) -> None:
        """Raises RuntimeError if the reward could not be imported."""
        if failed := self.control.recv():
            raise RuntimeError(f"workers cannot import the reward function: {failed}")

    def fork(self) -> _Worker:
        ours, theirs = Pipe()
        self.control.send(processes.FORK)
        send_handle(self.control, theirs.fileno(), self._process.pid)
        theirs.close()
        return _Worker(self.control.recv(), ours)

    def end(self, worker: _Worker) -> int:
        """Ends a worker if it still runs, and returns its exit status."""
        worker.connection.close()
        self.control.send(worker.process)
        return self.control.recv()

    def close(self) -> None:
        """Ends the server process and its workers."""
        self.control.close()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class RewardPool:
    """Scores answers in worker processes; a context manager.

    Workers are forked from a server process that has imported the reward function's module and nothing else of the
    program, neither its `__main__` nor JAX. That takes seconds, during which the pool accepts answers. Scores do not
    depend on the number of workers, nor on what each has scored before, as long as honest answers stay far from the
    limits.

    Before its first answer each worker calls the reward once, with the gold answer as the response, in a box and on an
    answer line, and ignores the result: what the reward loads at its first call does not count towards any answer's
    time.

    An answer at which a worker exceeds a limit scores 0, and the worker is replaced. If a worker dies of another cause,
    such as a signal from outside, its answer is tried once more, and scores 0 if that worker dies too.

    Args:
      reward: a picklable function of an importable module.
      workers: the number of processes; at most the number of cores, since timeouts are in wall-clock time.
      timeout: seconds that one answer may take.
      memory: bytes of address space that answers may add to a worker's own (Linux); the same holds for the first call.
      warm_up: seconds that the reward's first call in a worker may take; if it takes more, the pool fails.

    Raises:
      ValueError: a setting is out of range, or workers could not import the reward: it is a lambda, for example.
    """

    def __init__(
        self, reward: Reward, *, workers: int, timeout: float = 2.0, memory: int = 1 << 30, warm_up: float = 60.0
    ):
        if workers < 1:
            raise ValueError(f"workers is {workers}; it must be at least 1")
        if not timeout > 0:
            raise ValueError(f"timeout is {timeout}; it must be more than 0 seconds")
        if not warm_up > 0:
            raise ValueError(f"warm_up is {warm_up}; it must be more than 0 seconds")
        if memory < 1 << 20:
            raise ValueError(f"memory is {memory} bytes; it must be at least {1 << 20}")
        self._pickled, self._module_name = _pickled(reward), str(function_of(reward).__module__)
        if b"__main__" in self._pickled:
            raise ValueError(
                f"reward is {reward!r} of `__main__`, which workers do not import; give it a module of its own"
            )
        self.asks = processes.asked_for(reward)
        """What the reward is to be told beside its arguments."""
        self.counters = Counters()
        self._size, self._memory = workers, memory
        self._limits = {"timeout": timeout, "warm_up": warm_up}
        self._jobs: deque[_Job] = deque()
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()  # guards what `submit` and the end of the dispatcher both change
        self._over: Exception | None = RuntimeError("the pool was not entered")
        self._woken, self._waker = Pipe(duplex=False)
        self._dispatcher = threading.Thread(target=self._dispatch, name="rewards", daemon=True)

    def __enter__(self) -> RewardPool:
        self._over = None
        self._dispatcher.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Ends all processes; answers that are not scored by then never will be."""
        self._stop(RuntimeError("the pool was closed"))
        self._dispatcher.join()
        self._waker.close()
        self._woken.close()

    def submit(
        self,
        texts: Sequence[str],
        golds: Sequence[str],
        finished: Sequence[bool] | Bool[np.ndarray, "N"],
        known: Sequence[Mapping[str, Any]] | None = None,
    ) -> Pending:
        """Begins to score answers, after those submitted before, and returns at once.

        Args:
          texts: N responses.
          golds: their N right answers.
          finished: whether each response's end token was generated.
          known: of each, what the reward is told beside them (`processes.asked_for`); nothing where absent.

        Raises:
          ValueError: the lengths differ.
          RuntimeError: the pool is not open, or its processes could not be started.
        """
        known = [{}] * len(texts) if known is None else known
        if not len(texts) == len(golds) == len(finished) == len(known):
            raise ValueError(
                f"{len(texts)} texts, {len(golds)} golds, {len(finished)} finished and {len(known)} known; give "
                "equally many of each"
            )
        pending = Pending(len(texts))
        answers = zip(texts, golds, map(bool, finished), known, strict=True)
        with self._lock:
            if self._over is not None:
                raise RuntimeError(f"answers cannot be scored: {self._over}") from self._over
            self._jobs.extend(_Job(pending, index, answer) for index, answer in enumerate(answers))
        self._waker.send_bytes(b"")
        return pending

    def score(
        self, texts: Sequence[str], golds: Sequence[str], finished: Sequence[bool] | Bool[np.ndarray, "N"]
    ) -> Float32[np.ndarray, "N"]:
        """The scores of `submit`, waited for."""
        return self.submit(texts, golds, finished).result()

    def _stop(self, reason: Exception) -> None:
        with self._lock:
            self._over = self._over or reason
            self._waker.send_bytes(b"")

    def _dispatch(self) -> None:
        """Runs the dispatcher thread: starts the processes, and hands out answers until the pool ends."""
        try:
            with closing(_Server(self._pickled, self._module_name, self._memory)) as server:
                while self._over is None and server.control not in self._listen([server.control]):
                    pass
                if self._over is None:
                    server.check()
                    self._workers = [server.fork() for _ in range(self._size)]
                while self._over is None:
                    self._turn(server)
        except (EOFError, ConnectionError):
            self._stop(RuntimeError("the process that forks the workers was ended from outside"))
        except Exception as error:
            self._stop(error)
        for worker in self._workers:
            worker.connection.close()
        for job in (*self._jobs, *(worker.job for worker in self._workers if worker.job)):
            job.pending._fail(self._over)

    def _listen(self, connections: list[Connection], seconds: float | None = None) -> list:
        """Waits until a connection is ready, or `submit` or `_stop` wakes it; returns the ready ones."""
        heard = wait([self._woken, *connections], seconds)
        if self._woken in heard:
            self._woken.recv_bytes()
        return heard

    def _turn(self, server: _Server) -> None:
        """Gives idle workers an answer each, waits for events, and handles them."""
        for worker in self._workers:
            if worker.job is None and self._jobs:
                worker.begin(self._jobs.popleft(), **self._limits)
        deadline = min(worker.deadline for worker in self._workers)
        seconds = None if deadline == math.inf else max(0.0, deadline - time.monotonic())
        heard = self._listen([worker.connection for worker in self._workers], seconds)
        now = time.monotonic()
        for place, worker in enumerate(self._workers):
            spoke = worker.connection in heard
            if (spoke and not worker.finish()) or (not spoke and worker.deadline <= now):
                self._account(worker, server.end(worker), overdue=not spoke)
                self._workers[place] = server.fork()

    def _account(self, worker: _Worker, status: int, *, overdue: bool) -> None:
        """Counts a worker that has ended, and scores its answer or puts it back into the queue.

        Raises:
          RuntimeError: the worker ended during the reward's first call, and not by accident.
        """
        self.counters.restarts += 1
        job = worker.job
        if job is None:
            return
        died = not overdue and status != processes.OUT_OF_MEMORY
        if died:
            job.deaths += status != processes.RETIRED
            if job.deaths < ATTEMPTS:
                self._jobs.appendleft(job)
                return
        if not worker.warm:
            raise RuntimeError(self._first_call(status, overdue=overdue))
        self.counters.timeouts += overdue
        self.counters.memory_kills += not (overdue or died)
        job.pending.timeouts += overdue
        job.pending._set(job.index, 0.0)

    def _first_call(self, status: int, *, overdue: bool) -> str:
        """The error message for a reward's first call that failed: what happened, and what to do about it."""
        if overdue:
            limit = f"took more than warm_up, {self._limits['warm_up']:g} s; raise reward.warm_up, or load less in it"
        elif status == processes.OUT_OF_MEMORY:
            limit = f"needs more than {self._memory >> 20} MiB; raise reward.memory, or load it with the module"
        else:
            limit = f"ended {ATTEMPTS} workers, the last with status {status}; try it in a process of its own"
        return f"the reward function's first call in a worker {limit}"


def _pickled(reward: Reward) -> bytes:
    try:
        return pickle.dumps(reward)
    except Exception as error:  # of what is bound to it too, whose code may raise anything
        code = getattr(function_of(reward), "__code__", None)
        where = "" if code is None else f" ({code.co_filename}, line {code.co_firstlineno})"
        raise ValueError(
            f"the reward is {function_of(reward).__qualname__}{where}, which worker processes cannot import: {error}; "
            "it must be defined by def at the top level of its file, or be functools.partial of such a function"
        ) from None
