"""Freed memory stays with the process, so that a step's large tensors do not cost page faults again and again."""

from __future__ import annotations

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Tells the C library to keep freed memory for later allocations; whether it does.

    glibc maps every allocation above some megabytes anew and hands the top of its heap back when it is free: each
    training step then touches fresh zeroed pages, a twentieth of its time on a CPU. The command line calls this; a
    library has no business to do it behind its user's back. The environment's `MALLOC_*` settings win; elsewhere than
    in glibc nothing happens.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    return bool(mallopt and mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
