"""Dense products of every group on a GPU: one launch for all, which reads their sizes on the device; of a single group
cuBLAS's product.

They serve the encoder of a Switch SAE, and groups with so few latents per active one that products over their whole
width are cheaper than gathers. Operands are float32 or bfloat16, sums float32, results of the dtype of the output.
Rows of `z` and `out` may be wider than their contents (`padded`), so that every row is aligned.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from harness.ops.sizes import padded
from harness.ops.triton.grouped_kernels import (
    column_sums_kernel,
    gradient_kernel,
    latent_products_kernel,
    reconstruction_kernel,
)
from harness.ops.triton.sizes import INTERPRETED, power_of_2, tiles


class Tile(NamedTuple):
    """What a program computes, and how."""

    rows: int
    columns: int
    step: int
    """Products that it adds up at a time."""
    warps: int
    stages: int
    """Steps whose operands are in shared memory or on the way there."""


LATENT_PRODUCTS = Tile(128, 256, 64, 8, 4)
RECONSTRUCTIONS = Tile(128, 256, 64, 8, 4)
WEIGHT_GRADIENTS = Tile(128, 256, 64, 8, 4)
"""For bfloat16 with aligned rows: the fastest of twelve on an H200 (docs/lab-log.md)."""

ADDED_GRADIENTS = Tile(128, 128, 64, 8, 3)
"""The same where gradients are added to others, which needs more registers."""

EXACT = Tile(64, 64, 256, 4, 1) if INTERPRETED else Tile(64, 64, 32, 4, 3)
"""For float32 and for rows that are not aligned, both of which need more registers; and in the interpreter."""

TOGETHER = 8
"""Tiles of rows whose programs are neighbours."""

DESCRIPTORS = True
"""Whether Hopper's copy engine (TMA) loads the operands, where their rows are aligned. Not for the gradients, which
are faster without it."""

PRECISION = "ieee" if INTERPRETED else "tf32x3"
"""Of float32 products. Three products of the matrix units are as exact as float32 and faster than its own units."""

SUM_STEP, SUM_COLUMNS = 128, 32
"""Rows and columns that a program of the column sums reads at a time."""


def _aligned(*matrices: Tensor) -> bool:
    """Whether all rows begin at multiples of 16 bytes."""
    return all(
        matrix.stride(0) * matrix.element_size() % 16 == 0 and matrix.data_ptr() % 16 == 0 for matrix in matrices
    )


def _tile(best: Tile, *matrices: Tensor) -> Tile:
    """The tile for a product of these matrices."""
    low = all(matrix.dtype is torch.bfloat16 for matrix in matrices)
    return best if low and _aligned(*matrices) and not INTERPRETED else EXACT


def _constants(dtype: torch.dtype, tile: Tile) -> dict[str, Any]:
    low = dtype is torch.bfloat16
    return {
        # the interpreter computes products of bfloat16 wrongly
        "UPCAST": INTERPRETED and low,
        "PRECISION": "ieee" if low else PRECISION,
        "TOGETHER": TOGETHER,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "STEP": tile.step,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _describable(*matrices: Tensor) -> bool:
    """Whether descriptors are wanted, and possible for these matrices on their device."""
    if not DESCRIPTORS or any(matrix.dtype is not torch.bfloat16 for matrix in matrices):
        return False
    if matrices[0].is_cuda and torch.cuda.get_device_capability(matrices[0].device)[0] < 9:
        return False
    return _aligned(*matrices)


def _described(matrix: Float[Tensor, "rows columns"], rows: int, columns: int) -> TensorDescriptor:
    """A descriptor that loads tiles of this size; numbers outside of the matrix are 0."""
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


def _product(a: Float[Tensor, "m k"], b: Float[Tensor, "k n"], out: Float[Tensor, "m n"]) -> None:
    """out = a·b, summed in float32; `out` has the dtype of the operands or float32."""
    if out.dtype is a.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, torch.float32, out=out)
    else:
        out.copy_(a.float() @ b.float())


def _with_rows(weight: Float[Tensor, "rows ..."], rows: int) -> Float[Tensor, "more ..."]:
    """`weight` with zeros up to `rows` rows."""
    more = torch.zeros((rows, *weight.shape[1:]), dtype=weight.dtype, device=weight.device)
    more[: len(weight)] = weight
    return more


def wide(matrix: Float[Tensor, "rows width"]) -> Float[Tensor, "rows stride"]:
    """The matrix with what lies between its rows: cuBLAS is several times slower at unaligned widths."""
    return matrix.as_strided((len(matrix), matrix.stride(0)), (matrix.stride(0), 1))


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
    """out[t, c] = x_t · weight[first latent of t's group + c] (+ bias), for c below the group's width; the rest of a
    row of `out`, up to its stride, is undefined."""
    groups, (tokens, d) = len(row_starts) - 1, x.shape
    if groups == 1 and len(weight) < out.stride(0) == padded(len(weight)):
        out = wide(out)
        weight, bias = _with_rows(weight, out.shape[1]), None if bias is None else _with_rows(bias, out.shape[1])
    if groups == 1 and bias is not None and out.dtype is x.dtype:
        torch.addmm(bias, x, weight.T, out=out)
        return
    if groups == 1 and bias is None:
        _product(x, weight.T, out)
        return
    tile = _tile(LATENT_PRODUCTS, x, weight)
    across = tiles(out.shape[1], tile.columns)
    operands, described = (x, weight), _describable(x, weight)
    if described:
        operands = _described(x, tile.rows, tile.step), _described(weight, tile.columns, tile.step)
    latent_products_kernel[(_token_tiles(tokens, groups, tile.rows) * across,)](
        *operands, weight if bias is None else bias, out, token_offsets, row_starts, groups, d, out.stride(0), across,
        BIASED=bias is not None, DESCRIBED=described, EVEN=d % tile.step == 0, GROUPS=power_of_2(groups),
        **_constants(x.dtype, tile),
    )  # fmt: skip


def reconstructions(
    z: Float[Tensor, "tokens widest"],
    weight: Float[Tensor, "rows d"],
    token_offsets: Int[Tensor, " groups_plus_1"],
    row_starts: Int[Tensor, " groups_plus_1"],
    out: Float[Tensor, "tokens d"],
) -> None:
    """out_t = Σ_c z[t, c]·weight[first latent of t's group + c], float32; every token belongs to a group. The rest of
    a row of `z`, up to its stride, is 0."""
    groups, (tokens, d) = len(row_starts) - 1, out.shape
    if groups == 1:
        _product(wide(z), _with_rows(weight, z.stride(0)) if len(weight) < z.stride(0) else weight, out)
        return
    tile, stride = _tile(RECONSTRUCTIONS, z, weight), z.stride(0)
    across = tiles(d, tile.columns)
    operands, described = (z, weight), _describable(z, weight)
    if described:
        operands = _described(z, tile.rows, tile.step), _described(weight, tile.step, tile.columns)
    reconstruction_kernel[(_token_tiles(tokens, groups, tile.rows) * across,)](
        *operands, out, token_offsets, row_starts, groups, d, stride, across,
        DESCRIBED=described, EVEN=stride % tile.step == 0, WHOLE=d % tile.columns == 0, GROUPS=power_of_2(groups),
        **_constants(z.dtype, tile),
    )  # fmt: skip


def weight_gradients(
    z: Float[Tensor, "tokens widest"],
    y: Float[Tensor, "tokens d"],
    token_offsets: Int[Tensor, " groups_plus_1"],
    row_starts: Int[Tensor, " groups_plus_1"],
    out: Float[Tensor, "rows d"],
    sums: Float[Tensor, " rows"] | None = None,
    *,
    add: bool = False,
) -> None:
    """out[first latent of t's group + c] = Σ_t z[t, c]·y_t and sums[…] = Σ_t z[t, c], float32, always in the same
    order; 0 for latents of groups without tokens. With `add` they are added to `out` and `sums`."""
    groups, d = len(row_starts) - 1, y.shape[1]
    if groups == 1:
        z = wide(z)
        product = torch.empty((z.shape[1], d), device=out.device) if add or len(out) < z.shape[1] else out
        _product(z.T, y, product)
        if add:
            out += product[: len(out)]
        elif product is not out:
            out.copy_(product[: len(out)])
        if sums is not None:
            own = z.sum(dim=0, dtype=torch.float32)[: len(sums)]
            sums.copy_(sums + own if add else own)
        return
    tile, stride = _tile(ADDED_GRADIENTS if add else WEIGHT_GRADIENTS, z, y), z.stride(0)
    down, across = tiles(z.shape[1], tile.rows), tiles(d, tile.columns)
    gradient_kernel[(groups * down * across,)](
        z, y, out, token_offsets, row_starts, d, stride, down, across,
        ADD=add, EVEN=stride % tile.rows == 0, WHOLE=d % tile.columns == 0,
        **_constants(z.dtype, tile),
    )  # fmt: skip
    if sums is not None:
        column_sums_kernel[(tiles(z.shape[1], SUM_COLUMNS), groups)](
            z, sums, token_offsets, row_starts, stride, ADD=add, STEP=SUM_STEP, COLUMNS=SUM_COLUMNS
        )
