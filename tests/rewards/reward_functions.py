"""What the pool's tests have workers do; the text says it, and the gold answer with what."""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

KEPT = []


def length(text: str, gold: str, *, finished: bool) -> float:
    return float(len(text) + 10 * len(gold)) * finished


def obey(text: str, gold: str, *, finished: bool) -> float:
    return float({"length": lambda gold: len(gold), **DEEDS}[text](gold) or 0.0)


def sleep(seconds: str) -> None:
    time.sleep(float(seconds))


def spin_in_c(_: str) -> None:
    """Holds the interpreter's lock, and cannot be interrupted from within the process."""
    ctypes.PyDLL(None).sleep(60)


def ignore_signals(_: str) -> None:
    for number in {signal.SIGTERM, signal.SIGINT, signal.SIGALRM}:
        signal.signal(number, signal.SIG_IGN)
    time.sleep(60)


def number(written: str) -> float:
    return float(written)


def allocate(size: str) -> int:
    return len(bytearray(int(size)))


def keep(size: str) -> int:
    KEPT.append(b"x" * int(size))
    return os.getpid()


def die(_: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave(status: str) -> None:
    os._exit(int(status))


def die_at_first(path: str) -> float:
    if not Path(path).exists():
        Path(path).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return 1.0


def say_process(path: str) -> float:
    """Writes its process id and hangs, the first time."""
    if not Path(path).exists():
        Path(path).write_text(str(os.getpid()))
        time.sleep(60)
    return 1.0


def error(message: str) -> None:
    raise KeyError(message)


def end_python(message: str) -> None:
    raise SystemExit(message)


def process(_: str) -> int:
    return os.getpid()


def jax_is_imported(_: str) -> bool:
    return "jax" in sys.modules or "__main__.py" in str(getattr(sys.modules["__main__"], "__file__", ""))


def slow_at_first(text: str, gold: str, *, finished: bool) -> float:
    """Takes as many seconds as its gold says, once in a process; then 1.0 for any answer but `hang`."""
    if not KEPT:
        KEPT.append(b"loaded")
        time.sleep(float(gold))
    if text == "hang":
        time.sleep(60)
    return 1.0


def large_at_first(text: str, gold: str, *, finished: bool) -> float:
    KEPT.append(b"x" * int(gold))
    return 1.0


def dies_at_first(text: str, gold: str, *, finished: bool) -> float:
    os._exit(int(gold))


DEEDS = {
    deed.__name__: deed
    for deed in (
        *(sleep, spin_in_c, ignore_signals, allocate, keep, die, leave, die_at_first, say_process, error, end_python),
        *(process, jax_is_imported, number),
    )
}
