"""Decode, residual, squared error and dz of one token."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode_kernel(
    values: tl.tensor, index: tl.tensor, weight: tl.tensor, x: tl.tensor, scale: tl.tensor, residual: tl.tensor,
    dz: tl.tensor, squared: tl.tensor, k: tl.tensor, d: tl.tensor,
    DECODE: tl.constexpr, GRADS: tl.constexpr, SCALED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
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
