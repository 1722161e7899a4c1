"""Dense products of the tokens and latents of each group."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load(pointers: tl.tensor, mask: tl.tensor, UPCAST: tl.constexpr) -> tl.tensor:
    tile = tl.load(pointers, mask=mask, other=0.0)
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit
def _tokens_of(
    program: tl.tensor, token_offsets: tl.tensor, groups: tl.tensor, TILE: tl.constexpr, GROUPS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """(group, first token, end of the group's tokens) of the `program`-th tile of tokens; group = `groups` when there
    are fewer tiles. Tiles do not cross groups."""
    group = tl.arange(0, GROUPS)
    begin = tl.load(token_offsets + group, mask=group < groups, other=0)
    end = tl.load(token_offsets + group + 1, mask=group < groups, other=0)
    tiles = tl.cdiv(end - begin, TILE)
    before = tl.cumsum(tiles, axis=0) - tiles
    own = tl.sum((before + tiles <= program).to(tl.int32), axis=0)
    mine = group == own
    first = tl.sum(tl.where(mine, begin + (program - before) * TILE, 0), axis=0)
    return tl.minimum(own, groups), first, tl.sum(tl.where(mine, end, 0), axis=0)


@triton.jit
def latent_products_kernel(
    x: tl.tensor, weight: tl.tensor, bias: tl.tensor, out: tl.tensor, token_offsets: tl.tensor, row_offsets: tl.tensor,
    groups: tl.tensor, d: tl.tensor, stride: tl.tensor,
    BIASED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, GROUPS: tl.constexpr,
    TILE: tl.constexpr, STEP: tl.constexpr,
) -> None:  # fmt: skip
    """out[t, c] = x_t · weight_c + bias_c for the latents c of the group of t."""
    group, first, end = _tokens_of(tl.program_id(0), token_offsets, groups, TILE, GROUPS)
    if group < groups:
        row = tl.load(row_offsets + group)
        width = tl.load(row_offsets + group + 1) - row
        column = tl.program_id(1) * TILE + tl.arange(0, TILE)
        if tl.program_id(1) * TILE < width:
            token = first + tl.arange(0, TILE)
            has_token, has_column = token < end, column < width
            token_at = token.to(tl.int64) * d
            latent_at = (row + column).to(tl.int64) * d
            sums = tl.zeros([TILE, TILE], tl.float32)
            for begin in range(0, d, STEP):
                part = begin + tl.arange(0, STEP)
                left = _load(x + token_at[:, None] + part[None, :], has_token[:, None] & (part < d)[None, :], UPCAST)
                right = _load(
                    weight + latent_at[None, :] + part[:, None], has_column[None, :] & (part < d)[:, None], UPCAST
                )
                sums = tl.dot(left, right, sums, input_precision=PRECISION)
            if BIASED:
                sums += tl.load(bias + row + column, mask=has_column, other=0.0).to(tl.float32)[None, :]
            at = out + token.to(tl.int64)[:, None] * stride + column[None, :]
            tl.store(at, sums.to(out.dtype.element_ty), mask=has_token[:, None] & has_column[None, :])


@triton.jit
def reconstruction_kernel(
    z: tl.tensor, weight: tl.tensor, out: tl.tensor, token_offsets: tl.tensor, row_offsets: tl.tensor,
    groups: tl.tensor, d: tl.tensor, stride: tl.tensor,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, GROUPS: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
) -> None:  # fmt: skip
    """out_t = Σ_c z[t, c]·weight_c over the latents c of the group of t."""
    group, first, end = _tokens_of(tl.program_id(0), token_offsets, groups, TILE, GROUPS)
    if group < groups:
        row = tl.load(row_offsets + group)
        width = tl.load(row_offsets + group + 1) - row
        token = first + tl.arange(0, TILE)
        column = tl.program_id(1) * TILE + tl.arange(0, TILE)
        has_token, has_column = token < end, column < d
        sums = tl.zeros([TILE, TILE], tl.float32)
        for begin in range(0, width, STEP):
            latent = begin + tl.arange(0, STEP)
            has_latent = latent < width
            at = z + token.to(tl.int64)[:, None] * stride + latent[None, :]
            left = _load(at, has_token[:, None] & has_latent[None, :], UPCAST)
            at = weight + (row + latent).to(tl.int64)[:, None] * d + column[None, :]
            right = _load(at, has_latent[:, None] & has_column[None, :], UPCAST)
            sums = tl.dot(left, right, sums, input_precision=PRECISION)
        at = out + token.to(tl.int64)[:, None] * d + column[None, :]
        tl.store(at, sums, mask=has_token[:, None] & has_column[None, :])


@triton.jit
def gradient_kernel(
    z: tl.tensor, y: tl.tensor, out: tl.tensor, total: tl.tensor, token_offsets: tl.tensor, row_offsets: tl.tensor,
    d: tl.tensor, stride: tl.tensor,
    SUMMED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
) -> None:  # fmt: skip
    """out_c += Σ_t z[t, c]·y_t over the tokens t of the group of latent c, in a fixed order; with
    `SUMMED` also total_c += Σ_t z[t, c]."""
    group = tl.program_id(2)
    first, end = tl.load(token_offsets + group), tl.load(token_offsets + group + 1)
    row = tl.load(row_offsets + group)
    width = tl.load(row_offsets + group + 1) - row
    if tl.program_id(0) * TILE < width:
        latent = tl.program_id(0) * TILE + tl.arange(0, TILE)
        column = tl.program_id(1) * TILE + tl.arange(0, TILE)
        has_latent, has_column = latent < width, column < d
        sums = tl.zeros([TILE, TILE], tl.float32)
        own = tl.zeros([TILE], tl.float32)
        for begin in range(first, end, STEP):
            token = begin + tl.arange(0, STEP)
            has_token = token < end
            at = z + token.to(tl.int64)[None, :] * stride + latent[:, None]
            left = _load(at, has_latent[:, None] & has_token[None, :], UPCAST)
            at = y + token.to(tl.int64)[:, None] * d + column[None, :]
            right = _load(at, has_token[:, None] & has_column[None, :], UPCAST)
            sums = tl.dot(left, right, sums, input_precision=PRECISION)
            if SUMMED:
                own += tl.sum(left.to(tl.float32), axis=1)
        at = out + (row + latent).to(tl.int64)[:, None] * d + column[None, :]
        mask = has_latent[:, None] & has_column[None, :]
        tl.store(at, tl.load(at, mask=mask, other=0.0) + sums, mask=mask)
        if SUMMED:
            place = total + row + latent
            once = has_latent & (tl.program_id(1) == 0)
            tl.store(place, tl.load(place, mask=once, other=0.0) + own, mask=once)
