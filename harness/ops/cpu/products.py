"""Decode, residual, loss and latent gradients: sparse, or dense where a group has few latents per active one."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from harness.ops import reference
from harness.ops.cpu import product_kernels as kernels
from harness.ops.cpu.arrays import TILE_ELEMENTS, array, blocks, floats, scratch
from harness.ops.cpu.compile import Floats, Longs
from harness.ops.cpu.team import cuts, run
from harness.ops.interface import Codes, Groups, Nesting, Reduce, is_whole

DENSE_ROWS_PER_K = 7
"""A group of at most this many latents per active one is cheaper as dense products: at this width two gathers (decode,
dz) and two accumulations (weight gradients) cost as much as four products. Measured (docs/lab-log.md)."""

TOKENS_AT_LEAST = 32
"""Fewer tokens are not worth a work item of their own."""

DENSE_TOKENS = 512
"""Tokens of a dense product at a time, at most: their codes, residuals and gradients stay in a core's own cache, and
the product packs the weights rarely enough (docs/lab-log.md)."""

ALIGNED = 16
"""Numbers in 64 bytes. Products are written faster to rows that begin at such multiples."""

_NO_SCALE = np.empty(0, np.float32)


def dense_rows_per_k(precision: str) -> int:
    return DENSE_ROWS_PER_K


def is_dense(rows: slice, k: int) -> bool:
    return 0 < rows.stop - rows.start <= DENSE_ROWS_PER_K * k


def dense_from(width: int) -> int:
    """Active latents from which a group of this width is dense, less one."""
    return (width - 1) // DENSE_ROWS_PER_K


def _dense_blocks(groups: Groups, k: int) -> list[tuple[slice, slice]]:
    """(tokens, rows) of the groups whose products are dense, tokens in tiles, at least one for each thread."""
    spans = [(tokens, rows) for tokens, rows in groups.spans if is_dense(rows, k)]
    widest = max((rows.stop - rows.start for _, rows in spans), default=1)
    tokens = max((tokens.stop - tokens.start for tokens, _ in spans), default=1)
    share = -(-tokens // torch.get_num_threads())
    size = max(1, min(share, DENSE_TOKENS, TILE_ELEMENTS // widest))
    return list(blocks(spans, size))


def sparse_ranges(groups: Groups, k: int) -> list[tuple[int, int]]:
    """Ranges of the tokens whose products are sparse; tokens of groups without latents are among them."""
    ranges: list[tuple[int, int]] = []
    for tokens, rows in groups.spans:
        if not is_dense(rows, k):
            pieces = cuts(tokens.stop - tokens.start, TOKENS_AT_LEAST)
            ranges += [(tokens.start + begin, tokens.start + end) for begin, end in pieces]
    return ranges


def reconstruct(
    codes: Codes,
    W_dec: Float[Tensor, "rows d"],
    x: Float[Tensor, "tokens d"],
    scale: Float[Tensor, " tokens"] | None,
    groups: Groups,
    reduce: Reduce | None = None,
) -> tuple[Float[Tensor, "tokens d"], Float[Tensor, "tokens k"], Float[Tensor, " tokens"]]:
    if W_dec.dtype is torch.float64 or x.dtype is torch.float64:
        return reference.reconstruct(codes, W_dec, x, scale, groups, reduce)
    k = codes.values.shape[1]
    weight, inputs = W_dec.to(torch.float32), x.to(torch.float32).contiguous()
    residual, dz, squared = torch.empty(x.shape), torch.empty(codes.values.shape), torch.empty(x.shape[0])
    whole = is_whole(codes.index)
    values, index, table = floats(codes.values), array(codes.index[:1] if whole else codes.index), array(weight)
    factors = _NO_SCALE if scale is None else floats(scale)
    dense, sparse = _dense_blocks(groups, k), sparse_ranges(groups, k)

    def decode_dense(item: int) -> None:
        tokens, rows = dense[item]
        active = codes.values[tokens] if whole else _densified(values, index, tokens, rows)
        torch.mm(active, weight[rows], out=residual[tokens])
        if scale is not None:
            residual[tokens].mul_(scale[tokens, None])

    def latent_grads_dense(item: int) -> None:
        tokens, rows = dense[item]
        count, width = tokens.stop - tokens.start, rows.stop - rows.start
        stride = -(-width // ALIGNED) * ALIGNED
        products = scratch("dense", count * stride, torch.float32).view(count, stride)
        torch.mm(residual[tokens], weight[rows].T, out=products[:, :width])
        shared = (products.numpy(), residual.numpy(), dz.numpy(), squared.numpy())
        if whole:
            kernels.mask_products(tokens.start, tokens.stop, values, *shared)
        else:
            kernels.gather_products(tokens.start, tokens.stop, values, index, rows.start, *shared)

    def dense_fused(item: int) -> None:
        decode_dense(item)
        tokens, _ = dense[item]
        torch.sub(inputs[tokens], residual[tokens], out=residual[tokens])
        latent_grads_dense(item)

    def sparse_fused(item: int) -> None:
        kernels.reconstruct(
            *sparse[item], values, index, table, inputs.numpy(), factors, residual.numpy(), dz.numpy(), squared.numpy()
        )

    def decode_sparse(item: int) -> None:
        kernels.decode(*sparse[item], values, index, table, factors, residual.numpy())

    def latent_grads_sparse(item: int) -> None:
        kernels.latent_grads(*sparse[item], values, index, table, residual.numpy(), dz.numpy(), squared.numpy())

    if reduce is None:
        run(len(dense), dense_fused)
        run(len(sparse), sparse_fused)
    else:
        run(len(dense), decode_dense)
        run(len(sparse), decode_sparse)
        torch.sub(inputs, reduce(residual), out=residual)
        run(len(dense), latent_grads_dense)
        run(len(sparse), latent_grads_sparse)
    return residual, dz, squared


def latent_grads(
    codes: Codes, W_dec: Float[Tensor, "rows d"], residual: Float[Tensor, "tokens d"], groups: Groups
) -> Float[Tensor, "tokens k"]:
    k = codes.values.shape[1]
    if is_whole(codes.index):
        products = residual @ W_dec.to(torch.float32).T
        return products.mul_(codes.values > 0)
    if W_dec.dtype is torch.float64 or any(is_dense(rows, k) for _, rows in groups.spans):
        return reference.latent_grads(codes, W_dec, residual, groups)
    dz, squared = torch.empty(codes.values.shape), np.empty(codes.values.shape[0], np.float32)
    values, index, table, vectors = floats(codes.values), array(codes.index), floats(W_dec), floats(residual)
    ranges = sparse_ranges(groups, k)

    def work(item: int) -> None:
        kernels.latent_grads(*ranges[item], values, index, table, vectors, dz.numpy(), squared)

    run(len(ranges), work)
    return dz


def reconstruct_nested(
    codes: Codes, nesting: Nesting, W_dec: Float[Tensor, "rows d"], x: Float[Tensor, "tokens d"]
) -> tuple[
    Float[Tensor, "tokens d"],
    Float[Tensor, "blocks tokens d"],
    Float[Tensor, "tokens k"],
    Float[Tensor, "blocks tokens"],
]:
    """See `harness.ops.nested`. A single group, sparse, float32."""
    blocks, (tokens, d) = len(nesting.weights), x.shape
    residual = torch.empty(tokens, d)
    pulls, dz, squared = torch.empty(blocks, tokens, d), torch.empty(codes.values.shape), torch.empty(blocks, tokens)
    values, index, table, inputs = floats(codes.values), array(codes.index), floats(W_dec), floats(x)
    block, weights, ranges = array(nesting.block), np.array(nesting.weights, np.float32), cuts(tokens, TOKENS_AT_LEAST)
    outputs = residual.numpy(), pulls.numpy(), dz.numpy(), squared.numpy()

    def work(item: int) -> None:
        kernels.reconstruct_nested(
            *ranges[item], values, index, block, weights, nesting.headline, table, inputs, *outputs
        )

    run(len(ranges), work)
    return residual, pulls, dz, squared


def _densified(values: Floats, index: Longs, tokens: slice, rows: slice) -> Float[Tensor, "tokens rows"]:
    """The codes of these tokens as a matrix over the group's rows, in this thread's scratch memory."""
    count, width = tokens.stop - tokens.start, rows.stop - rows.start
    dense = scratch("dense", count * width, torch.float32).view(count, width)
    kernels.densify(tokens.start, tokens.stop, tokens.start, values, index, rows.start, dense.numpy())
    return dense
