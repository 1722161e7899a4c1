"""Exact top-k of each row on a GPU: one read of the pre-activations, no sort of a row.

A row is seen as `lanes` interleaved columns. One pass keeps each lane's largest element; the k largest elements of
the row lie in the k lanes with the largest maxima. A second kernel reads these k lanes only and picks their k largest
elements, a third puts them in order. Values and indices are compared as one integer key (value, then lower index), so
no two keys are equal and ties need no special case. Everything compares bit patterns, so that bfloat16, denormals,
−0 and NaN (taken as largest, so that the loss shows it) are exact on every machine.
"""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false
# (the language of the kernels has types of its own)
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from harness.ops import reference
from harness.ops.interface import Codes
from harness.ops.triton.sizes import INTERPRETED, power_of_2, tiles

MOST_LANES = 1 << 14
MOST_CANDIDATES = 1 << 16
"""Largest tile of keys a program holds; a selection that needs more (k in the thousands among millions) is left to
`reference`."""


@triton.jit
def _order(bits, VALUE_BITS: tl.constexpr):
    """Integers in the order of the numbers whose bit patterns these are; −0 equals 0, NaN is largest."""
    largest: tl.constexpr = (1 << (VALUE_BITS - 1)) - 1
    infinity: tl.constexpr = 0x7F800000 if VALUE_BITS == 32 else 0x7F80
    magnitude = bits & largest
    signed = tl.where(bits < 0, -magnitude, magnitude)
    return tl.where(magnitude > infinity, largest, signed)


@triton.jit
def _key(order, index, VALUE_BITS: tl.constexpr, INDEX_BITS: tl.constexpr):
    """One non-negative int64, larger for larger values, then for lower indices."""
    shifted = order.to(tl.int64) + (1 << (VALUE_BITS - 1))
    return (shifted << INDEX_BITS) | ((1 << INDEX_BITS) - 1 - index)


