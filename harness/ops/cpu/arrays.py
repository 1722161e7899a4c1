"""Memory in the form that kernels take: contiguous arrays and reused buffers."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from harness.budget import KEPT_BYTES

TILE_ELEMENTS = 1 << 22
"""Pre-activations that a thread produces and selects from at a time."""

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
"""Keys of glibc's `mallopt` (malloc.h)."""

_LARGEST_MMAP_THRESHOLD = 1 << 25
"""The largest value that `mallopt` takes on 64-bit systems."""

_local = threading.local()


@lru_cache
def keep_freed_memory() -> None:
    """Let the process keep the memory that one step frees for the next: fresh pages cost a tenth of a small step. Sets
    glibc's allocator and leaves other allocators alone."""
    setting = getattr(ctypes.CDLL(None), "mallopt", None)
    if setting is not None:
        setting(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        setting(_TRIM_THRESHOLD, KEPT_BYTES)


def scratch(name: str, count: int, dtype: torch.dtype) -> Tensor:
    """`count` numbers of this thread's reusable buffer `name`, not initialised."""
    key = f"{name}.{dtype}"
    buffer = getattr(_local, key, None)
    if buffer is None or buffer.numel() < count:
        buffer = torch.empty(count, dtype=dtype)
        setattr(_local, key, buffer)
    return buffer[:count]


def array(tensor: Tensor) -> np.ndarray:
    """The tensor's memory as a contiguous array; bfloat16 as its bit patterns."""
    tensor = tensor.detach().contiguous()
    return tensor.view(torch.int16).numpy() if tensor.dtype is torch.bfloat16 else tensor.numpy()


def floats(tensor: Tensor) -> np.ndarray:
    """The tensor as float32, as an array."""
    return array(tensor.to(torch.float32))


def blocks(spans: list[tuple[slice, slice]], size: int) -> Iterator[tuple[slice, slice]]:
    """(tokens, rows) of each span, with at most `size` tokens at a time."""
    for tokens, rows in spans:
        for begin in range(tokens.start, tokens.stop, size):
            yield slice(begin, min(begin + size, tokens.stop)), rows
