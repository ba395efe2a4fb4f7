"""The C library's memory allocator, as training wants it."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_BLOCK = 32 << 20  # the largest that glibc keeps in its heap


def keep_freed_memory() -> bool:
    """Have glibc keep what this process frees, for its next step; whether it does (elsewhere than on glibc nothing is done).

    By default the heap's end and large blocks go back to the system when they are freed. A training step frees and takes tens of MiB,
    and each page that it takes anew is a fault in which the system clears it.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # no glibc
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)) and bool(mallopt(_M_MMAP_THRESHOLD, _BLOCK))
