"""Decode, residual, squared error and dz of each token in one pass on a GPU, while its k decoder rows are in cache."""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false
# (the language of the kernels has types of its own)
from __future__ import annotations

import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from harness.ops.triton.sizes import INTERPRETED, power_of_2

TILE_ELEMENTS = (1 << 16) if INTERPRETED else (1 << 12)
"""Numbers of decoder rows that a program holds at a time."""


@triton.jit
def decode_kernel(
    values, index, weight, x, scale, residual, dz, squared, k, d,
    DECODE: tl.constexpr, GRADS: tl.constexpr, SCALED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One token. With DECODE alone `residual` receives the partial reconstruction; with GRADS alone it comes in as the
    whole reconstruction and leaves as the residual."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = column < d
    if DECODE:
        total = tl.zeros([BLOCK_D], tl.float32)
        for begin in range(0, k, BLOCK_K):
            slot = begin + tl.arange(0, BLOCK_K)
            value = tl.load(values + token * k + slot, mask=slot < k, other=0.0)
            # a NaN is not 0 and must show
            active = value != 0
            latent = tl.load(index + token * k + slot, mask=active, other=0)
            rows = tl.load(
                weight + latent[:, None] * d + column[None, :], mask=active[:, None] & inside[None, :], other=0
            )
            total += tl.sum(rows.to(tl.float32) * value[:, None], axis=0)
        if SCALED:
            total *= tl.load(scale + token)
    else:
        total = tl.load(residual + token * d + column, mask=inside, other=0.0)
    if GRADS:
        total = tl.load(x + token * d + column, mask=inside, other=0.0).to(tl.float32) - total
        tl.store(squared + token, tl.sum(total * total, axis=0))
        for begin in range(0, k, BLOCK_K):
            slot = begin + tl.arange(0, BLOCK_K)
            active = tl.load(values + token * k + slot, mask=slot < k, other=0.0) > 0
            latent = tl.load(index + token * k + slot, mask=active, other=0)
            rows = tl.load(
                weight + latent[:, None] * d + column[None, :], mask=active[:, None] & inside[None, :], other=0
            )
            products = tl.sum(rows.to(tl.float32) * total[None, :], axis=1)
            tl.store(dz + token * k + slot, tl.where(active, products, 0.0), mask=slot < k)
    tl.store(residual + token * d + column, total, mask=inside)


def decode(
    values: Float[Tensor, "tokens k"],
    index: Int[Tensor, "tokens k"],
    weight: Float[Tensor, "rows d"],
    x: Float[Tensor, "tokens d"],
    scale: Float[Tensor, " tokens"] | None,
    out: tuple[Float[Tensor, "tokens d"], Float[Tensor, "tokens k"], Float[Tensor, " tokens"]],
    *,
    forward: bool,
    backward: bool,
) -> None:
    """Writes out = (residual, dz, squared error). `forward` alone leaves the partial reconstruction in place of the
    residual, `backward` alone takes the whole one from there; both together do everything in one pass."""
    (tokens, k), d = values.shape, x.shape[1]
    if tokens == 0:
        return
    block_d = power_of_2(d)
    block_k = max(1, min(power_of_2(k), TILE_ELEMENTS // block_d))
    decode_kernel[(tokens,)](
        values, index, weight, x, x if scale is None else scale, *out, k, d,
        DECODE=forward, GRADS=backward, SCALED=scale is not None, BLOCK_K=block_k, BLOCK_D=block_d,
        num_warps=8 if block_d > TILE_ELEMENTS else 4,
    )  # fmt: skip
