"""A reward function in worker processes, with hard limits on an answer's time and memory."""

from __future__ import annotations

import math
import os
import pickle
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import send_handle

import numpy as np
from jaxtyping import Bool, Float32

from dcjax.rewards import processes
from dcjax.rewards.processes import Reward
from dcjax.user_code import code_files_in

PATIENCE = 10.0
"""Seconds for the server to end; it takes them only where the reward's module hangs at its import."""

ATTEMPTS = 2
"""Workers that may die of unknown cause on one answer before it is taken for the cause."""


class RewardError(RuntimeError):
    """The reward function raised on an answer.

    Attributes:
      answer: its number among those that were submitted together.
      told: what it raised, the traceback's last line.
    """

    def __init__(self, answer: int, traceback: str):
        super().__init__(f"the reward function raised on answer {answer}:\n{traceback}")
        self.answer, self.told = answer, traceback.strip().splitlines()[-1]


@dataclass
class Counters:
    """What a pool has seen since it was entered."""

    # workers killed because an answer took too long, and workers that ran out of memory on one: both score 0
    timeouts: int = 0
    memory_kills: int = 0
    # workers replaced, for these and all other reasons
    restarts: int = 0


class Pending:
    """The scores of one `RewardPool.submit`, when they are there."""

    def __init__(self, size: int):
        self.timeouts = 0
        """Answers that took too long so far; all of them once there is a result."""
        self._scores = np.zeros(size, np.float32)
        self._left = size
        self._tracebacks: dict[int, str] = {}
        self._failure: Exception | None = None
        self._over = threading.Event()
        if not size:
            self._over.set()

    @classmethod
    def of(cls, scores: Sequence[float | Exception]) -> Pending:
        """Scores that are there already, and what was raised in place of others."""
        pending = cls(len(scores))
        for index, score in enumerate(scores):
            if isinstance(score, Exception):
                pending._set_error(index, "".join(traceback.format_exception(score)))
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
        if self._tracebacks:
            first = min(self._tracebacks)
            raise RewardError(first, self._tracebacks[first])
        return self._scores

    def _set(self, index: int, score: float) -> None:
        self._scores[index] = score
        self._left -= 1
        if not self._left:
            self._over.set()

    def _set_error(self, index: int, raised: str) -> None:
        self._tracebacks[index] = raised
        self._set(index, 0.0)

    def _fail(self, failure: Exception | None) -> None:
        self._failure = failure
        self._over.set()


@dataclass(eq=False)
class _Job:
    """One answer to score."""

    pending: Pending
    index: int
    answer: tuple[str, str, bool]
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
        with suppress(OSError):  # it has just died, and will be heard of
            self.connection.send(job.answer)

    def finish(self) -> bool:
        """Takes its reply; False where it died instead."""
        try:
            reply = self.connection.recv_bytes()
        except (EOFError, OSError):
            return False
        job = self.job
        if job is None:  # nobody asked it
            return False
        if reply == processes.WARM:
            self.warm, self.deadline = True, time.monotonic() + self._timeout
            return True
        if reply.startswith(processes.SCORE):
            job.pending._set(job.index, *processes.FLOAT64.unpack(reply[1:]))
        else:
            job.pending._set_error(job.index, reply[1:].decode())
        self.job, self.deadline = None, math.inf
        return True


