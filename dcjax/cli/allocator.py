"""The C library's allocator, configured for a process that allocates the same large blocks at every step."""

from __future__ import annotations

import contextlib
import ctypes

# glibc's numbers of two mallopt parameters, and the largest value of an int.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
INT_MAX = 2**31 - 1


def keep_freed_memory() -> None:
    """Keeps freed blocks in the process, so that the next step reuses them without page faults.

    XLA on CPU allocates a program's temporaries in every call. By default glibc returns large blocks to the system as
    soon as they are freed, and a fifth of a training step is spent on the page faults of allocating them again. Other
    C libraries are left as they are.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, INT_MAX)
