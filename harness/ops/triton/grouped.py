"""Dense products of every group on a GPU: one launch for all, which reads their sizes on the device; of a single group
cuBLAS's product.

They serve the encoder of a Switch SAE, and groups with so few latents per active one that products over their whole
width are cheaper than gathers. Operands are float32 or bfloat16, sums float32, results of the dtype of the output.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from harness.ops.triton.grouped_kernels import gradient_kernel, latent_products_kernel, reconstruction_kernel
from harness.ops.triton.sizes import INTERPRETED, power_of_2, tiles

TILE = 64 if INTERPRETED else 128
"""Rows and columns of the output that a program computes from bfloat16; half as many from float32."""

STEP = 256 if INTERPRETED else 64
"""Products that it adds up at a time; of float32 half as many."""

PRECISION = "ieee" if INTERPRETED else "tf32x3"
"""Of float32 products. Three products of the matrix units are as exact as float32 and faster than its own units."""


def _tile(dtype: torch.dtype) -> int:
    return TILE if dtype is torch.bfloat16 else TILE // 2


def _constants(dtype: torch.dtype, groups: int | None = None) -> dict[str, int | bool | str]:
    low = dtype is torch.bfloat16
    constants: dict[str, int | bool | str] = {
        # the interpreter computes products of bfloat16 wrongly
        "UPCAST": INTERPRETED and low,
        "TILE": _tile(dtype),
        "STEP": STEP if low else STEP // 2,
        "PRECISION": "ieee" if low else PRECISION,
        "num_warps": 8 if low else 4,
    }
    if groups is not None:
        constants["GROUPS"] = power_of_2(groups)
    return constants


def _product(a: Float[Tensor, "m k"], b: Float[Tensor, "k n"], out: Float[Tensor, "m n"]) -> None:
    """out = a·b, summed in float32; `out` has the dtype of the operands or float32."""
    if out.dtype is a.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, torch.float32, out=out)
    else:
        out.copy_(a.float() @ b.float())


def _token_tiles(tokens: int, groups: int, tile: int) -> int:
    """At least as many tiles as any division of the tokens into groups needs."""
    return tiles(tokens, tile) + groups


def latent_products(
    x: Float[Tensor, "tokens d"],
    weight: Float[Tensor, "rows d"],
    bias: Float[Tensor, " rows"] | None,
    token_offsets: Int[Tensor, " groups_plus_1"],
    row_starts: Int[Tensor, " groups_plus_1"],
    out: Float[Tensor, "tokens widest"],
) -> None:
    """out[t, c] = x_t · weight[first latent of t's group + c] (+ bias), for c below the group's width; the rest of
    `out` is left as it is."""
    groups, (tokens, d) = len(row_starts) - 1, x.shape
    if groups == 1 and bias is not None and out.dtype is x.dtype:
        torch.addmm(bias, x, weight.T, out=out)
        return
    if groups == 1 and bias is None:
        _product(x, weight.T, out)
        return
    tile = _tile(x.dtype)
    grid = (_token_tiles(tokens, groups, tile), tiles(out.shape[1], tile))
    latent_products_kernel[grid](
        x, weight, x if bias is None else bias, out, token_offsets, row_starts, groups, d, out.stride(0),
        BIASED=bias is not None, **_constants(x.dtype, groups),
    )  # fmt: skip


def reconstructions(
    z: Float[Tensor, "tokens widest"],
    weight: Float[Tensor, "rows d"],
    token_offsets: Int[Tensor, " groups_plus_1"],
    row_starts: Int[Tensor, " groups_plus_1"],
    out: Float[Tensor, "tokens d"],
) -> None:
    """out_t = Σ_c z[t, c]·weight[first latent of t's group + c], float32; every token belongs to a group."""
    groups, (tokens, d) = len(row_starts) - 1, out.shape
    if groups == 1:
        _product(z, weight, out)
        return
    tile = _tile(z.dtype)
    grid = (_token_tiles(tokens, groups, tile), tiles(d, tile))
    reconstruction_kernel[grid](
        z, weight, out, token_offsets, row_starts, groups, d, z.stride(0), **_constants(z.dtype, groups)
    )


def add_gradients(
    z: Float[Tensor, "tokens widest"],
    y: Float[Tensor, "tokens d"],
    token_offsets: Int[Tensor, " groups_plus_1"],
    row_starts: Int[Tensor, " groups_plus_1"],
    out: Float[Tensor, "rows d"],
    sums: Float[Tensor, " rows"] | None = None,
) -> None:
    """out[first latent of t's group + c] += Σ_t z[t, c]·y_t and sums[…] += Σ_t z[t, c], float32, always in the same
    order."""
    groups, d = len(row_starts) - 1, y.shape[1]
    if groups == 1:
        added = torch.empty_like(out)
        _product(z.T, y, added)
        out += added
        if sums is not None:
            sums += z.sum(dim=0, dtype=torch.float32)
        return
    tile = _tile(z.dtype)
    grid = (tiles(z.shape[1], tile), tiles(d, tile), groups)
    gradient_kernel[grid](
        z, y, out, out if sums is None else sums, token_offsets, row_starts, d, z.stride(0),
        SUMMED=sums is not None, **_constants(z.dtype),
    )  # fmt: skip
