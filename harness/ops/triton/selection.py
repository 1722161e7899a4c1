"""Exact top-k of each row on a GPU: one read of the pre-activations, no sort of a row.

A row is cut into segments, and each segment is seen as `lanes` interleaved columns. One pass keeps each lane's largest
element; the k largest elements of a segment lie in the k lanes with the largest maxima. A second kernel reads these k
lanes only and picks their k largest elements, a third merges the segments (most rows have one), and a fourth puts the
k winners in order. Values and indices are compared as one integer key (value, then lower index), so no two keys are
equal and ties need no special case. Everything compares bit patterns, so that bfloat16, denormals, −0 and NaN (taken
as largest, so that the loss shows it) are exact on every machine.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from harness.ops import reference
from harness.ops.interface import Codes
from harness.ops.triton.selection_kernels import candidates_kernel, lanes_kernel, merge_kernel, order_kernel
from harness.ops.triton.sizes import INTERPRETED, power_of_2, tiles

MOST_KEYS = 1 << 13
"""Keys that one program may hold: 8192 keys of 64 bits take 32 registers of each of 512 threads."""
PROGRAM_KEYS = (1 << 14) if INTERPRETED else 512
"""Keys that a program holds, if rows are short."""
KEYS_PER_WARP, MOST_WARPS = 256, 16


class Layout(NamedTuple):
    """How a row is cut. All are powers of two except `chunks` and `segments`."""

    lanes: int
    chunks: int
    """Elements of a lane within its segment, at most."""
    segments: int

    @property
    def segment_width(self) -> int:
        return self.lanes * self.chunks


def layout(width: int, k: int) -> Layout:
    """How to cut a row of `width` numbers. With more lanes, their threshold costs more; with fewer, there are more
    candidates. At 4·k lanes two of the k largest rarely share one, and √(width·k) balances the two tiles."""
    lanes = min(power_of_2(max(16, 4 * k, math.sqrt(width * k))), power_of_2(max(16, width)), MOST_KEYS)
    most_chunks = MOST_KEYS // power_of_2(k)
    segments = tiles(tiles(width, lanes), most_chunks)
    return Layout(lanes, tiles(tiles(width, segments), lanes), segments)


def _warps(tile: int) -> int:
    return min(MOST_WARPS, max(1, tile // KEYS_PER_WARP))


def select_rows(
    z: Float[Tensor, "tokens width"],
    k: int,
    firsts: Int[Tensor, " tokens"],
    widths: Int[Tensor, " tokens"],
    out: tuple[Float[Tensor, "tokens k"], Int[Tensor, "tokens k"]],
    ordered: bool = True,
) -> None:
    """Writes the k largest of the first `widths[t]` numbers of each row (float32 or bfloat16), and their columns plus
    `firsts[t]`; widths and firsts are int32. See `interface.Ops.select` for order and padding."""
    tokens, width = z.shape
    if tokens == 0:
        return
    (lanes, chunks, segments), slots = layout(width, k), power_of_2(k)
    value_bits = 8 * z.element_size()
    bits = z.view(torch.int32 if value_bits == 32 else torch.int16)
    chosen = torch.empty((tokens, segments, k), dtype=torch.int32, device=z.device)
    winners = torch.empty((tokens, segments, k), dtype=torch.int64, device=z.device)
    bit_counts = {"VALUE_BITS": value_bits, "INDEX_BITS": max(1, (power_of_2(width) - 1).bit_length())}

    def launch(kernel: Any, tile: int, pieces: int, *arguments: object, **constants: int | bool) -> None:
        """`tile`: keys of one program for one row; a program takes several rows if they are short."""
        rows = max(1, PROGRAM_KEYS // tile)
        kernel[tiles(tokens, rows), pieces](*arguments, ROWS=rows, **constants, num_warps=_warps(rows * tile))

    sizes, cut = (tokens, z.stride(0), k), {"LANES": lanes, **bit_counts}
    shared = bits, widths, chosen, winners, *sizes, lanes * chunks
    launch(lanes_kernel, lanes, segments, *shared, **cut, WHOLE=chunks == 1)
    if chunks > 1:
        tile = slots * power_of_2(chunks)
        launch(candidates_kernel, tile, segments, *shared, **cut, SLOTS=slots, CHUNKS=power_of_2(chunks))
    at_once = MOST_KEYS // slots
    while segments > 1:
        merged = tiles(segments, at_once)
        into = torch.empty((tokens, merged, k), dtype=torch.int64, device=z.device)
        most = power_of_2(min(segments, at_once))
        sources = winners, into, widths, tokens, k, segments, lanes * chunks
        launch(merge_kernel, slots * most, merged, *sources, SLOTS=slots, MOST=most)
        winners, segments, chunks = into, merged, chunks * at_once
    launch(
        order_kernel, slots, 1, bits, widths, firsts, winners, *out, *sizes, **bit_counts, SLOTS=slots, ORDERED=ordered
    )


def fits(width: int, k: int) -> bool:
    """Whether the kernels can hold such a selection."""
    return 2 * power_of_2(k) <= MOST_KEYS or (power_of_2(k) <= MOST_KEYS and width <= MOST_KEYS)


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
