"""One optimiser update of a block of rows. See `adam` for who starts it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def adam_kernel(
    param: tl.tensor, grad: tl.tensor, mean: tl.tensor, square: tl.tensor, copy: tl.tensor, ok: tl.tensor,
    scale: tl.tensor, rates: tl.tensor, step_size: tl.tensor, inverse_correction: tl.tensor, mean_weight: tl.tensor,
    square_weight: tl.tensor, eps: tl.tensor,
    rows: tl.tensor, d: tl.tensor, numel: tl.tensor,
    SCALED: tl.constexpr, RATED: tl.constexpr, PROJECT: tl.constexpr, UNIT: tl.constexpr, COPY: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
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
def project_kernel(
    param: tl.tensor, grad: tl.tensor, rows: tl.tensor, d: tl.tensor, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    at = row.to(tl.int64)[:, None] * d + column[None, :]
    inside = (row < rows)[:, None] & (column < d)[None, :]
    p = tl.load(param + at, mask=inside, other=0.0)
    g = tl.load(grad + at, mask=inside, other=0.0)
    tl.store(grad + at, g - tl.sum(g * p, axis=1)[:, None] * p, mask=inside)
