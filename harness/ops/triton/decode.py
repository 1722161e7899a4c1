"""Decode, residual, squared error and dz of each token in one pass on a GPU, while its k decoder rows are in cache."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from harness.ops.triton.decode_kernels import decode_kernel
from harness.ops.triton.sizes import INTERPRETED, power_of_2

TILE_ELEMENTS = (1 << 16) if INTERPRETED else (1 << 13)
"""Numbers of decoder rows that a program holds at a time; at least four rows."""


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
    block_k = min(power_of_2(k), max(4, TILE_ELEMENTS // block_d))
    decode_kernel[(tokens,)](
        values, index, weight, x, x if scale is None else scale, *out, k, d,
        DECODE=forward, GRADS=backward, SCALED=scale is not None, BLOCK_K=block_k, BLOCK_D=block_d,
        num_warps=8 if block_d > 4096 else 4,
    )  # fmt: skip
