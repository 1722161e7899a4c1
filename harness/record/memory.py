"""Peak memory of this process."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path


def peak_bytes() -> int:
    """Largest resident size so far, or since `reset_peak` where the system has it."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def reset_peak() -> None:
    """Let `peak_bytes` count from now on; only Linux can (proc(5), clear_refs), elsewhere nothing happens."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
