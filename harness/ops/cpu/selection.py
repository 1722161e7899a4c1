"""Encoder and exact selection: a tile of pre-activations at a time, while it is in cache."""

from __future__ import annotations

import math
import threading

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from harness.ops import reference
from harness.ops.cpu import selection_kernels as kernels
from harness.ops.cpu.arrays import TILE_ELEMENTS, array, blocks, floats, keep_freed_memory, scratch
from harness.ops.cpu.compile import Floats, Ints, Longs
from harness.ops.cpu.products import dense_from, is_dense
from harness.ops.cpu.team import run
from harness.ops.interface import Codes, Groups, whole_index

_NO_SUBSET, _NO_COLUMNS = np.empty(0, np.int64), np.empty((0, 0), np.float32)


def _lanes(width: int, k: int) -> int:
    """Number of interleaved maxima that selection keeps per row. With more, finding the threshold costs more; with
    fewer, more values reach the threshold and are read again. The balance is near √(width·k)."""
    lanes = 16 * math.ceil(max(4 * k, math.sqrt(width * k)) / 16)
    return lanes if 2 * lanes <= width else width


def _tiles(groups: Groups, tokens: int) -> list[tuple[slice, slice]]:
    """(tokens, rows) whose pre-activations a thread produces at a time, at least one tile for each thread."""
    spans = [span for span in groups.spans if span[1].stop > span[1].start]
    widest = max((rows.stop - rows.start for _, rows in spans), default=1)
    share = -(-tokens // torch.get_num_threads())
    return list(blocks(spans, max(1, min(share, TILE_ELEMENTS // widest))))


def select(
    x: Float[Tensor, "tokens d"],
    W_enc: Float[Tensor, "rows d"],
    b_enc: Float[Tensor, " rows"] | None,
    k: int,
    groups: Groups,
    ordered: bool = True,
) -> Codes:
    if x.dtype is torch.float64:
        return reference.select(x, W_enc, b_enc, k, groups)
    keep_freed_memory()
    tokens = x.shape[0]
    if not ordered and x.dtype is torch.float32 and len(groups.spans) == 1 and is_dense(groups.spans[0][1], k):
        return _select_whole(x, W_enc, b_enc, k, groups)
    values, index = torch.empty((tokens, k)), torch.empty((tokens, k), dtype=torch.int64)
    for span, rows in groups.spans:
        if rows.stop - rows.start < k:
            values[span], index[span] = -torch.inf, min(rows.start, max(0, W_enc.shape[0] - 1))
    bias = np.zeros(W_enc.shape[0], np.float32) if b_enc is None else floats(b_enc)
    out_values, out_index = values.numpy(), index.numpy()
    tiles = _tiles(groups, tokens)

    def work(item: int) -> None:
        span, rows = tiles[item]
        kept = min(k, rows.stop - rows.start)
        _topk(_product(x, W_enc, span, rows), bias[rows], kept, rows.start, ordered, out_values[span], out_index[span])

    run(len(tiles), work)
    return Codes(values, index)


def select_with_subset(
    x: Float[Tensor, "tokens d"],
    W_enc: Float[Tensor, "rows d"],
    b_enc: Float[Tensor, " rows"] | None,
    k: int,
    groups: Groups,
    subset: Int[Tensor, " subset"],
    subset_k: int,
) -> tuple[Codes, Codes]:
    """See `harness.ops.subset`. A single group; float32 or bfloat16."""
    keep_freed_memory()
    tokens, width = x.shape[0], subset.shape[0]
    values, index = torch.empty((tokens, k)), torch.empty((tokens, k), dtype=torch.int64)
    bias = np.zeros(W_enc.shape[0], np.float32) if b_enc is None else floats(b_enc)
    chosen = array(subset)
    chosen_bias, whole = bias[chosen], is_dense(slice(0, width), subset_k)
    few_values = torch.empty(tokens, width if whole else subset_k)
    few_index = whole_index(slice(0, width), tokens, x.device) if whole else torch.empty(few_values.shape).long()
    outputs = values.numpy(), index.numpy(), few_values.numpy(), few_index.numpy()
    tiles = _tiles(groups, tokens)

    def work(item: int) -> None:
        span, rows = tiles[item]
        out_values, out_index, out_few, out_few_index = (output[span] for output in outputs)
        tile = array(_product(x, W_enc, span, rows))
        columns = out_few if whole else scratch("columns", len(tile) * width, torch.float32).view(-1, width).numpy()
        kernels.topk(tile, bias, k, _lanes(tile.shape[1], k), 0, out_values, out_index, chosen, columns)
        if whole:
            kernels.keep_positive_topk(columns, chosen_bias, subset_k)
        else:
            kernels.positive_topk(columns, chosen_bias, subset_k, 0, out_few, out_few_index)

    run(len(tiles), work)
    return Codes(values, index), Codes(few_values, few_index)


def _product(x: Tensor, W_enc: Tensor, tokens: slice, rows: slice) -> Float[Tensor, "tokens rows"]:
    """Pre-activations without bias, in this thread's scratch memory."""
    count, width = tokens.stop - tokens.start, rows.stop - rows.start
    return torch.mm(x[tokens], W_enc[rows].T, out=scratch("tile", count * width, x.dtype).view(count, width))


def _select_whole(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, groups: Groups) -> Codes:
    """`select` without order in the whole form, of the only group."""
    rows, tokens = groups.spans[0][1], x.shape[0]
    values = torch.empty(tokens, rows.stop - rows.start)
    bias = np.zeros(W_enc.shape[0], np.float32) if b_enc is None else floats(b_enc)
    tiles = _tiles(groups, tokens)

    def work(item: int) -> None:
        span, _ = tiles[item]
        torch.mm(x[span], W_enc[rows].T, out=values[span])
        kernels.keep_positive_topk(values[span].numpy(), bias[rows], k)

    run(len(tiles), work)
    return Codes(values, whole_index(rows, tokens, x.device))


def select_above(
    x: Float[Tensor, "tokens d"],
    W_enc: Float[Tensor, "rows d"],
    b_enc: Float[Tensor, " rows"] | None,
    theta: Float[Tensor, " rows"],
    groups: Groups,
) -> Codes:
    if x.dtype is torch.float64:
        return reference.select_above(x, W_enc, b_enc, theta, groups)
    keep_freed_memory()
    tokens, spans = x.shape[0], groups.spans
    bias = np.zeros(W_enc.shape[0], np.float32) if b_enc is None else floats(b_enc)
    limits = floats(theta)
    tiles = _tiles(groups, tokens)
    lists: dict[int, tuple[Longs, Floats, Ints]] = {}
    # several groups share no whole form, so all their entries are listed
    most = groups.row_offsets[-1] if len(spans) > 1 else dense_from(spans[0][1].stop - spans[0][1].start)
    whole = torch.empty(0)
    allocate = threading.Lock()

    def gather(item: int) -> None:
        nonlocal whole
        span, rows = tiles[item]
        count, width = span.stop - span.start, rows.stop - rows.start
        tile = _product(x, W_enc, span, rows)
        starts, places = np.empty(count + 1, np.int64), count * min(most, width) + width + 1
        values, index = scratch("values", places, torch.float32).numpy(), scratch("index", places, torch.int32).numpy()
        if kernels.gather_above(array(tile), bias[rows], limits[rows], most, rows.start, starts, values, index):
            lists[item] = starts, values[: starts[-1]].copy(), index[: starts[-1]].copy()
            return
        with allocate:
            whole = whole if whole.numel() else torch.empty(tokens, width)
        kernels.mask_below(array(tile), bias[rows], limits[rows], whole[span].numpy())

    run(len(tiles), gather)
    if whole.numel():
        target = whole.numpy()

        def spread(item: int) -> None:
            if item in lists:
                span, rows = tiles[item]
                kernels.spread_rows(span.start, span.stop, *lists[item], rows.start, target)

        run(len(tiles), spread)
        return Codes(whole, whole_index(spans[0][1], tokens, x.device))
    capacity = max(1, max((int(np.diff(starts).max(initial=0)) for starts, _, _ in lists.values()), default=1))
    values, index = torch.full((tokens, capacity), -torch.inf), torch.zeros((tokens, capacity), dtype=torch.int64)
    for span, rows in spans:
        if rows.start:
            index[span] = min(rows.start, max(0, W_enc.shape[0] - 1))
    out_values, out_index = values.numpy(), index.numpy()

    def pad(item: int) -> None:
        span, _ = tiles[item]
        kernels.pad_rows(span.start, span.stop, *lists[item], out_values, out_index)

    run(len(tiles), pad)
    return Codes(values, index)


def _topk(
    tile: Tensor, bias: np.ndarray, k: int, first_row: int, ordered: bool, values: np.ndarray, index: np.ndarray
) -> None:
    if ordered:
        lanes = _lanes(tile.shape[1], k)
        kernels.topk(array(tile), bias, k, lanes, first_row, values, index, _NO_SUBSET, _NO_COLUMNS)
    else:
        kernels.positive_topk(array(tile), bias, k, first_row, values, index)


def select_preactivations(preactivations: Float[Tensor, "tokens rows"], k: int, ordered: bool = True) -> Codes:
    """`select` from given pre-activations, float32 or bfloat16; k ≤ rows."""
    tokens, width = preactivations.shape
    values, index = torch.empty((tokens, k)), torch.empty((tokens, k), dtype=torch.int64)
    bias = np.zeros(width, np.float32)
    _topk(preactivations, bias, k, 0, ordered, values.numpy(), index.numpy())
    return Codes(values, index)
