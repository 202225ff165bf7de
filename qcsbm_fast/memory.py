"""The process's memory: what it keeps when it is freed, what a piece of work takes at most, how much there is."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path

import torch

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


def peak_memory(run: Callable[[], object], device: torch.device | None = None) -> int | None:
    """Bytes by which the process, or `device` if it is a GPU, grows at most during one run; None where the system does
    not tell."""
    gc.collect()
    if device is not None and device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    clear = Path("/proc/self/clear_refs")
    if not os.access(clear, os.W_OK):
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)
    clear.write_text("5")  # the peak starts anew
    before = _kilobytes("/proc/self/status", "VmRSS")
    run()
    return 1024 * (_kilobytes("/proc/self/status", "VmHWM") - before)


def available_memory(device: torch.device) -> int | None:
    """Bytes that the process can still have on `device`: of the machine's free memory what its control group allows."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if not Path("/proc/meminfo").exists():
        return None
    free = 1024 * _kilobytes("/proc/meminfo", "MemAvailable")
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        paths = [Path("/sys/fs/cgroup") / name for name in (limit, used)]
        if all(path.exists() for path in paths):
            limit, used = (path.read_text().strip() for path in paths)
            free = min(free, int(limit) - int(used)) if limit.isdecimal() else free
    return free


def _kilobytes(path: str, field: str) -> int:
    lines = Path(path).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
