"""The k largest numbers of each row. See `selection` for how it works."""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST: tl.constexpr = tl.constexpr(-(1 << 31) + (1 << 16))
"""An order below that of every number, and above the lowest int32 after a shift by 16 too."""


@triton.jit
def _order(bits: tl.tensor) -> tl.tensor:
    """Integers in the order of the float32 numbers whose bit patterns these are; −0 equals 0, NaN is largest. Neither
    the lowest nor the largest int32 is one."""
    magnitude = bits & 0x7FFFFFFF
    signed = tl.where(bits < 0, -magnitude, magnitude)
    return tl.where(magnitude > 0x7F800000, 0x7FFFFFFE, signed)


@triton.jit
def _bits(numbers: tl.tensor, VALUE_BITS: tl.constexpr) -> tl.tensor:
    """Bit patterns of float32 numbers from those of float32 or bfloat16 numbers."""
    bits = numbers.to(tl.int32)
    return bits << 16 if VALUE_BITS == 16 else bits


@triton.jit
def _larger(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _key(order: tl.tensor, index: tl.tensor, INDEX_BITS: tl.constexpr) -> tl.tensor:
    """One non-negative int64, larger for larger values, then for lower indices."""
    shifted = order.to(tl.int64) + (1 << 31)
    return (shifted << INDEX_BITS) | ((1 << INDEX_BITS) - 1 - index)


@triton.jit
def _smallest_picked(order: tl.tensor, wanted: tl.tensor, least: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The largest order that at least `wanted` elements of a row reach, and how many do; by bisection from `least`,
    which so many reach, or all if there are fewer."""
    low, high = least, tl.max(order, axis=1) + 1
    count = tl.sum((order >= low[:, None]).to(tl.int32), axis=1)
    searching = (count > wanted) & (low + 1 < high)
    while tl.max(searching.to(tl.int32), axis=0) > 0:
        middle = (low & high) + ((low ^ high) >> 1)
        reached = tl.sum((order >= middle[:, None]).to(tl.int32), axis=1)
        enough = reached >= wanted
        low = tl.where(searching & enough, middle, low)
        count = tl.where(searching & enough, reached, count)
        high = tl.where(searching & (reached < wanted), middle, high)
        searching = (count > wanted) & (low + 1 < high)
    return low, count


@triton.jit
def _pick(
    order: tl.tensor, index: tl.tensor, wanted: tl.tensor, least: tl.tensor, SHIFT: tl.constexpr,
    INDEX_BITS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Marks the `wanted` largest elements of each row, among equal ones those of lowest index; all if there are fewer.
    Returns the marks, and the smallest order that is picked.

    `least`: an order that at least `wanted` elements reach, or all if there are fewer. The lowest int32 is no element.
    Two bisections: for the smallest order that is picked, whose lowest `SHIFT` bits are zero, and for the largest index
    among those of that order.
    """
    order = order >> SHIFT
    low, count = _smallest_picked(order, wanted, least >> SHIFT)
    equal = order == low[:, None]
    above = tl.sum((order > low[:, None]).to(tl.int32), axis=1)
    first, end = low * 0, low * 0 + ((1 << INDEX_BITS) - 1)
    while tl.max((count > wanted).to(tl.int32), axis=0) > 0:
        middle = first + (end - first) // 2
        reached = above + tl.sum((equal & (index <= middle[:, None])).to(tl.int32), axis=1)
        searching = count > wanted
        enough = reached >= wanted
        end = tl.where(searching & enough, middle, end)
        count = tl.where(searching & enough, reached, count)
        first = tl.where(searching & (reached < wanted), middle + 1, first)
    return (order > low[:, None]) | (equal & (index <= end[:, None])), low << SHIFT


@triton.jit
def _in_segment(widths: tl.tensor, row: tl.tensor, tokens: tl.tensor, begin: tl.tensor, size: tl.tensor) -> tl.tensor:
    """How many of each row's numbers lie in the segment of `size` columns at `begin`."""
    width = tl.load(widths + row, mask=row < tokens, other=0)
    return tl.minimum(tl.maximum(width - begin, 0), size)


@triton.jit
def _maxima(bits: tl.tensor, VALUE_BITS: tl.constexpr, INTERPRETED: tl.constexpr) -> tl.tensor:
    """Order of the largest number of each block, over the last axis."""
    bits = _bits(bits, VALUE_BITS)
    if INTERPRETED:  # which calls Python for every number that a function of ours reduces
        return tl.max(_order(bits), axis=2)
    largest = tl.reduce(bits.to(tl.float32, bitcast=True), 2, _larger)
    return _order(largest.to(tl.int32, bitcast=True))


@triton.jit
def lanes_kernel(
    z: tl.tensor, widths: tl.tensor, chosen: tl.tensor, winners: tl.tensor, tokens: tl.tensor, stride: tl.tensor,
    k: tl.tensor, size: tl.tensor, least: tl.tensor,
    ROWS: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, VALUE_BITS: tl.constexpr, INDEX_BITS: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:  # fmt: skip
    """The k lanes with the largest maxima of each row's segment, into `chosen`."""
    none: tl.constexpr = -(1 << 31)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * size
    width = _in_segment(widths, row, tokens, first, size)
    lane = tl.arange(0, LANES)
    at = lane[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    begin = z + (row.to(tl.int64) * stride + first)[:, None, None]
    best = tl.full([ROWS, LANES], none, tl.int32)
    best_chunk = tl.zeros([ROWS, LANES], tl.int32)
    whole = tl.min(width, axis=0) // (LANES * BLOCK)
    for chunk in range(0, whole):
        order = _maxima(tl.load(begin + (chunk * LANES * BLOCK + at)[None, :, :]), VALUE_BITS, INTERPRETED)
        better = order > best
        best = tl.where(better, order, best)
        best_chunk = tl.where(better, chunk, best_chunk)
    for chunk in range(whole, tl.cdiv(tl.max(width, axis=0), LANES * BLOCK)):
        column = (chunk * LANES * BLOCK + at)[None, :, :]
        # −inf in the format of the numbers
        infinity: tl.constexpr = -(1 << 23) if VALUE_BITS == 32 else -(1 << 7)
        order = _maxima(
            tl.load(begin + column, mask=column < width[:, None, None], other=infinity), VALUE_BITS, INTERPRETED
        )
        started = (chunk * LANES + lane)[None, :] * BLOCK < width[:, None]
        better = started & (order > best)
        best = tl.where(better, order, best)
        best_chunk = tl.where(better, chunk, best_chunk)
    block = best_chunk * LANES + lane[None, :]
    picked, smallest = _pick(best, block, tl.minimum(width, k), width * 0 + LOWEST, 32 - VALUE_BITS, INDEX_BITS)
    place = row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(least + place, smallest, mask=row < tokens)
    place = place[:, None] * k + tl.cumsum(picked.to(tl.int32), axis=1) - 1
    tl.store(chosen + place, tl.broadcast_to(lane[None, :], [ROWS, LANES]), mask=picked)


@triton.jit
def _store_winners(
    winners: tl.tensor, row: tl.tensor, k: tl.tensor, picked: tl.tensor, order: tl.tensor, index: tl.tensor,
    INDEX_BITS: tl.constexpr,
) -> None:  # fmt: skip
    """Keys of the picked elements, side by side, into the place of the row and of this program's segment."""
    place = (row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1))[:, None] * k
    place += tl.cumsum(picked.to(tl.int32), axis=1) - 1
    tl.store(winners + place, _key(order, index, INDEX_BITS), mask=picked)


@triton.jit
def whole_kernel(
    z: tl.tensor, widths: tl.tensor, winners: tl.tensor, tokens: tl.tensor, stride: tl.tensor, k: tl.tensor,
    ROWS: tl.constexpr, LANES: tl.constexpr, VALUE_BITS: tl.constexpr, INDEX_BITS: tl.constexpr,
) -> None:  # fmt: skip
    """The keys of the k largest elements of rows of at most `LANES` elements."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    width = tl.load(widths + row, mask=row < tokens, other=0)
    column = tl.arange(0, LANES)[None, :]
    inside = column < width[:, None]
    bits = tl.load(z + row.to(tl.int64)[:, None] * stride + column, mask=inside, other=0)
    order = tl.where(inside, _order(_bits(bits, VALUE_BITS)), -(1 << 31))
    index = tl.broadcast_to(column, [ROWS, LANES])
    lowest = width * 0 + LOWEST
    picked, _ = _pick(order, index, tl.minimum(width, k), lowest, 32 - VALUE_BITS, INDEX_BITS)
    _store_winners(winners, row, k, picked, order, index, INDEX_BITS)


@triton.jit
def keep_kernel(
    z: tl.tensor, tokens: tl.tensor, width: tl.tensor, stride: tl.tensor, k: tl.tensor,
    ROWS: tl.constexpr, LANES: tl.constexpr, VALUE_BITS: tl.constexpr,
) -> None:  # fmt: skip
    """In place: the positive ones of each row's k largest numbers, and 0 elsewhere up to the row's stride."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, LANES)[None, :]
    alive = (row < tokens)[:, None]
    at = z + row.to(tl.int64)[:, None] * stride + column
    order = _order(_bits(tl.load(at, mask=alive & (column < width), other=0), VALUE_BITS)) >> (32 - VALUE_BITS)
    order = tl.maximum(order, 0)
    wanted = tl.minimum(tl.sum((order > 0).to(tl.int32), axis=1), k)
    low, _ = _smallest_picked(order, wanted, wanted * 0 + 1)
    above = order > low[:, None]
    equal = order == low[:, None]
    left = wanted - tl.sum(above.to(tl.int32), axis=1)
    picked = above | (equal & (tl.cumsum(equal.to(tl.int32), axis=1) <= left[:, None]))
    # of a positive number, order and bit pattern are the same
    tl.store(at, tl.where(picked, order, 0).to(z.dtype.element_ty), mask=alive & (column < stride))


@triton.jit
def candidates_kernel(
    z: tl.tensor, widths: tl.tensor, chosen: tl.tensor, winners: tl.tensor, tokens: tl.tensor, stride: tl.tensor,
    k: tl.tensor, size: tl.tensor, least: tl.tensor,
    ROWS: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, VALUE_BITS: tl.constexpr, INDEX_BITS: tl.constexpr,
    SLOTS: tl.constexpr, CHUNKS: tl.constexpr,
) -> None:  # fmt: skip
    """The keys of the k largest elements of each row's segment, which lie in its chosen lanes."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * size
    width = _in_segment(widths, row, tokens, first, size)
    candidate = tl.arange(0, SLOTS * CHUNKS * BLOCK)
    slot, chunk, inner = candidate // (CHUNKS * BLOCK), candidate // BLOCK % CHUNKS, candidate % BLOCK
    filled = slot[None, :] < tl.minimum(tl.minimum(tl.cdiv(width, BLOCK), LANES), k)[:, None]
    begin = (row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1))[:, None] * k
    lane = tl.load(chosen + begin + slot[None, :], mask=filled, other=0)
    column = (chunk[None, :] * LANES + lane) * BLOCK + inner[None, :]
    inside = filled & (column < width[:, None])
    bits = tl.load(z + row.to(tl.int64)[:, None] * stride + first + column, mask=inside, other=0)
    order = tl.where(inside, _order(_bits(bits, VALUE_BITS)), -(1 << 31))
    at = row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    # k lanes have an element that large, so k candidates have
    floor = tl.load(least + at, mask=row < tokens, other=LOWEST)
    picked, _ = _pick(order, first + column, tl.minimum(width, k), floor, 32 - VALUE_BITS, INDEX_BITS)
    _store_winners(winners, row, k, picked, order, first + column, INDEX_BITS)


@triton.jit
def merge_kernel(
    winners: tl.tensor, merged: tl.tensor, widths: tl.tensor, tokens: tl.tensor, k: tl.tensor, segments: tl.tensor,
    size: tl.tensor,
    ROWS: tl.constexpr, INDEX_BITS: tl.constexpr, SLOTS: tl.constexpr, MOST: tl.constexpr,
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
    order = tl.where(filled, (key >> INDEX_BITS) - (1 << 31), -(1 << 31)).to(tl.int32)
    index = ((1 << INDEX_BITS) - 1 - (key & ((1 << INDEX_BITS) - 1))).to(tl.int32)
    picked, _ = _pick(order, index, wanted, wanted * 0 + LOWEST, 0, INDEX_BITS)
    _store_winners(merged, row, k, picked, order, index, INDEX_BITS)


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
    bits = _bits(tl.load(z + row.to(tl.int64)[:, None] * stride + column, mask=filled, other=0), VALUE_BITS)
    inside = alive[:, None] & (slot[None, :] < k)
    at = begin[:, None] + place
    tl.store(values + at, tl.where(filled, bits.to(tl.float32, bitcast=True), float("-inf")), mask=inside)
    tl.store(index + at, column + first.to(tl.int64)[:, None], mask=inside)
