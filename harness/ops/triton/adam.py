"""One optimiser update on a GPU in one pass over each row: projection, Adam, unit norm, low-precision copy."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from harness.ops import reference
from harness.ops.interface import AdamState, Hyper
from harness.ops.triton.adam_kernels import adam_kernel, project_kernel
from harness.ops.triton.sizes import INTERPRETED, power_of_2, tiles

VECTOR_ROW = 1 << 10
"""A vector is cut into rows of this many numbers."""

ROW_ELEMENTS = (1 << 16) if INTERPRETED else (1 << 10)
"""Numbers that a program updates, if a row is not longer."""


def _blocks(d: int) -> tuple[int, int]:
    """(rows, numbers of a row rounded up) of one program."""
    width = power_of_2(d)
    return max(1, ROW_ELEMENTS // width), width


def project(param: Float[Tensor, "rows d"], grad: Float[Tensor, "rows d"]) -> None:
    rows, d = param.shape
    if param.dtype is torch.float64:
        return reference.project(param, grad)
    if param.numel() == 0:
        return
    count, width = _blocks(d)
    project_kernel[(tiles(rows, count),)](param, grad, rows, d, ROWS=count, BLOCK_D=width)


def update(
    param: Tensor,
    grad: Tensor,
    state: AdamState,
    hyper: Hyper,
    ok: Bool[Tensor, ""],
    low_precision: Tensor | None = None,
) -> None:
    if param.dtype is torch.float64:
        return reference.update(param, grad, state, hyper, ok, low_precision)
    if param.numel() == 0:
        return
    d = param.shape[1] if param.ndim == 2 else VECTOR_ROW
    rows = tiles(param.numel(), d)
    count, width = _blocks(d)
    step_size, inverse_correction = hyper.corrected()
    adam_kernel[(tiles(rows, count),)](
        param, grad, *state,
        param if low_precision is None else low_precision.view(torch.int16),
        ok,
        param if hyper.scale is None else hyper.scale,
        param if hyper.rates is None else hyper.rates,
        step_size, inverse_correction, 1 - hyper.beta1, 1 - hyper.beta2, hyper.eps,
        rows, d, param.numel(),
        SCALED=hyper.scale is not None, RATED=hyper.rates is not None, PROJECT=hyper.project, UNIT=hyper.unit_rows,
        COPY=low_precision is not None, ROWS=count, BLOCK_D=width,
    )  # fmt: skip