class _Server:
    """The process that forks workers, from here."""

    def __init__(self, pickled: bytes, memory: int):
        self.control, theirs = Pipe()
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", processes.__name__, str(theirs.fileno())],
            # sets of SymPy's are ordered by hashes, so verdicts could depend on them
            env=os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": "0"},
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # an interrupt from the terminal is the pool's to handle
        )
        theirs.close()
        self.control.send((code_files_in(pickled), pickled, memory))

    def check(self) -> None:
        """Raises RuntimeError if the reward could not be imported."""
        if failure := self.control.recv():
            raise RuntimeError(f"workers cannot import the reward function:\n{failure}")

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
        """Ends it and the workers."""
        self.control.close()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class RewardPool:
    """Scores answers in worker processes; a context manager.

    Workers are forked from a server process that has imported the reward function's module and no more of the program,
    neither its `__main__` nor JAX; that takes seconds, meanwhile the pool takes answers. Scores do not depend on the
    number of workers, nor on what each has scored before, as long as honest answers stay far from the limits.

    Each worker calls the reward once before its first answer, with a response that is the gold answer, in a box and on
    an answer line, and whatever comes of it: what the reward loads at its first call is not in any answer's time.

    An answer at which a worker exceeds a limit scores 0, and the worker is replaced. Where a worker dies otherwise,
    killed from outside perhaps, its answer is tried once more, and scores 0 if that worker dies too.

    Args:
      reward: a picklable function of an importable module.
      workers: processes; no more than there are cores, since time-outs are by the clock.
      timeout: seconds that one answer may take.
      memory: bytes of address space that answers may add to a worker's own (Linux); the first call likewise.
      warm_up: seconds that the reward's first call in a worker may take; where it takes more, the pool is over.

    Raises:
      ValueError: a setting out of range, or a reward that workers could not import.
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
        self._pickled = pickle.dumps(reward)
        if b"__main__" in self._pickled:
            raise ValueError(
                f"reward is {reward!r} of `__main__`, which workers do not import; give it a module of its own"
            )
        self.counters = Counters()
        self._size, self._memory = workers, memory
        self._limits = {"timeout": timeout, "warm_up": warm_up}
        self._jobs: deque[_Job] = deque()
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()  # of what submit and the dispatcher's end both touch
        self._over: Exception | None = RuntimeError("the pool was not entered")
        self._woken, self._waker = Pipe(duplex=False)
        self._dispatcher = threading.Thread(target=self._dispatch, name="rewards", daemon=True)

    def __enter__(self) -> RewardPool:
        self._over = None
        self._dispatcher.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Ends all processes; what is not scored by then is not scored any more."""
        self._stop(RuntimeError("the pool was closed"))
        self._dispatcher.join()
        self._waker.close()
        self._woken.close()

    def submit(
        self, texts: Sequence[str], golds: Sequence[str], finished: Sequence[bool] | Bool[np.ndarray, "N"]
    ) -> Pending:
        """Begins to score answers, after those submitted before, and returns at once.

        Args:
          texts: N responses.
          golds: their N right answers.
          finished: whether each response's end token was generated.

        Raises:
          ValueError: the lengths differ.
          RuntimeError: the pool is not open, or its processes could not be started.
        """
        if not len(texts) == len(golds) == len(finished):
            raise ValueError(
                f"{len(texts)} texts, {len(golds)} golds and {len(finished)} finished; give as many of each"
            )
        pending = Pending(len(texts))
        answers = zip(texts, golds, map(bool, finished), strict=True)
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
        """What the thread does: starts the processes, and hands out answers until the pool is over."""
        try:
            with closing(_Server(self._pickled, self._memory)) as server:
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
        """Which of the connections have something, once one does or `submit` or `_stop` wakes it."""
        heard = wait([self._woken, *connections], seconds)
        if self._woken in heard:
            self._woken.recv_bytes()
        return heard

    def _turn(self, server: _Server) -> None:
        """Gives the idle something to do, waits until something happens, and sees to it."""
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
        """Counts a worker that is gone, and scores its answer or puts it back.

        Raises:
          RuntimeError: it went at the reward's first call, and not by an accident.
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
        """What became of the reward's first call in a worker that is gone, and what to do about it."""
        if overdue:
            limit = f"took more than warm_up, {self._limits['warm_up']:g} s; raise reward.warm_up, or load less in it"
        elif status == processes.OUT_OF_MEMORY:
            limit = f"needs more than {self._memory >> 20} MiB; raise reward.memory, or load it with the module"
        else:
            limit = f"ended {ATTEMPTS} workers, the last with status {status}; try it in a process of its own"
        return f"the reward function's first call in a worker {limit}"
