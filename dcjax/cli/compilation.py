"""Compiled programs: cached on disk between processes, and reported while a slow one is compiled."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import stat
import sys
import threading
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import filelock
import jax

from dcjax.allocator import return_freed_memory

MAX_BYTES = 2**30
"""Size limit of the compilation cache; the programs that were least recently used are evicted first."""

REPORT_AFTER_SECONDS = 1.0
"""How long a program compiles before its compilation is reported."""

CHECKSUMS = "checksums.json"

_COMPILATION_EVENT = "/jax/core/compile/backend_compile_duration"
"""JAX's event for compiling a program or reading it from the cache: a scalar at its start, a duration at its end."""


def enable_compilation_cache() -> None:
    """Makes JAX store what it compiles in the user's cache folder, and read it from there in later processes.

    The folder is `cache_folder()`. If it cannot be used, or if others could write into it, one line says so and
    everything is compiled again. A folder that JAX has already (JAX_COMPILATION_CACHE_DIR) is left as it is, and so is
    a cache that was disabled (JAX_ENABLE_COMPILATION_CACHE=false).
    """
    settings: Any = jax.config
    if not settings.jax_enable_compilation_cache or settings.jax_compilation_cache_dir:
        return
    try:
        folder = cache_folder()
        _prepare_folder(folder)
    except (OSError, RuntimeError) as error:
        reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.strerror else error
        print(f"dcjax: compiled programs are not cached: {reason}", file=sys.stderr)
        return
    # A program that cannot be read is compiled again, so the warning is of no use.
    warnings.filterwarnings("ignore", message=".*persistent compilation cache")
    settings.update("jax_compilation_cache_max_size", MAX_BYTES)
    settings.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    settings.update("jax_compilation_cache_dir", str(folder))


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/dcjax/programs/KEY`, or the same under ~/.cache.

    JAX names each program by everything that it depends on. KEY adds the compiler's version and the CPU's features, so
    that different machines may share a home directory.
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    parts = (metadata.version("jaxlib"), platform.system(), platform.machine(), *_cpu_features())
    return Path(home) / "dcjax" / "programs" / hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _cpu_features() -> list[str]:
    """The instruction sets that the compiler may use, as Linux lists them; on other systems the CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return [platform.processor()]
    features = (line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features")))
    return sorted(next(features, [platform.processor()]))


def _prepare_folder(folder: Path) -> None:
    """Makes a folder that only its owner can write into, and removes damaged programs from it.

    Raises:
      OSError: it cannot be made or written into, or others can write into it.
      RuntimeError: its file system has no locks, or there is no home directory.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        # A cached program is machine code that will be executed.
        raise PermissionError(0, "others can write into it; it must be yours alone (chmod go-w)", str(folder))
    # JAX takes the same lock for each of its reads and writes.
    with filelock.FileLock(folder / ".lockfile", timeout=10):
        checksums = _remove_damaged_programs(folder)
        partial = folder / f"{CHECKSUMS}.{os.getpid()}"
        partial.write_text(json.dumps(checksums))
        partial.replace(folder / CHECKSUMS)


def _remove_damaged_programs(folder: Path) -> dict[str, int]:
    """Removes the programs of a folder that are damaged, and returns the checksums of the others by file name.

    JAX writes the time of a program's last use after the program itself, so a program without that time is incomplete.
    A program is damaged, too, if its checksum is not the one that it had when it was first seen here.
    """
    try:
        known = json.loads((folder / CHECKSUMS).read_text())
    except (OSError, ValueError):
        known = {}
    known = known if isinstance(known, dict) else {}
    intact = {}
    for program in folder.glob("*-cache"):
        last_use = program.with_name(program.name.removesuffix("-cache") + "-atime")
        checksum = zlib.crc32(program.read_bytes())
        if last_use.exists() and last_use.stat().st_size and known.get(program.name, checksum) == checksum:
            intact[program.name] = checksum
        else:
            program.unlink()
            last_use.unlink(missing_ok=True)
    return intact


@contextlib.contextmanager
def report_slow_compilations(stream: TextIO | None = None) -> Iterator[None]:
    """Reports each program that compiles for longer than `REPORT_AFTER_SECONDS`: "compiling decode … 31 s".

    A program of the main thread is reported while it compiles, one of another thread when it is done. Each has a line
    of its own, above any progress bars.

    Args:
      stream: where to write; standard error if None.
    """
    reporter = _CompilationReporter(sys.stderr if stream is None else stream)

    def on_start(event: str, value: float, **details) -> None:
        if event == _COMPILATION_EVENT:
            reporter.start(_readable_name(str(details.get("fun_name", "a program"))))

    def on_end(event: str, duration_secs: float, **details) -> None:
        if event == _COMPILATION_EVENT:
            reporter.end(duration_secs)
            if duration_secs >= REPORT_AFTER_SECONDS:
                # the compiler takes hundreds of megabytes, and the program runs next
                return_freed_memory()

    jax.monitoring.register_scalar_listener(on_start)
    jax.monitoring.register_event_duration_secs_listener(on_end)
    try:
        yield
    finally:
        jax.monitoring.unregister_scalar_listener(on_start)
        jax.monitoring.unregister_event_duration_listener(on_end)


def _readable_name(name: str) -> str:
    """jit(train_step) -> train step."""
    return name.removeprefix("jit(").removesuffix(")").strip("_").replace("_", " ")


class _CompilationReporter:
    """Writes the lines of `report_slow_compilations`; each thread compiles one program at a time."""

    def __init__(self, stream: TextIO):
        self._stream, self._lock = stream, threading.Lock()
        # By thread: the text of the program that it compiles, and the function that completes the program's line.
        self._compiling: dict[int, str] = {}
        self._complete_line: dict[int, Callable[[float], None]] = {}
        # Lines about other threads' programs that wait until no line is incomplete.
        self._waiting: deque[str] = deque()

    def start(self, name: str) -> None:
        """The current thread begins to compile a program."""
        thread, text = threading.current_thread(), f"compiling {name} …"
        with self._lock:
            self._compiling[thread.ident or 0] = text
        if thread is threading.main_thread():
            timer = threading.Timer(REPORT_AFTER_SECONDS, self._begin_line, (thread.ident, text))
            timer.daemon = True
            timer.start()

    def end(self, seconds: float) -> None:
        """The current thread has compiled its program."""
        thread = threading.get_ident()
        with self._lock:
            text = self._compiling.pop(thread, None)
            if (complete := self._complete_line.pop(thread, None)) is not None:
                complete(seconds)
            elif text is not None and seconds >= REPORT_AFTER_SECONDS:
                self._waiting.append(f"{text} {seconds:.0f} s")
            while self._waiting and not self._complete_line:
                self._write_line(self._waiting.popleft())

    def _begin_line(self, thread: int, text: str) -> None:
        """Begins the line of a program, unless the program has been compiled by now."""
        with self._lock:
            if self._compiling.get(thread) == text and thread not in self._complete_line:
                begin = self._begin_on_terminal if self._stream.isatty() else self._begin_in_file
                self._complete_line[thread] = begin(text)

    def _begin_in_file(self, text: str) -> Callable[[float], None]:
        self._write(text)
        return lambda seconds: self._write(f" {seconds:.0f} s\n")

    def _begin_on_terminal(self, text: str) -> Callable[[float], None]:
        """Draws the text below the progress bars, which may move; its completed line is printed above them."""
        from tqdm import tqdm

        drawn = tqdm(bar_format="{desc}", desc=text, leave=False, file=self._stream)

        def complete(seconds: float) -> None:
            drawn.close()
            self._write_line(f"{text} {seconds:.0f} s")

        return complete

    def _write_line(self, line: str) -> None:
        if self._stream.isatty():
            from tqdm import tqdm

            tqdm.write(line, file=self._stream)
        else:
            self._write(f"{line}\n")

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
