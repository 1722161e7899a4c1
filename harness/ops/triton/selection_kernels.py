"""The k largest numbers of each row. See `selection` for how it works."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _order(bits: tl.tensor, VALUE_BITS: tl.constexpr) -> tl.tensor:
    """Integers in the order of the numbers whose bit patterns these are; −0 equals 0, NaN is largest."""
    largest: tl.constexpr = (1 << (VALUE_BITS - 1)) - 1
    infinity: tl.constexpr = 0x7F800000 if VALUE_BITS == 32 else 0x7F80
    magnitude = bits & largest
    signed = tl.where(bits < 0, -magnitude, magnitude)
    return tl.where(magnitude > infinity, largest, signed)


@triton.jit
def _key(order: tl.tensor, index: tl.tensor, VALUE_BITS: tl.constexpr, INDEX_BITS: tl.constexpr) -> tl.tensor:
    """One non-negative int64, larger for larger values, then for lower indices."""
    shifted = order.to(tl.int64) + (1 << (VALUE_BITS - 1))
    return (shifted << INDEX_BITS) | ((1 << INDEX_BITS) - 1 - index)


@triton.jit
def _cut(keys: tl.tensor, wanted: tl.tensor) -> tl.tensor:
    """For each row the threshold that exactly `wanted` of its keys reach: bisection. Keys are distinct, negative ones
    do not count; a row has at least `wanted` of them."""
    above = tl.max(keys, axis=1) + 1
    cut = above * 0
    count = tl.sum((keys >= 0).to(tl.int32), axis=1)
    while tl.max((count > wanted).to(tl.int32), axis=0) > 0:
        middle = cut + (above - cut) // 2
        reached = tl.sum((keys >= middle[:, None]).to(tl.int32), axis=1)
        searching = count > wanted
        enough = reached >= wanted
        cut = tl.where(searching & enough, middle, cut)
        count = tl.where(searching & enough, reached, count)
        above = tl.where(searching & (reached < wanted), middle, above)
    return cut


@triton.jit
def _in_segment(widths: tl.tensor, row: tl.tensor, tokens: tl.tensor, begin: tl.tensor, size: tl.tensor) -> tl.tensor:
    """How many of each row's numbers lie in the segment of `size` columns at `begin`."""
    width = tl.load(widths + row, mask=row < tokens, other=0)
    return tl.minimum(tl.maximum(width - begin, 0), size)


@triton.jit
def lanes_kernel(
    z: tl.tensor, widths: tl.tensor, chosen: tl.tensor, winners: tl.tensor, tokens: tl.tensor, stride: tl.tensor,
    k: tl.tensor, size: tl.tensor,
    ROWS: tl.constexpr, LANES: tl.constexpr, VALUE_BITS: tl.constexpr, INDEX_BITS: tl.constexpr, WHOLE: tl.constexpr,
) -> None:  # fmt: skip
    """The k lanes with the largest maxima of each row's segment, into `chosen`; with one element per lane (`WHOLE`)
    the maxima are the selection itself and their keys go to `winners`."""
    empty: tl.constexpr = -(1 << 31)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * size
    width = _in_segment(widths, row, tokens, first, size)
    lane = tl.arange(0, LANES)
    begin = row.to(tl.int64) * stride + first
    best = tl.full([ROWS, LANES], empty, tl.int32)
    where_best = tl.zeros([ROWS, LANES], tl.int32)
    for chunk in range(0, tl.cdiv(tl.max(width, axis=0), LANES)):
        column = chunk * LANES + lane
        inside = column[None, :] < width[:, None]
        bits = tl.load(z + begin[:, None] + column[None, :], mask=inside, other=0).to(tl.int32)
        order = tl.where(inside, _order(bits, VALUE_BITS), empty)
        better = order > best
        best = tl.where(better, order, best)
        where_best = tl.where(better, chunk, where_best)
    column = first + where_best * LANES + lane[None, :]
    key = tl.where(best > empty, _key(best, column, VALUE_BITS, INDEX_BITS), -1)
    picked = (key >= _cut(key, tl.minimum(width, k))[:, None]) & (key >= 0)
    place = (row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1))[:, None] * k
    place += tl.cumsum(picked.to(tl.int32), axis=1) - 1
    if WHOLE:
        tl.store(winners + place, key, mask=picked)
    else:
        tl.store(chosen + place, tl.broadcast_to(lane[None, :], [ROWS, LANES]), mask=picked)


