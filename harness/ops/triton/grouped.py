"""Dense products of every group at once on a GPU: one launch for all, which reads their sizes on the device.

They serve the encoder of a Switch SAE, and groups with so few latents per active one that products over their whole
width are cheaper than gathers. Operands are float32 or bfloat16, sums float32, results of the dtype of the output.
"""

from __future__ import annotations

import functools

import torch
from jaxtyping import Float, Int
from torch import Tensor

from harness.ops.triton.grouped_kernels import gradient_kernel, latent_products_kernel, reconstruction_kernel
from harness.ops.triton.sizes import INTERPRETED, power_of_2, tiles

TILE = 64 if INTERPRETED else 128
"""Rows and columns of the output that a program computes."""

STEP = 256 if INTERPRETED else 64
"""Products that it adds up at a time."""


@functools.lru_cache(maxsize=64)
def on_device(numbers: tuple[int, ...], device: torch.device) -> Int[Tensor, " count"]:
    """Host numbers as an int32 tensor. Kept, since copying them waits for the device."""
    return torch.tensor(numbers, dtype=torch.int32, device=device)


def _constants(dtype: torch.dtype, groups: int | None = None) -> dict[str, int | bool]:
    # the interpreter computes products of bfloat16 wrongly
    upcast = INTERPRETED and dtype is torch.bfloat16
    constants: dict[str, int | bool] = {"UPCAST": upcast, "TILE": TILE, "STEP": STEP, "num_warps": 8}
    if groups is not None:
        constants["GROUPS"] = power_of_2(groups)
    return constants


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
