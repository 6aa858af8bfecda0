"""The C library's heap, set up for a process that asks for the same large blocks at every step."""

from __future__ import annotations

import contextlib
import ctypes

# glibc's numbers of the two settings, and the largest value that they take
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
    """Makes freed blocks stay in the process, where the next step finds them without page faults.

    XLA on CPU allocates a program's temporaries anew in every call. By default glibc hands large blocks back to the
    system at once, and a fifth of a training step goes into faulting them in again. Other C libraries are left as
    they are.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, LARGEST)
