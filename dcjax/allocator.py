"""The C library's allocator, configured for a process that allocates the same blocks at every step."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

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
    with _glibc() as library:
        library.mallopt(M_MMAP_THRESHOLD, LARGE)
        library.mallopt(M_TRIM_THRESHOLD, INT_MAX)
        library.mallopt(M_ARENA_MAX, 1)


def return_freed_memory() -> None:
    """Returns what is free to the system, for a phase that needs blocks of other sizes. Takes milliseconds."""
    with _glibc() as library:
        library.malloc_trim(0)


@contextlib.contextmanager
def _glibc() -> Iterator[Any]:
    """The C library; where it is another one, nothing is done."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        yield ctypes.CDLL(None)
