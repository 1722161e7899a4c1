"""Sums over the entries of each latent."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def segments_kernel(
    order: tl.tensor, begins: tl.tensor, ends: tl.tensor, owners: tl.tensor, extra_ends: tl.tensor,
    weight_enc: tl.tensor, weight_dec: tl.tensor, x: tl.tensor, residual: tl.tensor, out_enc: tl.tensor,
    out_dec: tl.tensor, out_bias: tl.tensor,
    rows: tl.tensor, d: tl.tensor, k: tl.tensor,
    EXTRA: tl.constexpr, PIECE: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
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
            rows_r = tl.load(residual + at, mask=(dec != 0)[:, None] & inside[None, :], other=0.0).to(tl.float32)
            sum_enc += tl.sum(rows_x * enc[:, None], axis=0)
            sum_dec += tl.sum(rows_r * dec[:, None], axis=0)
            sum_bias += enc
        tl.store(out_enc + program * d + column, sum_enc, mask=inside)
        tl.store(out_dec + program * d + column, sum_dec, mask=inside)
        tl.store(out_bias + program, tl.sum(sum_bias, axis=0))


@triton.jit
def combine_kernel(
    begins: tl.tensor, ends: tl.tensor, owners: tl.tensor, extra_ends: tl.tensor, extra_enc: tl.tensor,
    extra_dec: tl.tensor, extra_bias: tl.tensor, out_enc: tl.tensor, out_dec: tl.tensor, out_bias: tl.tensor,
    rows: tl.tensor, d: tl.tensor,
    PIECE: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
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
