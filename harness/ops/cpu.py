"""CPU kernels: products by torch's BLAS in tiles that stay in cache, everything else in loops compiled by Numba.

Exact and deterministic: results depend neither on the number of threads nor on which thread does what, beyond what
BLAS does inside one tile. float64 goes to `reference`. See `interface` for the contracts, `docs/performance.md` for
what each choice was worth.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from harness.budget import DENSE_ROWS_PER_K
from harness.ops import cpu_kernels as kernels
from harness.ops import reference
from harness.ops.cpu_team import ITEMS_PER_THREAD, cuts, run
from harness.ops.interface import AdamState, Codes, Groups, Hyper, Reduce

NAME = "cpu"

TILE_ELEMENTS = 1 << 22
"""Pre-activations that a thread produces and selects from at a time."""

TOKENS_AT_LEAST = 32
"""Smallest range of tokens worth handing to a thread."""

PIECE_ENTRIES = 4096
"""A latent that was active on more tokens is summed in pieces of this many, so that threads can share it."""

_NO_SCALE = np.empty(0, np.float32)
_ONE = np.ones(1, np.float32)
_NO_COPY = np.empty((0, 0), np.int16)

_local = threading.local()


def _scratch(name: str, count: int, dtype: torch.dtype) -> Tensor:
    """`count` numbers of this thread's reusable buffer `name`, not initialised."""
    key = f"{name}.{dtype}"
    buffer = getattr(_local, key, None)
    if buffer is None or buffer.numel() < count:
        buffer = torch.empty(count, dtype=dtype)
        setattr(_local, key, buffer)
    return buffer[:count]


def _array(tensor: Tensor) -> np.ndarray:
    """The tensor's memory as the kernels want it: contiguous; bfloat16 as its bit patterns."""
    tensor = tensor.detach().contiguous()
    return tensor.view(torch.int16).numpy() if tensor.dtype is torch.bfloat16 else tensor.numpy()


def _floats(tensor: Tensor) -> np.ndarray:
    return _array(tensor.to(torch.float32))


def _lanes(width: int, k: int) -> int:
    """How many interleaved maxima selection keeps per row. More make finding the threshold dearer, fewer make more
    values reach it that are read again; the balance is near √(width·k)."""
    lanes = 16 * math.ceil(max(4 * k, math.sqrt(width * k)) / 16)
    return lanes if 2 * lanes <= width else width


def _blocks(spans: list[tuple[slice, slice]], size: int) -> Iterator[tuple[slice, slice]]:
    """(tokens, rows) of each span, with at most `size` tokens at a time."""
    for tokens, rows in spans:
        for begin in range(tokens.start, tokens.stop, size):
            yield slice(begin, min(begin + size, tokens.stop)), rows


