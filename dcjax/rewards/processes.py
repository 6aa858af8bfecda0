"""The processes that run a reward function: a server that imports it once, and the workers it forks.

`RewardPool` starts the server as `python -m dcjax.rewards.processes FD`, where FD is its end of a pipe. The server
scores no answer, so it always responds. Its workers are its children: it alone kills and reaps them, so that no process
id is used twice meanwhile, and it ends them when the pipe closes, which happens however the pool's process ends.

Each worker has a pipe of its own to the pool. Processes that handle hostile text are not trusted: replies are never
pickled.
"""

from __future__ import annotations

import gc
import inspect
import json
import os
import pickle
import reprlib
import resource
import signal
import struct
import sys
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from pathlib import Path
from typing import Any, cast

from dcjax.user_code import failure, function_of

Score = float | dict[str, float]
"""The reward of a response, or the named parts whose sum it is."""
Reward = Callable[..., float | Mapping[str, float]]
"""Any picklable function (text, gold, *, finished) -> a number, or numbers by the names of the reward's parts.

text: the response, without special tokens; gold: the right answer; finished: whether the end token was generated. One
that also takes keywords of `KNOWN` is told them: prompt, the text that was continued, and record, what else the problem
came with. The reward is the sum of its parts, of which `CORRECT`, if there is one, is what accuracies count.
"""
KNOWN = ("prompt", "record")
"""What a reward may ask for beside its arguments, by the names of a problem's members."""
CORRECT = "correct"
"""The part of a reward that says whether the answer is right."""
MOST_PARTS = 32
"""Of a reward."""

# rare ones: a reward may exit by itself, with 0 or a small number
RETIRED = 93
"""Exit status of a worker that has grown and ends after its reply, so that what SymPy keeps fails no answer."""
OUT_OF_MEMORY = 94
"""Exit status of a worker whose answer needs more memory than it may have."""

FORK = "fork"
SCORE, RAISED, WARM = b"=", b"!", b"~"
"""The first byte of a reply: the score in JSON follows, or `describe`, or nothing when the first call is over."""
FLOAT64 = struct.Struct("d")
LARGEST = (2 - 2**-23) * 2.0**127  # of float32


def serve(control: Connection) -> None:
    """Answers the pool's requests until its end of the pipe closes.

    First come the files of users that the reward is defined in, the name of its module, the pickled reward and the
    memory that an answer may take (`work`); the reply is empty, or what failed: its `failure` in the first line, and
    the traceback. Then `FORK`, followed by the worker's end of its pipe, is answered by a process id; a process id ends
    that worker if it still runs, and is answered by its exit status (negative for a signal).
    """
    files, module_name, pickled, memory = control.recv()
    failed, reward = "", cast(Reward, None)
    try:
        for file in files:
            file.load()
        reward = pickle.loads(pickled)
        if verifier := sys.modules.get("dcjax.rewards.verify"):
            verifier.warm_up()
    except BaseException as error:
        failed = f"{failure(error, module_name)}\n{traceback.format_exc()}"
    gc.freeze()  # a worker's collections would copy every page that holds an object
    children: set[int] = set()
    try:
        control.send(failed)
        while True:
            request = control.recv()
            if request == FORK:
                child = _fork(control, reward, memory)
                children.add(child)
                control.send(child)
            else:
                children.remove(request)
                control.send(_end(request))
    except (EOFError, OSError):
        for child in children:
            _end(child)


def _fork(control: Connection, reward: Reward, memory: int) -> int:
    """The process id of a new worker."""
    handle = recv_handle(control)
    child = os.fork()
    if child:
        os.close(handle)
        return child
    status, pool = 1, Connection(handle)  # held until the process ends: once it closes, the pool asks for the status
    try:
        control.close()
        status = work(pool, reward, memory)
    except BaseException:
        traceback.print_exc()
    os._exit(status)


