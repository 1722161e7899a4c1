"""Runs compiled kernels on the threads that torch computes with.

A second pool of threads would compete with torch's for the cores, since OpenMP workers spin for milliseconds after each
torch operation. So torch's own OpenMP team does the work, through `GOMP_parallel`, which the GNU, LLVM and Intel
runtimes export. Where torch has no such runtime (macOS), ordinary threads do the same work. Numba's own
threading layers are not used: `omp` loads a second OpenMP runtime, `workqueue` must not be entered from two threads.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

ITEMS_PER_THREAD = 8
"""Pieces of a kernel's work per thread: enough for the threads to finish at about the same time."""


@lru_cache
def _openmp() -> Any | None:
    """The entry point of torch's OpenMP runtime, or None if it has none."""
    for library in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        path = Path(torch.__file__).parent / "lib" / library
        if path.exists():
            start = getattr(ctypes.CDLL(str(path)), "GOMP_parallel", None)
            if start is not None:
                start.argtypes, start.restype = [_BODY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
                return start
    return None


@lru_cache(maxsize=1)
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="harness-ops")


def run(items: int, work: Callable[[int], object]) -> None:
    """Call `work(0) … work(items − 1)`, each once, on torch's threads. `work` must release the GIL where it matters
    (compiled kernels, torch operations) and its results must not depend on the order. Raises what `work` raises."""
    team = min(torch.get_num_threads(), items)
    if team <= 1:
        for item in range(items):
            work(item)
        return
    claimed = itertools.count()  # next() is atomic
    errors: list[BaseException] = []

    def body(_: object = None) -> None:
        try:
            while not errors and (item := next(claimed)) < items:
                work(item)
        except BaseException as error:  # must not cross the C frame below; the caller raises it again
            errors.append(error)

    start = _openmp()
    if start is not None:
        start(_BODY(body), None, team, 0)
    else:
        for future in [_threads(team).submit(body) for _ in range(team)]:
            future.result()
    if errors:
        raise errors[0]


def cuts(total: int, smallest: int = 1) -> list[tuple[int, int]]:
    """[0, total) as ranges of at least `smallest` (the last may be shorter), enough for the team to share evenly."""
    wanted = max(1, ITEMS_PER_THREAD * torch.get_num_threads())
    size = max(smallest, -(-total // wanted))
    return [(begin, min(begin + size, total)) for begin in range(0, total, size)]
