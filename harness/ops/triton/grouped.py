"""Dense products of every group at once on a GPU: one launch for all, sizes read on the device, empty groups free.

For the encoder of a Switch SAE, and for groups with so few latents per active one that products over their whole
width are cheaper than gathers. Operands float32 or bfloat16, sums and results as the output asks, added up in float32.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false
# (the language of the kernels has types of its own)
from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from harness.ops.triton.sizes import INTERPRETED, power_of_2, tiles

TILE = 64 if INTERPRETED else 128
"""Rows and columns of the output that a program computes."""

STEP = 256 if INTERPRETED else 64
"""Numbers it adds up at a time."""


@functools.lru_cache(maxsize=64)
def on_device(numbers: tuple[int, ...], device: torch.device) -> Int[Tensor, " count"]:
    """Host numbers as an int32 tensor; kept, since copying them waits for the device."""
    return torch.tensor(numbers, dtype=torch.int32, device=device)


@triton.jit
def _load(pointers, mask, UPCAST: tl.constexpr):
    tile = tl.load(pointers, mask=mask, other=0.0)
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit
def _tokens_of(program, token_offsets, groups, TILE: tl.constexpr, GROUPS: tl.constexpr):
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
    x, weight, bias, out, token_offsets, row_offsets, groups, d, stride,
    BIASED: tl.constexpr, UPCAST: tl.constexpr, GROUPS: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
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
                sums = tl.dot(left, right, sums, input_precision="ieee")
            if BIASED:
                sums += tl.load(bias + row + column, mask=has_column, other=0.0).to(tl.float32)[None, :]
            at = out + token.to(tl.int64)[:, None] * stride + column[None, :]
            tl.store(at, sums.to(out.dtype.element_ty), mask=has_token[:, None] & has_column[None, :])


@triton.jit
def reconstruction_kernel(
    z, weight, out, token_offsets, row_offsets, groups, d, stride,
    UPCAST: tl.constexpr, GROUPS: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
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
            sums = tl.dot(left, right, sums, input_precision="ieee")
        at = out + token.to(tl.int64)[:, None] * d + column[None, :]
        tl.store(at, sums, mask=has_token[:, None] & has_column[None, :])


@triton.jit
def gradient_kernel(
    z, y, out, token_offsets, row_offsets, d, stride,
    UPCAST: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """out_c += Σ_t z[t, c]·y_t over the tokens t of the group of latent c, in a fixed order."""
    group = tl.program_id(2)
    first, end = tl.load(token_offsets + group), tl.load(token_offsets + group + 1)
    row = tl.load(row_offsets + group)
    width = tl.load(row_offsets + group + 1) - row
    if tl.program_id(0) * TILE < width:
        latent = tl.program_id(0) * TILE + tl.arange(0, TILE)
        column = tl.program_id(1) * TILE + tl.arange(0, TILE)
        has_latent, has_column = latent < width, column < d
        sums = tl.zeros([TILE, TILE], tl.float32)
        for begin in range(first, end, STEP):
            token = begin + tl.arange(0, STEP)
            has_token = token < end
            at = z + token.to(tl.int64)[None, :] * stride + latent[:, None]
            left = _load(at, has_latent[:, None] & has_token[None, :], UPCAST)
            at = y + token.to(tl.int64)[:, None] * d + column[None, :]
            right = _load(at, has_token[:, None] & has_column[None, :], UPCAST)
            sums = tl.dot(left, right, sums, input_precision="ieee")
        at = out + (row + latent).to(tl.int64)[:, None] * d + column[None, :]
        mask = has_latent[:, None] & has_column[None, :]
        tl.store(at, tl.load(at, mask=mask, other=0.0) + sums, mask=mask)


def _constants(dtype: torch.dtype, groups: int | None = None) -> dict[str, int | bool]:
    # the interpreter computes products of bfloat16 wrongly
    found: dict[str, int | bool] = {"UPCAST": INTERPRETED and dtype is torch.bfloat16, "TILE": TILE, "STEP": STEP}
    if groups is not None:
        found["GROUPS"] = power_of_2(groups)
    return found | {"num_warps": 8}


def _token_tiles(tokens: int, groups: int) -> int:
    """At least as many tiles as any division of the tokens into groups needs."""
    return tiles(tokens, TILE) + groups


def latent_products(
    x: Float[Tensor, "tokens d"],
    weight: Float[Tensor, "rows d"],
    bias: Float[Tensor, " rows"] | None,
    token_offsets: Int[Tensor, " groups_plus_1"],
    row_offsets: tuple[int, ...],
    out: Float[Tensor, "tokens widest"],
) -> None:
    """out[t, c] = x_t · weight[first latent of t's group + c] (+ bias), for c below the group's width; the rest of
    `out` is left as it is."""
    groups, (tokens, d) = len(row_offsets) - 1, x.shape
    grid = (_token_tiles(tokens, groups), tiles(out.shape[1], TILE))
    offsets = on_device(row_offsets, x.device)
    latent_products_kernel[grid](
        x, weight, x if bias is None else bias, out, token_offsets, offsets, groups, d, out.stride(0),
        BIASED=bias is not None, **_constants(x.dtype, groups),
    )  # fmt: skip


def reconstructions(
    z: Float[Tensor, "tokens widest"],
    weight: Float[Tensor, "rows d"],
    token_offsets: Int[Tensor, " groups_plus_1"],
    row_offsets: tuple[int, ...],
    out: Float[Tensor, "tokens d"],
) -> None:
    """out_t = Σ_c z[t, c]·weight[first latent of t's group + c], float32; every token belongs to a group."""
    groups, (tokens, d) = len(row_offsets) - 1, out.shape
    grid = (_token_tiles(tokens, groups), tiles(d, TILE))
    offsets = on_device(row_offsets, z.device)
    reconstruction_kernel[grid](
        z, weight, out, token_offsets, offsets, groups, d, z.stride(0), **_constants(z.dtype, groups)
    )


def add_gradients(
    z: Float[Tensor, "tokens widest"],
    y: Float[Tensor, "tokens d"],
    token_offsets: Int[Tensor, " groups_plus_1"],
    row_offsets: tuple[int, ...],
    out: Float[Tensor, "rows d"],
) -> None:
    """out[first latent of t's group + c] += Σ_t z[t, c]·y_t, float32, always in the same order."""
    groups, d = len(row_offsets) - 1, y.shape[1]
    grid = (tiles(z.shape[1], TILE), tiles(d, TILE), groups)
    offsets = on_device(row_offsets, z.device)
    gradient_kernel[grid](z, y, out, token_offsets, offsets, d, z.stride(0), **_constants(z.dtype))
