"""Compiled programs: kept between processes, and told of while they are made."""

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

MAX_BYTES = 2**30
"""What all programs that are kept may take together; those that were not used for longest go first."""

SILENT = 1.0
"""Seconds that a program compiles before anything is told of it."""

CHECKSUMS = "checksums.json"

_COMPILATION = "/jax/core/compile/backend_compile_duration"
"""JAX tells of compiling a program, or of reading it from the cache: a scalar at its start, a duration at its end."""


def keep_programs() -> None:
    """Has JAX keep what it compiles in the user's cache folder, for this and later processes.

    The folder is `$XDG_CACHE_HOME/dcjax/programs/KEY`, in ~/.cache where that is not set. JAX names each program by
    what it depends on; KEY adds the version of the compiler and the features of the CPU, so that different machines
    may share a home. Where the folder cannot be used, or others could write into it, one line says so, and everything
    is compiled anew. Where JAX already has a folder (JAX_COMPILATION_CACHE_DIR), or is to have none
    (JAX_ENABLE_COMPILATION_CACHE=false), that is left as it is.
    """
    settings: Any = jax.config
    if not settings.jax_enable_compilation_cache or settings.jax_compilation_cache_dir:
        return
    try:
        folder = programs_folder()
        _prepare(folder)
    except (OSError, RuntimeError) as error:
        reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.strerror else error
        print(f"dcjax: compiled programs are not kept: {reason}", file=sys.stderr)
        return
    # a program that cannot be read is compiled again
    warnings.filterwarnings("ignore", message=".*persistent compilation cache")
    settings.update("jax_compilation_cache_max_size", MAX_BYTES)
    settings.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    settings.update("jax_compilation_cache_dir", str(folder))


def programs_folder() -> Path:
    """Where programs of this machine's kind and this compiler are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    parts = (metadata.version("jaxlib"), platform.system(), platform.machine(), *_cpu_features())
    return Path(home) / "dcjax" / "programs" / hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _cpu_features() -> list[str]:
    """What the compiler may use of this CPU, as Linux tells it; elsewhere the CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return [platform.processor()]
    told = (line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features")))
    return sorted(next(told, [platform.processor()]))


def _prepare(folder: Path) -> None:
    """Makes a folder that only its owner can write into, and takes damaged programs out of it.

    Raises:
      OSError: it cannot be made or written into, or is open to others.
      RuntimeError: its file system has no locks, or there is no home for it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        # a program is machine code, and is run
        raise PermissionError(0, "others can write into it; it must be yours alone (chmod go-w)", str(folder))
    # the lock that JAX takes around each of its reads and writes
    with filelock.FileLock(folder / ".lockfile", timeout=10):
        checksums = _sound(folder)
        written = folder / f"{CHECKSUMS}.{os.getpid()}"
        written.write_text(json.dumps(checksums))
        written.replace(folder / CHECKSUMS)


def _sound(folder: Path) -> dict[str, int]:
    """Checksums of the programs in a folder, those that are damaged being removed.

    JAX writes when a program was last used behind the program itself, so one without that is half-written. And each has
    to be what it was when it was first seen here.
    """
    try:
        known = json.loads((folder / CHECKSUMS).read_text())
    except (OSError, ValueError):
        known = {}
    known = known if isinstance(known, dict) else {}
    sound = {}
    for path in folder.glob("*-cache"):
        used = path.with_name(path.name.removesuffix("-cache") + "-atime")
        checksum = zlib.crc32(path.read_bytes())
        if used.exists() and used.stat().st_size and known.get(path.name, checksum) == checksum:
            sound[path.name] = checksum
        else:
            path.unlink()
            used.unlink(missing_ok=True)
    return sound


@contextlib.contextmanager
def told_of(stream: TextIO | None = None) -> Iterator[None]:
    """Tells of each program that takes longer than `SILENT` to compile, while it does: "compiling decode … 31 s".

    Each stands on a line of its own, on standard error where no stream is given; bars that are drawn there stay below.
    Of what threads compile beside the main one, it is told when it is done.
    """
    told = _Told(sys.stderr if stream is None else stream)

    def began(event: str, value: float, **about) -> None:
        if event == _COMPILATION:
            told.began(_readable(str(about.get("fun_name", "a program"))))

    def ended(event: str, duration_secs: float, **about) -> None:
        if event == _COMPILATION:
            told.ended(duration_secs)

    jax.monitoring.register_scalar_listener(began)
    jax.monitoring.register_event_duration_secs_listener(ended)
    try:
        yield
    finally:
        jax.monitoring.unregister_scalar_listener(began)
        jax.monitoring.unregister_event_duration_listener(ended)


def _readable(name: str) -> str:
    """jit(train_step) -> train step."""
    return name.removeprefix("jit(").removesuffix(")").strip("_").replace("_", " ")


class _Told:
    """What `told_of` has to say; each thread compiles one program at a time."""

    def __init__(self, stream: TextIO):
        self._stream, self._lock = stream, threading.Lock()
        # by thread: its program, and what ends the line that tells of it
        self._under_way: dict[int, str] = {}
        self._open: dict[int, Callable[[float], None]] = {}
        # what is still to be told of programs that are done
        self._done: deque[str] = deque()

    def began(self, name: str) -> None:
        thread = threading.current_thread()
        with self._lock:
            self._under_way[thread.ident or 0] = f"compiling {name} …"
        if thread is threading.main_thread():
            timer = threading.Timer(SILENT, self._tell, (thread.ident, f"compiling {name} …"))
            timer.daemon = True
            timer.start()

    def ended(self, seconds: float) -> None:
        thread = threading.get_ident()
        with self._lock:
            line = self._under_way.pop(thread, None)
            if (end := self._open.pop(thread, None)) is not None:
                end(seconds)
            elif line is not None and seconds >= SILENT:
                self._done.append(f"{line} {seconds:.0f} s")
            # a line that is begun is ended first
            while self._done and not self._open:
                self._tell_at_once(self._done.popleft())

    def _tell(self, thread: int, line: str) -> None:
        """Begins a line, unless its program is done by now."""
        with self._lock:
            if self._under_way.get(thread) == line and thread not in self._open:
                self._open[thread] = (self._draw if self._stream.isatty() else self._write)(line)

    def _write(self, line: str) -> Callable[[float], None]:
        self._put(line)
        return lambda seconds: self._put(f" {seconds:.0f} s\n")

    def _put(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()

    def _draw(self, line: str) -> Callable[[float], None]:
        """On a terminal, where a bar may be drawn and has to move: a line below it, which ends up above it."""
        from tqdm import tqdm

        drawn = tqdm(bar_format="{desc}", desc=line, leave=False, file=self._stream)

        def end(seconds: float) -> None:
            drawn.close()
            self._tell_at_once(f"{line} {seconds:.0f} s")

        return end

    def _tell_at_once(self, line: str) -> None:
        if not self._stream.isatty():
            self._put(f"{line}\n")
            return
        from tqdm import tqdm

        tqdm.write(line, file=self._stream)