def select(
    x: Float[Tensor, "tokens d"],
    W_enc: Float[Tensor, "rows d"],
    b_enc: Float[Tensor, " rows"] | None,
    k: int,
    groups: Groups,
) -> Codes:
    if x.dtype is torch.float64:
        return reference.select(x, W_enc, b_enc, k, groups)
    tokens = x.shape[0]
    values, index = torch.empty((tokens, k)), torch.empty((tokens, k), dtype=torch.int64)
    for span, rows in groups.spans:
        if rows.stop - rows.start < k:
            values[span], index[span] = -torch.inf, min(rows.start, max(0, W_enc.shape[0] - 1))
    bias = np.zeros(W_enc.shape[0], np.float32) if b_enc is None else _floats(b_enc)
    out_values, out_index = values.numpy(), index.numpy()
    spans = [span for span in groups.spans if span[1].stop > span[1].start]
    widest = max((rows.stop - rows.start for _, rows in spans), default=1)
    share = -(-tokens // torch.get_num_threads())
    blocks = list(_blocks(spans, max(1, min(share, TILE_ELEMENTS // widest))))

    def work(item: int) -> None:
        span, rows = blocks[item]
        width, kept = rows.stop - rows.start, min(k, rows.stop - rows.start)
        tile = _scratch("tile", (span.stop - span.start) * width, x.dtype).view(-1, width)
        torch.mm(x[span], W_enc[rows].T, out=tile)
        kernels.topk(_array(tile), bias[rows], kept, _lanes(width, kept), rows.start, out_values[span], out_index[span])

    run(len(blocks), work)
    return Codes(values, index)


def select_preactivations(preactivations: Float[Tensor, "tokens rows"], k: int) -> Codes:
    """Exact top-k of given pre-activations, equal values to the lowest index; k ≤ rows. float32 or bfloat16."""
    tokens, width = preactivations.shape
    values, index = torch.empty((tokens, k)), torch.empty((tokens, k), dtype=torch.int64)
    bias = np.zeros(width, np.float32)
    kernels.topk(_array(preactivations), bias, k, _lanes(width, k), 0, values.numpy(), index.numpy())
    return Codes(values, index)


def _is_dense(rows: slice, k: int) -> bool:
    return 0 < rows.stop - rows.start <= DENSE_ROWS_PER_K * k


def _dense_blocks(groups: Groups, k: int) -> list[tuple[slice, slice]]:
    """(tokens, rows) of the groups whose products are dense, tokens in tiles, at least one for each thread."""
    spans = [(tokens, rows) for tokens, rows in groups.spans if _is_dense(rows, k)]
    widest = max((rows.stop - rows.start for _, rows in spans), default=1)
    tokens = max((tokens.stop - tokens.start for tokens, _ in spans), default=1)
    share = -(-tokens // torch.get_num_threads())
    size = max(1, min(share, TILE_ELEMENTS // widest))
    return list(_blocks(spans, size))


def _sparse_ranges(groups: Groups, k: int) -> list[tuple[int, int]]:
    """Ranges of the tokens whose products are sparse, which includes tokens without latents."""
    found = []
    for tokens, rows in groups.spans:
        if not _is_dense(rows, k):
            pieces = cuts(tokens.stop - tokens.start, TOKENS_AT_LEAST)
            found += [(tokens.start + begin, tokens.start + end) for begin, end in pieces]
    return found


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
    values, index, table = _floats(codes.values), _array(codes.index), _array(weight)
    factors = _NO_SCALE if scale is None else _floats(scale)
    dense, sparse = _dense_blocks(groups, k), _sparse_ranges(groups, k)

    def decode_dense(item: int) -> None:
        tokens, rows = dense[item]
        active = _densified(values, index, tokens, rows)
        torch.mm(active, weight[rows], out=residual[tokens])
        if scale is not None:
            residual[tokens].mul_(scale[tokens, None])

    def latent_grads_dense(item: int) -> None:
        tokens, rows = dense[item]
        count, width = tokens.stop - tokens.start, rows.stop - rows.start
        products = _scratch("dense", count * width, torch.float32).view(count, width)
        torch.mm(residual[tokens], weight[rows].T, out=products)
        kernels.gather_products(
            tokens.start,
            tokens.stop,
            values,
            index,
            rows.start,
            products.numpy(),
            residual.numpy(),
            dz.numpy(),
            squared.numpy(),
        )

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
        whole = reduce(residual)
        torch.sub(inputs, whole, out=residual)
        run(len(dense), latent_grads_dense)
        run(len(sparse), latent_grads_sparse)
    return residual, dz, squared


def _densified(values: np.ndarray, index: np.ndarray, tokens: slice, rows: slice) -> Float[Tensor, "tokens rows"]:
    """The codes of these tokens as a matrix over the group's rows, in this thread's scratch memory."""
    count, width = tokens.stop - tokens.start, rows.stop - rows.start
    dense = _scratch("dense", count * width, torch.float32).view(count, width)
    kernels.densify(tokens.start, tokens.stop, tokens.start, values, index, rows.start, dense.numpy())
    return dense


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
    values, gradients, index = _floats(codes.values), _floats(dz), _array(codes.index)
    for tokens, rows in groups.spans:
        if _is_dense(rows, k):
            _dense_weight_grads(values, gradients, index, inputs, residual, tokens, rows, out)
    sparse_rows = [rows for _, rows in groups.spans if not _is_dense(rows, k) and rows.stop > rows.start]
    if sparse_rows:
        ranges = _sparse_ranges(groups, k)
        _sparse_weight_grads(values, gradients, index, inputs, residual, ranges, sparse_rows, out)


def _dense_weight_grads(
    values: np.ndarray,
    gradients: np.ndarray,
    index: np.ndarray,
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
        dense = _scratch("dense", count * width, torch.float32).view(count, width)
        matrix, pieces = dense.numpy(), [(block.start + a, block.start + b) for a, b in cuts(count, TOKENS_AT_LEAST)]
        for source, factor, grad in ((values, residual, W_dec_grad), (gradients, x, W_enc_grad)):

            def fill(item: int, source: np.ndarray = source, matrix=matrix, pieces=pieces, first=begin) -> None:
                kernels.densify(*pieces[item], first, source, index, rows.start, matrix)

            run(len(pieces), fill)
            grad.addmm_(dense.T, factor[block])
        b_enc_grad.add_(dense.sum(dim=0))


def _sparse_weight_grads(
    values: np.ndarray,
    gradients: np.ndarray,
    index: np.ndarray,
    x: Tensor,
    residual: Tensor,
    ranges: list[tuple[int, int]],
    spans: list[slice],
    out: tuple[Tensor, Tensor, Tensor],
) -> None:
    """One stable counting sort by latent serves all three gradients; then every latent sums its own entries."""
    latents = out[2].shape[0]
    share = max(1, -(-len(ranges) // torch.get_num_threads()))
    shares = [ranges[begin : begin + share] for begin in range(0, len(ranges), share)]
    counts = np.zeros((max(1, len(shares)), latents), np.int64)

    def count(item: int) -> None:
        for begin, end in shares[item]:
            kernels.count_by_latent(begin, end, values, gradients, index, counts[item])

    run(len(shares), count)
    # entries are placed by latent, then by share, then by token: as one thread would
    ends = counts.T.cumsum().reshape(latents, -1)
    place = np.ascontiguousarray((ends - counts.T).T)
    total = int(ends[-1, -1])
    token = np.empty(total, np.int32)
    weight_enc, weight_dec = np.empty(total, np.float32), np.empty(total, np.float32)

    def sort(item: int) -> None:
        for begin, end in shares[item]:
            kernels.sort_by_latent(begin, end, values, gradients, index, place[item], token, weight_enc, weight_dec)

    run(len(shares), sort)
    rows = np.concatenate([np.arange(span.start, span.stop) for span in spans])
    last = ends[rows, -1]
    first = last - counts.sum(axis=0)[rows]
    _accumulate(rows, first, np.minimum(last, first + PIECE_ENTRIES), token, weight_enc, weight_dec, x, residual, out)
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
    _accumulate(np.arange(len(rest)), first, last, token, weight_enc, weight_dec, x, residual, parts)
    for grad, part in zip(out, parts, strict=True):
        for row, piece in zip(owner.tolist(), part, strict=True):
            grad[row] += piece


def _accumulate(
    rows: np.ndarray,
    first: np.ndarray,
    last: np.ndarray,
    token: np.ndarray,
    weight_enc: np.ndarray,
    weight_dec: np.ndarray,
    x: Tensor,
    residual: Tensor,
    out: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Write the sums of the entries first[i] … last[i] to row rows[i], shared among threads by their number."""
    pieces = np.stack([rows, first, last], axis=1)
    # writing a row costs about as much as one entry
    cost = (last - first + 1).cumsum()
    shares = min(len(rows), ITEMS_PER_THREAD * torch.get_num_threads())
    bounds = [0, *np.searchsorted(cost, cost[-1] * np.arange(1, shares) // shares).tolist(), len(rows)]
    inputs, residuals = x.numpy(), residual.numpy()
    W_enc_grad, W_dec_grad, b_enc_grad = (grad.numpy() for grad in out)

    def work(item: int) -> None:
        kernels.accumulate(
            bounds[item],
            bounds[item + 1],
            pieces,
            token,
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
    kernels.count_active(_array(codes.values), _array(codes.index), counts.numpy())
    return counts


def project(param: Float[Tensor, "rows d"], grad: Float[Tensor, "rows d"]) -> None:
    if param.dtype is torch.float64:
        return reference.project(param, grad)
    pieces = cuts(param.shape[0])
    run(len(pieces), lambda item: kernels.project(*pieces[item], param.numpy(), grad.numpy()))


def update(
    param: Tensor,
    grad: Tensor,
    state: AdamState,
    hyper: Hyper,
    ok: Bool[Tensor, ""],
    low_precision: Tensor | None = None,
) -> None:
    if param.dtype is torch.float64:
        return reference.update(param, grad, state, hyper, ok, low_precision)
    # a vector is one row
    matrices = [tensor.view(-1, tensor.shape[-1]).numpy() for tensor in (param, grad, *state)]
    copy = _NO_COPY if low_precision is None else low_precision.view(torch.int16).view(-1, param.shape[-1]).numpy()
    scale = _ONE if hyper.scale is None else _floats(hyper.scale).reshape(1)
    corrections = 1 - hyper.beta1**hyper.step, 1 - hyper.beta2**hyper.step
    numbers = np.array(
        [1 - hyper.beta1, 1 - hyper.beta2, 1 / corrections[1], hyper.eps, hyper.lr / corrections[0]], np.float32
    )
    allowed = ok.numpy().reshape(1)
    pieces = cuts(matrices[0].shape[0])

    def work(item: int) -> None:
        kernels.adam(*pieces[item], *matrices, allowed, scale, numbers, hyper.project, hyper.unit_rows, copy)

    run(len(pieces), work)