@triton.jit
def _cut(keys, wanted):
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
def lanes_kernel(
    z, widths, chosen, winners, tokens, stride, k,
    ROWS: tl.constexpr, LANES: tl.constexpr, VALUE_BITS: tl.constexpr, INDEX_BITS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Each row's k lanes with the largest maxima, into `chosen`; with one element per lane (`WHOLE`) the maxima are
    the selection itself and their keys go to `winners`."""
    empty: tl.constexpr = -(1 << 31)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    width = tl.load(widths + row, mask=row < tokens, other=0)
    lane = tl.arange(0, LANES)
    begin = row.to(tl.int64) * stride
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
    key = tl.where(best > empty, _key(best, where_best * LANES + lane[None, :], VALUE_BITS, INDEX_BITS), -1)
    picked = (key >= _cut(key, tl.minimum(width, k))[:, None]) & (key >= 0)
    place = row.to(tl.int64)[:, None] * k + tl.cumsum(picked.to(tl.int32), axis=1) - 1
    if WHOLE:
        tl.store(winners + place, key, mask=picked)
    else:
        tl.store(chosen + place, tl.broadcast_to(lane[None, :], [ROWS, LANES]), mask=picked)


@triton.jit
def candidates_kernel(
    z, widths, chosen, winners, tokens, stride, k,
    ROWS: tl.constexpr, LANES: tl.constexpr, VALUE_BITS: tl.constexpr, INDEX_BITS: tl.constexpr,
    SLOTS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """The keys of each row's k largest elements, which lie in its chosen lanes."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    width = tl.load(widths + row, mask=row < tokens, other=0)
    wanted = tl.minimum(width, k)
    candidate = tl.arange(0, SLOTS * CHUNKS)
    slot = candidate // CHUNKS
    filled = slot[None, :] < wanted[:, None]
    begin = row.to(tl.int64)
    lane = tl.load(chosen + begin[:, None] * k + slot[None, :], mask=filled, other=0)
    column = (candidate % CHUNKS)[None, :] * LANES + lane
    inside = filled & (column < width[:, None])
    bits = tl.load(z + begin[:, None] * stride + column, mask=inside, other=0).to(tl.int32)
    key = tl.where(inside, _key(_order(bits, VALUE_BITS), column, VALUE_BITS, INDEX_BITS), -1)
    picked = (key >= _cut(key, wanted)[:, None]) & (key >= 0)
    place = begin[:, None] * k + tl.cumsum(picked.to(tl.int32), axis=1) - 1
    tl.store(winners + place, key, mask=picked)


@triton.jit
def order_kernel(
    z, widths, firsts, winners, values, index, tokens, stride, k,
    ROWS: tl.constexpr, VALUE_BITS: tl.constexpr, INDEX_BITS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Values and indices of the winners, largest first; −inf at the group's first latent where it has fewer than k."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    alive = row < tokens
    width = tl.load(widths + row, mask=alive, other=0)
    first = tl.load(firsts + row, mask=alive, other=0)
    slot = tl.arange(0, SLOTS)
    begin = row.to(tl.int64) * k
    wanted = tl.minimum(width, k)
    found = slot[None, :] < wanted[:, None]
    key = tl.load(winners + begin[:, None] + slot[None, :], mask=found, other=-1)
    # the place of a key is the number of larger ones; empty slots keep theirs
    place = tl.where(found, 0, tl.broadcast_to(slot[None, :], [ROWS, SLOTS]))
    for other in range(0, tl.max(wanted, axis=0)):
        rival = tl.load(winners + begin + other, mask=other < wanted, other=-1)
        place += (found & (rival[:, None] > key)).to(tl.int32)
    column = tl.where(found, (1 << INDEX_BITS) - 1 - (key & ((1 << INDEX_BITS) - 1)), 0)
    bits = tl.load(z + row.to(tl.int64)[:, None] * stride + column, mask=found, other=0).to(tl.int32)
    if VALUE_BITS == 16:
        bits = bits << 16
    inside = alive[:, None] & (slot[None, :] < k)
    at = begin[:, None] + place
    tl.store(values + at, tl.where(found, bits.to(tl.float32, bitcast=True), float("-inf")), mask=inside)
    tl.store(index + at, column + first.to(tl.int64)[:, None], mask=inside)


def lanes_for(width: int, k: int) -> int:
    """How many lanes a row has. More make their threshold dearer, fewer leave more candidates; at 4·k lanes hardly two
    of the k largest share one, and √(width·k) balances the two tiles."""
    return min(
        power_of_2(max(16, 4 * k, math.sqrt(width * k))), power_of_2(max(16, width)), max(MOST_LANES, power_of_2(k))
    )


def _warps(tile: int) -> int:
    return min(16, max(1, tile // 256))


def select_rows(
    z: Float[Tensor, "tokens width"],
    k: int,
    firsts: Int[Tensor, " tokens"],
    widths: Int[Tensor, " tokens"],
    out: tuple[Float[Tensor, "tokens k"], Int[Tensor, "tokens k"]],
) -> None:
    """Writes the k largest of the first `widths[t]` numbers of each row (float32 or bfloat16), and their columns plus
    `firsts[t]`; widths and firsts are int32. See `interface.Ops.select` for order and padding."""
    tokens, width = z.shape
    if tokens == 0:
        return
    lanes, slots = lanes_for(width, k), power_of_2(k)
    chunks = tiles(width, lanes)
    values, index = out
    value_bits = 8 * z.element_size()
    bits = z.view(torch.int32 if value_bits == 32 else torch.int16)
    chosen = torch.empty((tokens, k), dtype=torch.int32, device=z.device)
    winners = torch.empty((tokens, k), dtype=torch.int64, device=z.device)
    index_bits = max(1, (power_of_2(width) - 1).bit_length())
    shared = bits, widths
    sizes = tokens, z.stride(0), k
    bit_counts = {"VALUE_BITS": value_bits, "INDEX_BITS": index_bits}

    def rows(tile: int) -> int:
        """Rows that a program takes on: several where they are short."""
        return max(1, (1 << 14 if INTERPRETED else 512) // tile)

    def launch(kernel, tile: int, *arguments: object, **constants: int | bool) -> None:
        count = rows(tile)
        grid = (tiles(tokens, count),)
        kernel[grid](*arguments, ROWS=count, **bit_counts, **constants, num_warps=_warps(count * tile))

    launch(lanes_kernel, lanes, *shared, chosen, winners, *sizes, LANES=lanes, WHOLE=chunks == 1)
    if chunks > 1:
        tile = slots * power_of_2(chunks)
        pieces = {"LANES": lanes, "SLOTS": slots, "CHUNKS": power_of_2(chunks)}
        launch(candidates_kernel, tile, *shared, chosen, winners, *sizes, **pieces)
    launch(order_kernel, slots, *shared, firsts, winners, values, index, *sizes, SLOTS=slots)


def fits(width: int, k: int) -> bool:
    """Whether the kernels can hold the candidates of such a selection."""
    return power_of_2(k) * power_of_2(tiles(width, lanes_for(width, k))) <= MOST_CANDIDATES


def select_preactivations(preactivations: Float[Tensor, "tokens rows"], k: int) -> Codes:
    """Exact top-k of given pre-activations, equal values to the lowest index; k ≤ rows. float32 or bfloat16."""
    tokens, width = preactivations.shape
    if not fits(width, k):
        codes = reference.select_preactivations(preactivations, k)
        return Codes(codes.values.float(), codes.index)
    device = preactivations.device
    values = torch.empty((tokens, k), device=device)
    index = torch.empty((tokens, k), dtype=torch.int64, device=device)
    firsts = torch.zeros(tokens, dtype=torch.int32, device=device)
    select_rows(preactivations.contiguous(), k, firsts, torch.full_like(firsts, width), (values, index))
    return Codes(values, index)
