"""FlashInfer's deterministic top-k, where it can be had, as a contender of our selection.

Either the package `flashinfer` (0.6.9 or newer) is installed, or `FLASHINFER_TOPK` names a library built from
`dev/flashinfer_topk.cu`. The library runs the kernels of FlashInfer's own header, without its package and what that
needs. The package picks CUB's selection for rows of at most 8192 numbers; the library does not.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

TopK = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""[rows, n] in float32 or bfloat16, k -> values and indices [rows, k]; ties go to the smaller index."""
VARIABLE = "FLASHINFER_TOPK"
SMALLER_INDEX = 1
"""Their `TopKTieBreak.SMALL`."""
STATE_BYTES = 1 << 20
WIDEST_K = 2048


def flashinfer_top_k() -> TopK | str:
    """The function, or why it cannot be had. Asks for no GPU; the function does."""
    if library := os.environ.get(VARIABLE):
        try:
            return _from_library(ctypes.CDLL(library))
        except (OSError, AttributeError) as error:
            return f"{VARIABLE}={library} cannot be loaded: {error}"
    try:
        flashinfer: Any = importlib.import_module("flashinfer")
    except Exception as error:  # its import loads much that may fail in any way
        return f"flashinfer cannot be imported ({type(error).__name__}: {error}), and {VARIABLE} is not set"
    return lambda rows, k: flashinfer.top_k(rows, k, deterministic=True, tie_break=SMALLER_INDEX)


def _from_library(library: ctypes.CDLL) -> TopK:
    function = library.flashinfer_topk
    pointer, number = ctypes.c_void_p, ctypes.c_uint32
    function.argtypes = [ctypes.c_int, pointer, pointer, pointer, number, number, number, pointer, pointer]
    function.restype = ctypes.c_int
    states: dict[torch.device, Tensor] = {}

    def top_k(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        if not rows.is_cuda or not rows.is_contiguous() or rows.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError("needs contiguous rows in float32 or bfloat16 on a GPU")
        if not 0 < k <= min(WIDEST_K, rows.shape[1]):
            raise ValueError(f"k = {k}: from 1 to {WIDEST_K}, and at most the width of the rows")
        if rows.device not in states:
            states[rows.device] = torch.zeros(STATE_BYTES, dtype=torch.uint8, device=rows.device)
        values = torch.empty(rows.shape[0], k, dtype=rows.dtype, device=rows.device)
        index = torch.empty(rows.shape[0], k, dtype=torch.int32, device=rows.device)
        tensors = (rows.data_ptr(), index.data_ptr(), values.data_ptr())
        queue = torch.cuda.current_stream(rows.device).cuda_stream
        with torch.cuda.device(rows.device):
            low = int(rows.dtype is torch.bfloat16)
            code = function(low, *tensors, rows.shape[0], k, rows.shape[1], states[rows.device].data_ptr(), queue)
        if code:
            raise RuntimeError(f"FlashInfer's top-k failed with CUDA error {code}")
        return values, index.long()

    return top_k
