"""One optimiser update on a GPU in one pass over each row: projection, Adam, unit norm, low-precision copy."""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false
# (the language of the kernels has types of its own)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float
from torch import Tensor

from harness.ops import reference
from harness.ops.interface import AdamState, Hyper
from harness.ops.triton.sizes import INTERPRETED, power_of_2, tiles

VECTOR_ROW = 1 << 10
"""A vector is cut into rows of this many numbers."""

ROW_ELEMENTS = (1 << 16) if INTERPRETED else (1 << 10)
"""Numbers that a program updates, if a row is not longer."""


@triton.jit
def adam_kernel(
    param, grad, mean, square, copy, ok, scale, rates, step_size, inverse_correction, mean_weight, square_weight, eps,
    rows, d, numel,
    SCALED: tl.constexpr, RATED: tl.constexpr, PROJECT: tl.constexpr, UNIT: tl.constexpr, COPY: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes nothing where `ok` is false."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    at = row.to(tl.int64)[:, None] * d + column[None, :]
    inside = (row < rows)[:, None] & (column < d)[None, :] & (at < numel)
    p = tl.load(param + at, mask=inside, other=0.0)
    g = tl.load(grad + at, mask=inside, other=0.0)
    if PROJECT:
        g -= tl.sum(g * p, axis=1)[:, None] * p
    if SCALED:
        g *= tl.load(scale)
    if RATED:
        step_size, inverse_correction = tl.load(rates), tl.load(rates + 1)
    m = tl.load(mean + at, mask=inside, other=0.0)
    v = tl.load(square + at, mask=inside, other=0.0)
    m += mean_weight * (g - m)
    v += square_weight * (g * g - v)
    p -= step_size * (m / (tl.sqrt_rn(v * inverse_correction) + eps))
    if UNIT:
        squares = tl.sum(p * p, axis=1)
        p = p / tl.sqrt_rn(tl.where(row < rows, squares, 1.0))[:, None]
    allowed = inside & (tl.load(ok) != 0)
    tl.store(param + at, p, mask=allowed)
    tl.store(mean + at, m, mask=allowed)
    tl.store(square + at, v, mask=allowed)
    if COPY:
        # to bfloat16, nearest even, on the bits: the interpreter's own conversion truncates
        bits = p.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        tl.store(copy + at, tl.where(p == p, rounded, 0x7FC0).to(tl.int16), mask=allowed)


@triton.jit
def project_kernel(param, grad, rows, d, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    at = row.to(tl.int64)[:, None] * d + column[None, :]
    inside = (row < rows)[:, None] & (column < d)[None, :]
    p = tl.load(param + at, mask=inside, other=0.0)
    g = tl.load(grad + at, mask=inside, other=0.0)
    tl.store(grad + at, g - tl.sum(g * p, axis=1)[:, None] * p, mask=inside)


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
