"""Centred rows, codes as a matrix, and residuals, on a GPU: each in one pass over memory."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from harness.ops import reference
from harness.ops.sizes import padded
from harness.ops.triton.dense_kernels import centred_kernel, residual_kernel, spread_kernel
from harness.ops.triton.sizes import INTERPRETED, power_of_2, tiles

SPREAD_ROWS = 64 if INTERPRETED else 2
"""Rows of the matrix that a program writes."""
SPREAD_COLUMNS = 1024
"""Zeros of a row that it writes at a time."""


def centred(
    x: Float[Tensor, "tokens d"], order: Int[Tensor, " own"] | None, offset: Float[Tensor, " d"], dtype: torch.dtype
) -> tuple[Float[Tensor, "own d"], Float[Tensor, "own d"]]:
    """See `interface.Ops.centred`."""
    if x.dtype is not torch.float32 or x.shape[0] == 0:
        return reference.centred(x, order, offset, dtype)
    x, d = x.contiguous(), x.shape[1]
    out = torch.empty_like(x) if order is None else x.new_empty(order.shape[0], d)
    low, block_d = out if dtype is out.dtype else torch.empty_like(out, dtype=dtype), power_of_2(d)
    centred_kernel[(out.shape[0],)](
        x, x if order is None else order, offset, out, low, d,
        ORDERED=order is not None, LOW=low is not out, BLOCK_D=block_d, num_warps=8 if block_d > 1 << 12 else 4,
    )  # fmt: skip
    return out, low


def aligned_rows(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "rows width"]:
    """An empty matrix with aligned rows."""
    return torch.empty((rows, padded(width)), dtype=dtype, device=device)[:, :width]


def spread(
    values: Float[Tensor, "tokens k"],
    index: Int[Tensor, "tokens k"],
    firsts: Int[Tensor, " tokens"],
    width: int,
    dtype: torch.dtype,
) -> Float[Tensor, "tokens width"]:
    """A matrix with values[t, j] in row t and column index[t, j] − firsts[t], else 0. Its rows are aligned, and 0
    between their ends and the next row too. `values` are float32; those other than 0 have columns of their own."""
    (tokens, k), slots = values.shape, power_of_2(values.shape[1])
    matrix = aligned_rows(tokens, width, dtype, values.device)
    if tokens:
        spread_kernel[(tiles(tokens, SPREAD_ROWS),)](
            values, index, firsts, matrix, tokens, k, matrix.stride(0),
            ROWS=SPREAD_ROWS, SLOTS=slots, COLUMNS=min(SPREAD_COLUMNS, power_of_2(matrix.stride(0))),
            num_warps=8 if slots > 1 << 10 else 4,
        )  # fmt: skip
    return matrix


def subtract(
    x: Float[Tensor, "tokens d"],
    scale: Float[Tensor, " tokens"] | None,
    residual: Float[Tensor, "tokens d"],
    squared: Float[Tensor, " tokens"],
    dtype: torch.dtype,
) -> Float[Tensor, "tokens d"]:
    """residual = x − scale·residual and squared = ‖residual‖², in place; returns the residual in `dtype`."""
    tokens, d = x.shape
    low = residual if dtype is residual.dtype else torch.empty_like(residual, dtype=dtype)
    block_d = power_of_2(d)
    residual_kernel[(tokens,)](
        x, x if scale is None else scale, residual, low, squared, d,
        SCALED=scale is not None, LOW=low is not residual, BLOCK_D=block_d, num_warps=8 if block_d > 1 << 12 else 4,
    )  # fmt: skip
    return low
