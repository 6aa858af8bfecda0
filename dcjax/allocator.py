"""The C library's allocator, configured for a process that allocates the same blocks at every step."""

from __future__ import annotations

import contextlib
import ctypes

# glibc's numbers of mallopt parameters, and the largest value of an int.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
INT_MAX = 2**31 - 1
LARGE = 2**25
"""The largest blocks that are kept (bytes); glibc allows no larger number here."""


def keep_freed_memory() -> None:
    """Keeps freed blocks in the process, up to 32 MiB each, so that the next step reuses them without page faults.

    XLA on CPU allocates a program's temporaries in every call. By default glibc returns its larger blocks to the system
    as soon as they are freed, and a fifth of a small model's training step is spent on the page faults of allocating
    them again. Blocks above 32 MiB are those of large models, where these faults cost little and what one phase of a
    run has freed is missed in the next; they go back to the system. All threads take their blocks from one arena, since
    what one has freed is then there for the others. Other C libraries are left as they are.
    """
    _call("mallopt", M_MMAP_THRESHOLD, LARGE)
    _call("mallopt", M_TRIM_THRESHOLD, INT_MAX)
    _call("mallopt", M_ARENA_MAX, 1)


def return_freed_memory() -> None:
    """Returns what is free to the system, for a phase that needs blocks of other sizes; only where it is glibc's."""
    _call("malloc_trim", 0)


def _call(function: str, *numbers: int) -> None:
    """Calls a function of glibc; nothing happens where the C library is another one."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        getattr(ctypes.CDLL(None), function)(*numbers)
