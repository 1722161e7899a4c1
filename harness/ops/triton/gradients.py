"""Gradients of both matrices and the encoder bias on a GPU, sums over each latent's own entries.

One stable sort of the entries by latent serves all three. A latent with more than `PIECE` entries is summed in pieces
by several programs, and the pieces added up in order: no atomics, the same bits every time.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false
# (the language of the kernels has types of its own)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from harness.ops.triton.sizes import INTERPRETED, power_of_2

PIECE = 256
"""Entries of a latent that one program sums."""

TILE_ELEMENTS = (1 << 14) if INTERPRETED else (1 << 12)
"""Numbers of token rows that a program holds at a time, of each matrix."""


@triton.jit
def segments_kernel(
    order, begins, ends, owners, extra_ends, weight_enc, weight_dec, x, residual, out_enc, out_dec, out_bias,
    rows, d, k,
    EXTRA: tl.constexpr, PIECE: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums of one piece of one latent's entries: the first piece, or with EXTRA a later one, which has a row of its
    own in `out_*`."""
    program = tl.program_id(0).to(tl.int64)
    latent = tl.load(owners + program) if EXTRA else program
    if latent < rows:
        begin, last = tl.load(begins + latent), tl.load(ends + latent)
        if EXTRA:
            extras = (last - begin - 1) // PIECE
            begin += PIECE * (1 + program - (tl.load(extra_ends + latent) - extras))
        last = tl.minimum(last, begin + PIECE)
        column = tl.arange(0, BLOCK_D)
        inside = column < d
        sum_enc, sum_dec = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
        sum_bias = tl.zeros([BLOCK_E], tl.float32)
        for start in range(begin, last, BLOCK_E):
            place = start + tl.arange(0, BLOCK_E)
            entry = tl.load(order + place, mask=place < last, other=0)
            enc = tl.load(weight_enc + entry, mask=place < last, other=0.0)
            dec = tl.load(weight_dec + entry, mask=place < last, other=0.0)
            at = (entry // k)[:, None] * d + column[None, :]
            # entries that were not active, or only pad, weigh nothing and need no reading; a NaN is not 0
            rows_x = tl.load(x + at, mask=(enc != 0)[:, None] & inside[None, :], other=0.0).to(tl.float32)
            rows_r = tl.load(residual + at, mask=(dec != 0)[:, None] & inside[None, :], other=0.0)
            sum_enc += tl.sum(rows_x * enc[:, None], axis=0)
            sum_dec += tl.sum(rows_r * dec[:, None], axis=0)
            sum_bias += enc
        tl.store(out_enc + program * d + column, sum_enc, mask=inside)
        tl.store(out_dec + program * d + column, sum_dec, mask=inside)
        tl.store(out_bias + program, tl.sum(sum_bias, axis=0))


@triton.jit
def combine_kernel(
    begins, ends, owners, extra_ends, extra_enc, extra_dec, extra_bias, out_enc, out_dec, out_bias, rows, d,
    PIECE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add the later pieces of a latent to its first, in order; the program of the second piece does it."""
    program = tl.program_id(0).to(tl.int64)
    latent = tl.load(owners + program)
    if latent < rows:
        extras = (tl.load(ends + latent) - tl.load(begins + latent) - 1) // PIECE
        if program == tl.load(extra_ends + latent) - extras:
            column = tl.arange(0, BLOCK_D)
            inside = column < d
            at = latent * d + column
            sum_enc = tl.load(out_enc + at, mask=inside, other=0.0)
            sum_dec = tl.load(out_dec + at, mask=inside, other=0.0)
            sum_bias = tl.load(out_bias + latent)
            for extra in range(program, program + extras):
                sum_enc += tl.load(extra_enc + extra * d + column, mask=inside, other=0.0)
                sum_dec += tl.load(extra_dec + extra * d + column, mask=inside, other=0.0)
                sum_bias += tl.load(extra_bias + extra)
            tl.store(out_enc + at, sum_enc, mask=inside)
            tl.store(out_dec + at, sum_dec, mask=inside)
            tl.store(out_bias + latent, sum_bias)


def by_latent(
    index: Int[Tensor, "tokens k"], rows: int
) -> tuple[Int[Tensor, " entries"], Int[Tensor, " rows"], Int[Tensor, " rows"]]:
    """(order, begins, ends): the entries t·k + j sorted by latent, then as they stand, with each latent's range."""
    # radix sort: half the bits, half the passes
    narrow = rows <= 1 << 16
    dtype, lowest = (torch.int16, 1 << 15) if narrow else (torch.int32, 0)
    latents, order = (index.flatten() - lowest).to(dtype).sort(stable=True)
    every = torch.arange(-lowest, rows - lowest, dtype=dtype, device=index.device)
    return order, torch.searchsorted(latents, every), torch.searchsorted(latents, every, right=True)


def weight_grads(
    index: Int[Tensor, "tokens k"],
    values: Float[Tensor, "tokens k"],
    dz: Float[Tensor, "tokens k"],
    x: Float[Tensor, "tokens d"],
    residual: Float[Tensor, "tokens d"],
    out: tuple[Float[Tensor, "rows d"], Float[Tensor, "rows d"], Float[Tensor, " rows"]],
) -> None:
    """See `interface.Ops.weight_grads`. All contiguous; x of any floating dtype, the others float32."""
    (tokens, k), (rows, d) = index.shape, out[0].shape
    if rows == 0:
        return
    order, begins, ends = by_latent(index, rows)
    most_extras = tokens * k // PIECE
    extra_ends = ((ends - begins - 1) // PIECE).clamp_(min=0).cumsum(0)
    owners = torch.searchsorted(extra_ends, torch.arange(most_extras, device=index.device), right=True)
    block_d = power_of_2(d)
    block_e = max(1, min(64 if INTERPRETED else 16, TILE_ELEMENTS // block_d))
    shared = order, begins, ends, owners, extra_ends, dz, values, x, residual
    sizes, warps = (rows, d, k), 8 if block_d > TILE_ELEMENTS else 4
    constants = {"PIECE": PIECE, "BLOCK_E": block_e, "BLOCK_D": block_d, "num_warps": warps}
    segments_kernel[(rows,)](*shared, *out, *sizes, EXTRA=False, **constants)
    if not most_extras:
        return
    extra = tuple(torch.empty((most_extras, *grad.shape[1:]), device=index.device) for grad in out)
    segments_kernel[(most_extras,)](*shared, *extra, *sizes, EXTRA=True, **constants)
    combine_kernel[(most_extras,)](
        begins, ends, owners, extra_ends, *extra, *out, rows, d, PIECE=PIECE, BLOCK_D=block_d, num_warps=warps
    )
