"""Weight gradients: sums over each latent's own entries, or dense products where a group is narrow."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from harness.ops import reference
from harness.ops.cpu import product_kernels as kernels
from harness.ops.cpu.arrays import TILE_ELEMENTS, array, floats, scratch
from harness.ops.cpu.compile import Bytes, Floats, Ints, Longs
from harness.ops.cpu.products import TOKENS_AT_LEAST, is_dense, sparse_ranges
from harness.ops.cpu.team import ITEMS_PER_THREAD, cuts, run
from harness.ops.interface import Codes, Groups, Nesting, is_whole

PIECE_ENTRIES = 4096
"""A latent with more entries is summed in pieces of this many, so that threads can share it."""


def weight_grads(
    codes: Codes,
    dz: Float[Tensor, "tokens k"],
    x: Float[Tensor, "tokens d"],
    residual: Float[Tensor, "tokens d"],
    groups: Groups,
    out: tuple[Float[Tensor, "rows d"], Float[Tensor, "rows d"], Float[Tensor, " rows"]],
) -> None:
    if out[0].dtype is torch.float64:
        return reference.weight_grads(codes, dz, x, residual, groups, out)
    k = codes.values.shape[1]
    inputs, residual = x.to(torch.float32).contiguous(), residual.contiguous()
    if is_whole(codes.index):
        _whole_weight_grads(codes.values, dz, inputs, residual, out)
        return
    values, gradients, index = floats(codes.values), floats(dz), array(codes.index)
    for tokens, rows in groups.spans:
        if is_dense(rows, k):
            _dense_weight_grads(values, gradients, index, inputs, residual, tokens, rows, out)
    sparse_rows = [rows for _, rows in groups.spans if not is_dense(rows, k) and rows.stop > rows.start]
    if sparse_rows:
        ranges = sparse_ranges(groups, k)
        _sparse_weight_grads(values, gradients, index, inputs, residual, ranges, sparse_rows, out)


def nested_weight_grads(
    codes: Codes,
    dz: Float[Tensor, "tokens k"],
    nesting: Nesting,
    x: Float[Tensor, "tokens d"],
    pulls: Float[Tensor, "blocks tokens d"],
    out: tuple[Float[Tensor, "rows d"], Float[Tensor, "rows d"], Float[Tensor, " rows"]],
) -> None:
    """See `harness.ops.nested`. A single group, sparse, float32."""
    values, gradients, index = floats(codes.values), floats(dz), array(codes.index)
    inputs, flat = x.to(torch.float32).contiguous(), pulls.flatten(0, 1)
    rows, ranges = slice(0, out[2].shape[0]), cuts(x.shape[0], TOKENS_AT_LEAST)
    _sparse_weight_grads(values, gradients, index, inputs, flat, ranges, [rows], out, array(nesting.block))


def _whole_weight_grads(values: Tensor, dz: Tensor, x: Tensor, residual: Tensor, out: tuple[Tensor, ...]) -> None:
    W_enc_grad, W_dec_grad, b_enc_grad = out
    for grad in out:
        grad.zero_()
    size = max(1, TILE_ELEMENTS // values.shape[1])
    for begin in range(0, values.shape[0], size):
        block = slice(begin, begin + size)
        W_dec_grad.addmm_(values[block].T, residual[block])
        W_enc_grad.addmm_(dz[block].T, x[block])
        b_enc_grad.add_(dz[block].sum(dim=0))


def _dense_weight_grads(
    values: Floats,
    gradients: Floats,
    index: Longs,
    x: Tensor,
    residual: Tensor,
    tokens: slice,
    rows: slice,
    out: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Products of one group's whole width; several threads inside each product, since all write the same rows."""
    W_enc_grad, W_dec_grad, b_enc_grad = (grad[rows] for grad in out)
    for grad in (W_enc_grad, W_dec_grad, b_enc_grad):
        grad.zero_()
    width = rows.stop - rows.start
    size = max(1, TILE_ELEMENTS // width)
    for begin in range(tokens.start, tokens.stop, size):
        block = slice(begin, min(begin + size, tokens.stop))
        count = block.stop - block.start
        dense = scratch("dense", count * width, torch.float32).view(count, width)
        matrix, pieces = dense.numpy(), [(block.start + a, block.start + b) for a, b in cuts(count, TOKENS_AT_LEAST)]
        for source, factor, grad in ((values, residual, W_dec_grad), (gradients, x, W_enc_grad)):

            def fill(
                item: int,
                source: Floats = source,
                matrix: Floats = matrix,
                pieces: list[tuple[int, int]] = pieces,
                first: int = begin,
            ) -> None:
                kernels.densify(*pieces[item], first, source, index, rows.start, matrix)

            run(len(pieces), fill)
            grad.addmm_(dense.T, factor[block])
        b_enc_grad.add_(dense.sum(dim=0))


def _sparse_weight_grads(
    values: Floats,
    gradients: Floats,
    index: Longs,
    x: Tensor,
    residual: Tensor,
    ranges: list[tuple[int, int]],
    spans: list[slice],
    out: tuple[Tensor, Tensor, Tensor],
    block: Bytes | None = None,
) -> None:
    """One stable counting sort by latent serves all three gradients; then every latent sums its own entries. With
    `block`, `residual` are the pulls (blocks·tokens, d)."""
    latents = out[2].shape[0]
    share = max(1, -(-len(ranges) // torch.get_num_threads()))
    shares = [ranges[begin : begin + share] for begin in range(0, len(ranges), share)]
    counts = np.zeros((max(1, len(shares)), latents), np.int64)

    def count(item: int) -> None:
        for begin, end in shares[item]:
            kernels.count_by_latent(begin, end, values, gradients, index, counts[item])

    run(len(shares), count)
    # entries are ordered by latent, then by share, then by token, which is the order of a single thread
    ends = counts.T.cumsum().reshape(latents, -1)
    place = np.ascontiguousarray((ends - counts.T).T)
    total = int(ends[-1, -1])
    token = np.empty(total, np.int32)
    weight_enc, weight_dec = np.empty(total, np.float32), np.empty(total, np.float32)

    def sort(item: int) -> None:
        for begin, end in shares[item]:
            kernels.sort_by_latent(begin, end, values, gradients, index, place[item], token, weight_enc, weight_dec)

    source, begun = token, None if block is None else place.copy()
    run(len(shares), sort)
    if block is not None and begun is not None:
        source = np.empty(total, np.int32)
        sources, blocks, places = source, block, begun

        def find(item: int) -> None:
            for begin, end in shares[item]:
                kernels.sources_by_latent(begin, end, values, gradients, index, blocks, places[item], sources)

        run(len(shares), find)
    rows = np.concatenate([np.arange(span.start, span.stop, dtype=np.int64) for span in spans])
    last = ends[rows, -1]
    first = last - counts.sum(axis=0)[rows]
    _accumulate(
        rows, first, np.minimum(last, first + PIECE_ENTRIES), token, source, weight_enc, weight_dec, x, residual, out
    )
    long = np.flatnonzero(last - first > PIECE_ENTRIES)
    if not long.size:
        return
    rest = [
        (rows[i], begin, min(begin + PIECE_ENTRIES, last[i]))
        for i in long
        for begin in range(first[i] + PIECE_ENTRIES, last[i], PIECE_ENTRIES)
    ]
    owner, first, last = np.array(rest).T
    d = out[0].shape[1]
    parts = torch.empty(len(rest), d), torch.empty(len(rest), d), torch.empty(len(rest))
    _accumulate(np.arange(len(rest)), first, last, token, source, weight_enc, weight_dec, x, residual, parts)
    for grad, part in zip(out, parts, strict=True):
        for row, piece in zip(owner.tolist(), part, strict=True):
            grad[row] += piece


def _accumulate(
    rows: Longs,
    first: Longs,
    last: Longs,
    token: Ints,
    source: Ints,
    weight_enc: Floats,
    weight_dec: Floats,
    x: Tensor,
    residual: Tensor,
    out: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Write the sums of the entries first[i] … last[i] to row rows[i]; threads share the rows by number of entries."""
    pieces = np.stack([rows, first, last], axis=1)
    # writing a row costs about as much as one entry
    cost = (last - first + 1).cumsum()
    shares = min(len(rows), ITEMS_PER_THREAD * torch.get_num_threads())
    targets: Longs = cost[-1] * np.arange(1, shares, dtype=np.int64) // shares
    bounds = [0, *map(int, np.searchsorted(cost, targets)), len(rows)]
    inputs, residuals = x.numpy(), residual.numpy()
    W_enc_grad, W_dec_grad, b_enc_grad = (grad.numpy() for grad in out)

    def work(item: int) -> None:
        kernels.accumulate(
            bounds[item],
            bounds[item + 1],
            pieces,
            token,
            source,
            weight_enc,
            weight_dec,
            inputs,
            residuals,
            W_enc_grad,
            W_dec_grad,
            b_enc_grad,
        )

    run(len(bounds) - 1, work)


def fired(codes: Codes, rows: int) -> Int[Tensor, " rows"]:
    counts = torch.zeros(rows, dtype=torch.int64)
    if is_whole(codes.index):
        kernels.count_positive(array(codes.values), counts.numpy())
        return counts
    kernels.count_active(array(codes.values), array(codes.index), counts.numpy())
    return counts


def latent_sums(values: Float[Tensor, "tokens k"], index: Int[Tensor, "tokens k"], rows: int) -> Float[Tensor, " rows"]:
    if is_whole(index):
        return values.sum(dim=0)
    if values.dtype is torch.float64:
        return reference.latent_sums(values, index, rows)
    sums = torch.zeros(rows)
    kernels.sum_by_latent(array(values), array(index), sums.numpy())
    return sums