def _end(child: int) -> int:
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def work(pool: Connection, reward: Reward, memory: int) -> int:
    """Scores answers until the pool's end of the pipe closes or memory grows short; returns the exit status.

    Before the first answer the reward is called with that answer's gold as the response, and the reply is `WARM`: what
    the reward loads in that call counts towards the worker's own memory, and not towards the answer's time.

    Args:
      pool: the connection that gives (text, gold, finished, what else is known), and takes replies.
      reward: the reward function.
      memory: bytes of address space that the first call may add to those which the reward's imports take, and that
        answers may add to those which the first call leaves.
    """
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_AS, _address_space() + memory, for_good=False)
    try:
        text, gold, finished, known = pool.recv()
        _reply(reward, f"\\boxed{{{gold}}}\nAnswer: {gold}", gold, True, known)
        pool.send_bytes(WARM)
        own = _address_space()
        _limit(resource.RLIMIT_AS, own + memory)
        pool.send_bytes(_reply(reward, text, gold, finished, known))
        while _address_space() - own <= memory // 2:
            pool.send_bytes(_reply(reward, *pool.recv()))
    except MemoryError:
        return OUT_OF_MEMORY
    except (EOFError, OSError):
        pass
    return RETIRED


def _limit(which: int, value: int, *, for_good: bool = True) -> None:
    hard = resource.getrlimit(which)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value if for_good else hard))


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def asked_for(reward: Reward) -> tuple[str, ...]:
    """Those of `KNOWN` that a reward takes as keywords."""
    try:
        parameters = inspect.signature(reward).parameters
    except (TypeError, ValueError):  # a function without one, such as some built-in ones
        return ()
    return tuple(name for name in KNOWN if name in parameters)


def score(reward: Reward, text: str, gold: str, finished: bool, known: Mapping[str, Any]) -> Score:
    """The reward of a response, or its parts.

    Raises:
      TypeError: it is neither a number nor numbers by name.
      ValueError: a number, or the sum of the parts, is not finite in float32; or there is no part, or too many.
    """
    value = reward(text, gold, finished=finished, **known)
    if not isinstance(value, Mapping):
        return _finite("the reward", value, gold)
    if not 1 <= len(value) <= MOST_PARTS:
        raise ValueError(f"the reward has {len(value)} parts, for gold {gold!r}; it must have 1 to {MOST_PARTS}")
    for name in value:
        if not (isinstance(name, str) and name.isidentifier()):
            raise TypeError(
                f"a part of the reward is called {name!r}; its name must be an identifier, like {CORRECT!r}"
            )
    parts = {name: _finite(f"the reward's part {name!r}", part, gold) for name, part in value.items()}
    _finite("the reward", sum(parts.values()), gold)
    return parts


def _finite(what: str, value: Any, gold: str) -> float:
    try:
        (number,) = FLOAT64.unpack(FLOAT64.pack(value))
        is_number = getattr(value, "shape", ()) == ()
    except (struct.error, TypeError):
        number, is_number = 0.0, False
    if not is_number:
        found = f"{reprlib.repr(value)}, a {type(value).__name__}"
        raise TypeError(f"{what} is {found}, for gold {gold!r}; it must be a finite number")
    if not abs(number) <= LARGEST:
        raise ValueError(f"{what} is {number}, for gold {gold!r}; it must be a finite number")
    return number


def read_score(told: bytes) -> Score:
    """The score in a worker's reply, which is not trusted.

    Raises:
      ValueError: it is none.
    """
    score = json.loads(told)
    parts = score.values() if isinstance(score, dict) else [score]
    if not (1 <= len(parts) <= MOST_PARTS and all(type(part) is float and abs(part) <= LARGEST for part in parts)):
        raise ValueError("no score")
    return score


def describe(error: BaseException, reward: Reward) -> str:
    """What a reward function raised: its `failure` in the first line, and the traceback in the others."""
    function: Any = function_of(reward)
    told = failure(error, str(function.__module__), getattr(function, "__code__", None))
    return f"{told}\n{''.join(traceback.format_exception(error))}"


def _reply(reward: Reward, text: str, gold: str, finished: bool, known: Mapping[str, Any]) -> bytes:
    try:
        return SCORE + json.dumps(score(reward, text, gold, finished, known)).encode()
    except MemoryError:
        raise
    except BaseException as error:
        return RAISED + describe(error, reward).encode(errors="backslashreplace")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent to the whole job, where the pool's process saves and ends
    serve(Connection(int(sys.argv[1])))
