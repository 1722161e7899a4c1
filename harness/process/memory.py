"""Memory of this process."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from contextlib import suppress
from pathlib import Path


def peak_bytes() -> int:
    """Largest resident size so far; since `reset_peak` on Linux."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def reset_peak() -> None:
    """Let `peak_bytes` count from now on. Only Linux can (proc(5), clear_refs); elsewhere this does nothing."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def return_freed() -> None:
    """Give freed memory back to the system, after a large piece of work that is not repeated. glibc only."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
