"""What surrounds the dense products: codes as rows of a matrix, and residuals."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def spread_kernel(
    values: tl.tensor, index: tl.tensor, firsts: tl.tensor, out: tl.tensor, tokens: tl.tensor, k: tl.tensor,
    stride: tl.tensor, ROWS: tl.constexpr, SLOTS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    """out[t] = 0, and values[t, j] at column index[t, j] − firsts[t]. Columns of values other than 0 are distinct."""
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    for begin in range(0, stride, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        mask = (token < tokens)[:, None] & (column < stride)[None, :]
        tl.store(out + token[:, None] * stride + column[None, :], tl.zeros([ROWS, COLUMNS], tl.float32), mask=mask)
    slot = tl.arange(0, SLOTS)
    entry = token[:, None] * k + slot[None, :]
    value = tl.load(values + entry, mask=(token < tokens)[:, None] & (slot < k)[None, :], other=0.0)
    # padding has the value 0 and may repeat a column; a NaN is not 0 and must show
    active = value != 0
    first = tl.load(firsts + token, mask=token < tokens, other=0)
    column = tl.load(index + entry, mask=active, other=0) - first[:, None]
    # other threads of the program wrote the zeros
    tl.debug_barrier()
    tl.store(out + token[:, None] * stride + column, value, mask=active)


@triton.jit
def residual_kernel(
    x: tl.tensor, scale: tl.tensor, residual: tl.tensor, low: tl.tensor, squared: tl.tensor, d: tl.tensor,
    SCALED: tl.constexpr, LOW: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    """`residual` comes in as a token's reconstruction (times `scale` with SCALED), leaves as x − it, and with LOW goes
    to `low` too; squared = ‖residual‖²."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = column < d
    total = tl.load(residual + token * d + column, mask=inside, other=0.0)
    if SCALED:
        total *= tl.load(scale + token)
    total = tl.load(x + token * d + column, mask=inside, other=0.0).to(tl.float32) - total
    tl.store(residual + token * d + column, total, mask=inside)
    if LOW:
        tl.store(low + token * d + column, total.to(low.dtype.element_ty), mask=inside)
    tl.store(squared + token, tl.sum(total * total, axis=0))


@triton.jit
def centred_kernel(
    x: tl.tensor, order: tl.tensor, offset: tl.tensor, out: tl.tensor, low: tl.tensor, d: tl.tensor,
    ORDERED: tl.constexpr, LOW: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    """out_t = x_order[t] − offset (without ORDERED: x_t), with LOW also in the precision of `low`."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = column < d
    row = tl.load(order + token) if ORDERED else token
    number = tl.load(x + row * d + column, mask=inside, other=0.0) - tl.load(offset + column, mask=inside, other=0.0)
    tl.store(out + token * d + column, number, mask=inside)
    if LOW:
        tl.store(low + token * d + column, number.to(low.dtype.element_ty), mask=inside)
