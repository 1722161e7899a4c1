"""How the loops are compiled: by Numba on first use, cached on disk; single-threaded, without the GIL.

Arrays are C-contiguous float32 unless said otherwise; bfloat16 comes as its int16 bit patterns. A kernel works on a
range `begin … end` of tokens, latents or rows and writes nothing outside it. Loops that a kernel calls stand in its own
file: Numba looks at that file's age alone when it decides whether a cached kernel still holds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import numba
import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

Bytes = NDArray[np.uint8]
Bools = NDArray[np.bool_]
Floats = NDArray[np.float32]
Shorts = NDArray[np.int16]
Ints = NDArray[np.int32]
Longs = NDArray[np.int64]
Keys = NDArray[np.uint64]


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Compile on first call; from Numba's cache on disk where there is a writable place for one.

    `reassoc` lets sums be split over vector lanes, in an order fixed at compile time; nothing else is relaxed, so
    NaN, infinities and ties keep their meaning.
    """
    options: dict[str, Any] = {
        "nogil": True,
        "error_model": "numpy",
        "fastmath": {"reassoc", "contract"},
        "boundscheck": False,
    }
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError as error:  # no writable cache directory
        log.info("compiled kernels are not cached: %s", error)
        return numba.njit(**options)(function)
