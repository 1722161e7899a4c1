"""Dense products of the tokens and latents of each group.

Loops over the inner dimension carry no work but loads and products. Row numbers outside a group are clamped, not
masked, where the product of such a row is not stored. A mask along a row compares with a number that is divisible by
16: one that could end anywhere would split the loads and stores into single numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _wide(tile: tl.tensor, UPCAST: tl.constexpr) -> tl.tensor:
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit
def _load(pointers: tl.tensor, mask: tl.tensor, WHOLE: tl.constexpr, UPCAST: tl.constexpr) -> tl.tensor:
    """With `WHOLE` the mask is all true."""
    tile = tl.load(pointers) if WHOLE else tl.load(pointers, mask=mask, other=0.0)
    return _wide(tile, UPCAST)


@triton.jit
def _place(
    program: tl.tensor, programs: tl.tensor, across: tl.tensor, TOGETHER: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """(tile of rows, tile of columns) of a program. Programs that run at the same time share rows and columns: they
    cover the columns of `TOGETHER` tiles of rows before those of the next."""
    down = programs // across
    begin = program // (TOGETHER * across) * TOGETHER
    height = tl.minimum(down - begin, TOGETHER)
    inside = program % (TOGETHER * across)
    return begin + inside % height, inside // height


@triton.jit
def _tokens_of(
    tile: tl.tensor, token_offsets: tl.tensor, groups: tl.tensor, ROWS: tl.constexpr, GROUPS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """(group, first token, end of the group's tokens) of a tile of tokens; group = `groups` when there are fewer
    tiles. Tiles do not cross groups."""
    group = tl.arange(0, GROUPS)
    begin = tl.load(token_offsets + group, mask=group < groups, other=0).to(tl.int32)
    end = tl.load(token_offsets + group + 1, mask=group < groups, other=0).to(tl.int32)
    tiles = tl.cdiv(end - begin, ROWS)
    before = tl.cumsum(tiles, axis=0) - tiles
    own = tl.sum((before + tiles <= tile).to(tl.int32), axis=0)
    mine = group == own
    first = tl.sum(tl.where(mine, begin + (tile - before) * ROWS, 0), axis=0)
    return tl.minimum(own, groups), first, tl.sum(tl.where(mine, end, 0), axis=0)


@triton.jit
def latent_products_kernel(
    x: tl.tensor, weight: tl.tensor, bias: tl.tensor, out: tl.tensor, token_offsets: tl.tensor, row_offsets: tl.tensor,
    groups: tl.tensor, d: tl.tensor, stride: tl.tensor, across: tl.tensor,
    BIASED: tl.constexpr, DESCRIBED: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    GROUPS: tl.constexpr, TOGETHER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
) -> None:  # fmt: skip
    """out[t, c] = x_t · weight_c + bias_c for the latents c of the group of t; numbers of the row behind them are
    undefined. `EVEN`: d is a multiple of `STEP`. `DESCRIBED`: x and weight are tensor descriptors."""
    tile, column_tile = _place(tl.program_id(0), tl.num_programs(0), across, TOGETHER)
    group, first, end = _tokens_of(tile, token_offsets, groups, ROWS, GROUPS)
    if group < groups:
        row = tl.load(row_offsets + group)
        width = tl.load(row_offsets + group + 1) - row
        if column_tile * COLUMNS < width:
            token = first + tl.arange(0, ROWS)
            column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
            latent = row + tl.minimum(column, width - 1)
            sums = tl.zeros([ROWS, COLUMNS], tl.float32)
            if DESCRIBED:
                for begin in range(0, d, STEP):
                    left = _wide(x.load([first, begin]), UPCAST)
                    right = _wide(weight.load([row + column_tile * COLUMNS, begin]), UPCAST)
                    sums = tl.dot(left, right.T, sums, input_precision=PRECISION)
            else:
                part = tl.arange(0, STEP)
                left_at = x + tl.minimum(token, end - 1).to(tl.int64)[:, None] * d + part[None, :]
                right_at = weight + latent.to(tl.int64)[None, :] * d + part[:, None]
                for begin in range(0, d, STEP):
                    left = _load(left_at, (part < d - begin)[None, :], EVEN, UPCAST)
                    right = _load(right_at, (part < d - begin)[:, None], EVEN, UPCAST)
                    sums = tl.dot(left, right, sums, input_precision=PRECISION)
                    left_at += STEP
                    right_at += STEP
            if BIASED:
                sums += tl.load(bias + latent).to(tl.float32)[None, :]
            at = out + token.to(tl.int64)[:, None] * stride + column[None, :]
            tl.store(at, sums.to(out.dtype.element_ty), mask=(token < end)[:, None] & (column < stride)[None, :])


@triton.jit
def reconstruction_kernel(
    z: tl.tensor, weight: tl.tensor, out: tl.tensor, token_offsets: tl.tensor, row_offsets: tl.tensor,
    groups: tl.tensor, d: tl.tensor, stride: tl.tensor, across: tl.tensor,
    DESCRIBED: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    GROUPS: tl.constexpr, TOGETHER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
) -> None:  # fmt: skip
    """out_t = Σ_c z[t, c]·weight_c over the latents c of the group of t; the numbers of a row of z behind them are 0.
    `EVEN`: the stride of z is a multiple of `STEP`. `WHOLE`: d is a multiple of `COLUMNS`. `DESCRIBED`: z and weight
    are tensor descriptors."""
    tile, column_tile = _place(tl.program_id(0), tl.num_programs(0), across, TOGETHER)
    group, first, end = _tokens_of(tile, token_offsets, groups, ROWS, GROUPS)
    if group < groups:
        row = tl.load(row_offsets + group)
        width = tl.load(row_offsets + group + 1) - row
        token = first + tl.arange(0, ROWS)
        column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        sums = tl.zeros([ROWS, COLUMNS], tl.float32)
        if DESCRIBED:
            for begin in range(0, width, STEP):
                left = _wide(z.load([first, begin]), UPCAST)
                right = _wide(weight.load([row + begin, column_tile * COLUMNS]), UPCAST)
                sums = tl.dot(left, right, sums, input_precision=PRECISION)
        else:
            part = tl.arange(0, STEP)
            left_at = z + tl.minimum(token, end - 1).to(tl.int64)[:, None] * stride + part[None, :]
            right_at = weight + (row + part).to(tl.int64)[:, None] * d + column[None, :]
            ahead = STEP * d
            for begin in range(0, width, STEP):
                left = _load(left_at, (part < stride - begin)[None, :], EVEN, UPCAST)
                mask = (part < width - begin)[:, None]
                right = _load(right_at, mask if WHOLE else mask & (column < d)[None, :], False, UPCAST)
                sums = tl.dot(left, right, sums, input_precision=PRECISION)
                left_at += STEP
                right_at += ahead
        at = out + token.to(tl.int64)[:, None] * d + column[None, :]
        tl.store(at, sums, mask=(token < end)[:, None] & (column < d)[None, :])


@triton.jit
def gradient_kernel(
    z: tl.tensor, y: tl.tensor, out: tl.tensor, token_offsets: tl.tensor, row_offsets: tl.tensor,
    d: tl.tensor, stride: tl.tensor, down: tl.tensor, across: tl.tensor,
    ADD: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, TOGETHER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
) -> None:  # fmt: skip
    """out_c = Σ_t z[t, c]·y_t over the tokens t of the group of latent c, in a fixed order; with `ADD` out_c += it.
    `EVEN`: the stride of z is a multiple of `ROWS`. `WHOLE`: d is a multiple of `COLUMNS`."""
    group = tl.program_id(0) // (down * across)
    tile, column_tile = _place(tl.program_id(0) % (down * across), down * across, across, TOGETHER)
    row = tl.load(row_offsets + group)
    width = tl.load(row_offsets + group + 1) - row
    if tile * ROWS < width:
        first = tl.load(token_offsets + group).to(tl.int32)
        end = tl.load(token_offsets + group + 1).to(tl.int32)
        latent = tile * ROWS + tl.arange(0, ROWS)
        column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        part = tl.arange(0, STEP)
        sums = tl.zeros([ROWS, COLUMNS], tl.float32)
        token = (first + part).to(tl.int64)
        left_at = z + token[None, :] * stride + latent[:, None]
        right_at = y + token[:, None] * d + column[None, :]
        left_ahead, right_ahead = STEP * stride, STEP * d
        for begin in range(first, end, STEP):
            has_token = part < end - begin
            mask = has_token[None, :]
            left = _load(left_at, mask if EVEN else mask & (latent < stride)[:, None], False, UPCAST)
            mask = has_token[:, None]
            right = _load(right_at, mask if WHOLE else mask & (column < d)[None, :], False, UPCAST)
            sums = tl.dot(left, right, sums, input_precision=PRECISION)
            left_at += left_ahead
            right_at += right_ahead
        at = out + (row + latent).to(tl.int64)[:, None] * d + column[None, :]
        mask = (latent < width)[:, None] & (column < d)[None, :]
        if ADD:
            sums += tl.load(at, mask=mask, other=0.0)
        tl.store(at, sums, mask=mask)


@triton.jit
def column_sums_kernel(
    z: tl.tensor, out: tl.tensor, token_offsets: tl.tensor, row_offsets: tl.tensor, stride: tl.tensor,
    ADD: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    """out_c = Σ_t z[t, c] over the tokens t of the group of latent c, in a fixed order; with `ADD` out_c += it."""
    group = tl.program_id(1)
    row = tl.load(row_offsets + group)
    width = tl.load(row_offsets + group + 1) - row
    if tl.program_id(0) * COLUMNS < width:
        first = tl.load(token_offsets + group).to(tl.int32)
        end = tl.load(token_offsets + group + 1).to(tl.int32)
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        sums = tl.zeros([STEP, COLUMNS], tl.float32)
        for begin in range(first, end, STEP):
            token = begin + tl.arange(0, STEP)
            mask = (token < end)[:, None] & (column < stride)[None, :]
            sums += tl.load(z + token.to(tl.int64)[:, None] * stride + column[None, :], mask=mask, other=0.0)
        total = tl.sum(sums, axis=0)
        mask = column < width
        if ADD:
            total += tl.load(out + row + column, mask=mask, other=0.0)
        tl.store(out + row + column, total, mask=mask)