@triton.jit
def candidates_kernel(
    z: tl.tensor, widths: tl.tensor, chosen: tl.tensor, winners: tl.tensor, tokens: tl.tensor, stride: tl.tensor,
    k: tl.tensor, size: tl.tensor,
    ROWS: tl.constexpr, LANES: tl.constexpr, VALUE_BITS: tl.constexpr, INDEX_BITS: tl.constexpr,
    SLOTS: tl.constexpr, CHUNKS: tl.constexpr,
) -> None:  # fmt: skip
    """The keys of the k largest elements of each row's segment, which lie in its chosen lanes."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * size
    width = _in_segment(widths, row, tokens, first, size)
    wanted = tl.minimum(width, k)
    candidate = tl.arange(0, SLOTS * CHUNKS)
    slot = candidate // CHUNKS
    filled = slot[None, :] < wanted[:, None]
    begin = (row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1))[:, None] * k
    lane = tl.load(chosen + begin + slot[None, :], mask=filled, other=0)
    column = (candidate % CHUNKS)[None, :] * LANES + lane
    inside = filled & (column < width[:, None])
    bits = tl.load(z + row.to(tl.int64)[:, None] * stride + first + column, mask=inside, other=0).to(tl.int32)
    key = tl.where(inside, _key(_order(bits, VALUE_BITS), first + column, VALUE_BITS, INDEX_BITS), -1)
    picked = (key >= _cut(key, wanted)[:, None]) & (key >= 0)
    tl.store(winners + begin + tl.cumsum(picked.to(tl.int32), axis=1) - 1, key, mask=picked)


@triton.jit
def merge_kernel(
    winners: tl.tensor, merged: tl.tensor, widths: tl.tensor, tokens: tl.tensor, k: tl.tensor, segments: tl.tensor,
    size: tl.tensor,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, MOST: tl.constexpr,
) -> None:  # fmt: skip
    """The k largest keys among those that won in `MOST` neighbouring segments of `size` columns."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    candidate = tl.arange(0, SLOTS * MOST)
    segment = tl.program_id(1) * MOST + candidate // SLOTS
    slot = candidate % SLOTS
    width = tl.load(widths + row, mask=row < tokens, other=0)[:, None]
    filled = tl.minimum(width - segment[None, :] * size, k) > slot[None, :]
    filled &= (segment < segments)[None, :] & (slot < size)[None, :]
    at = (row.to(tl.int64)[:, None] * segments + segment[None, :]) * k + slot[None, :]
    key = tl.load(winners + at, mask=filled, other=-1)
    wanted = tl.minimum(_in_segment(widths, row, tokens, tl.program_id(1) * MOST * size, MOST * size), k)
    picked = (key >= _cut(key, wanted)[:, None]) & (key >= 0)
    place = (row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1))[:, None] * k
    tl.store(merged + place + tl.cumsum(picked.to(tl.int32), axis=1) - 1, key, mask=picked)


@triton.jit
def order_kernel(
    z: tl.tensor, widths: tl.tensor, firsts: tl.tensor, winners: tl.tensor, values: tl.tensor, index: tl.tensor,
    tokens: tl.tensor, stride: tl.tensor, k: tl.tensor,
    ROWS: tl.constexpr, VALUE_BITS: tl.constexpr, INDEX_BITS: tl.constexpr, SLOTS: tl.constexpr,
    ORDERED: tl.constexpr,
) -> None:  # fmt: skip
    """Values and indices of the winners, if `ORDERED` largest first; −inf at the group's first latent where it has
    fewer than k."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    alive = row < tokens
    width = tl.load(widths + row, mask=alive, other=0)
    first = tl.load(firsts + row, mask=alive, other=0)
    slot = tl.arange(0, SLOTS)
    begin = row.to(tl.int64) * k
    wanted = tl.minimum(width, k)
    filled = slot[None, :] < wanted[:, None]
    key = tl.load(winners + begin[:, None] + slot[None, :], mask=filled, other=-1)
    place = tl.broadcast_to(slot[None, :], [ROWS, SLOTS])
    if ORDERED:
        # the place of a key is the number of larger ones; empty slots keep theirs
        place = tl.where(filled, 0, place)
        for other in range(0, tl.max(wanted, axis=0)):
            rival = tl.load(winners + begin + other, mask=other < wanted, other=-1)
            place += (filled & (rival[:, None] > key)).to(tl.int32)
    column = tl.where(filled, (1 << INDEX_BITS) - 1 - (key & ((1 << INDEX_BITS) - 1)), 0)
    bits = tl.load(z + row.to(tl.int64)[:, None] * stride + column, mask=filled, other=0).to(tl.int32)
    if VALUE_BITS == 16:
        bits = bits << 16
    inside = alive[:, None] & (slot[None, :] < k)
    at = begin[:, None] + place
    tl.store(values + at, tl.where(filled, bits.to(tl.float32, bitcast=True), float("-inf")), mask=inside)
    tl.store(index + at, column + first.to(tl.int64)[:, None], mask=inside)
