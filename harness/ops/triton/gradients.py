"""Gradients of both matrices and the encoder bias on a GPU, sums over each latent's own entries.

One stable sort of the entries by latent serves all three. Several programs sum a latent with more than `PIECE` entries,
and the pieces are added in order: no atomics, the same bits every time.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from harness.ops.sizes import PIECE
from harness.ops.triton.gradient_kernels import combine_kernel, segments_kernel
from harness.ops.triton.sizes import INTERPRETED, power_of_2

TILE_ELEMENTS = (1 << 14) if INTERPRETED else (1 << 11)
"""Numbers of token rows that a program holds at a time, of each matrix."""


def by_latent(
    index: Int[Tensor, "tokens k"], rows: int
) -> tuple[Int[Tensor, " entries"], Int[Tensor, " rows"], Int[Tensor, " rows"]]:
    """(order, begins, ends): the entries t·k + j sorted by latent, then by entry, and each latent's range of them."""
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
    """See `interface.Ops.weight_grads`. All contiguous; x and residual of any floating dtype, the others float32."""
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
    sizes, warps = (rows, d, k), 8 if block_d > 4096 else 4
    constants = {"PIECE": PIECE, "BLOCK_E": block_e, "BLOCK_D": block_d, "num_warps": warps}
    segments_kernel[(rows,)](*shared, *out, *sizes, EXTRA=False, **constants)
    if not most_extras:
        return
    extra = tuple(torch.empty((most_extras, *grad.shape[1:]), device=index.device) for grad in out)
    segments_kernel[(most_extras,)](*shared, *extra, *sizes, EXTRA=True, **constants)
    combine_kernel[(most_extras,)](
        begins, ends, owners, extra_ends, *extra, *out, rows, d, PIECE=PIECE, BLOCK_D=block_d, num_warps=warps
    )
