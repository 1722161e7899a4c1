"""Exact top-k of each row on a GPU: one read of the pre-activations, no sort of a row.

A row is cut into segments. A segment is seen as `lanes`, each of which has blocks of neighbouring columns, far apart.
One pass keeps each lane's largest element; the k largest elements of a segment lie in the k lanes with the largest
maxima. A second kernel reads these k lanes only and picks their k largest elements, a third merges the segments (most
rows have one), and a fourth puts the k winners in order. Short rows are picked from at once. Everything compares bit
patterns, then indices, so that ties, denormals, −0 and NaN (taken as largest, so that the loss shows it) are exact on
every machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from harness.ops import reference
from harness.ops.interface import Codes
from harness.ops.sizes import MOST_PICKED
from harness.ops.triton.selection_kernels import (
    candidates_kernel,
    keep_kernel,
    lanes_kernel,
    merge_kernel,
    order_kernel,
    whole_kernel,
)
from harness.ops.triton.sizes import INTERPRETED, power_of_2, tiles

PROGRAM_KEYS = (1 << 14) if INTERPRETED else 512
"""Elements that a program picks from, if rows are short."""
KEYS_PER_WARP, MOST_WARPS = 256, 16
KEPT_PER_WARP = 512
"""Of rows that `keep_positive` picks from: it has one number an element to hold, and few warps wait less for each
other."""
MOST_LANES = 1 << 11
"""Of rows with fewer than 256 active latents."""
MOST_NUMBERS, BLOCK = 1 << 14, 8
"""Numbers that one program loads at a time, and those of one lane, which are neighbours: 16 bytes of bfloat16, what a
thread loads at once."""
SHORT, WHOLE_PER_K = 256, 8
"""A row of at most so many numbers, or so many per active latent, is picked from at once."""


class Layout(NamedTuple):
    """How a row is cut. `lanes` and `block` are powers of two."""

    lanes: int
    block: int
    chunks: int
    """Blocks of a lane within its segment, at most."""
    segments: int

    @property
    def segment_width(self) -> int:
        return self.lanes * self.block * self.chunks


def layout(width: int, k: int) -> Layout:
    """How to cut a row of `width` numbers. With more lanes, picking k of them costs more; with fewer, there are more
    candidates. At 4·k lanes two of the k largest rarely share one, and √(width·k) balances the two."""
    slots, whole = power_of_2(k), power_of_2(max(16, width))
    if whole <= min(MOST_PICKED, max(SHORT, WHOLE_PER_K * slots)):
        return Layout(whole, 1, 1, 1)
    lanes = min(power_of_2(max(16, 4 * k, math.sqrt(width * k))), max(MOST_LANES, 16 * slots), MOST_PICKED)
    block = min(BLOCK, MOST_NUMBERS // lanes)
    lanes = min(lanes, whole // block)
    chunks = tiles(width, lanes * block)
    segments = tiles(chunks, MOST_PICKED // (slots * block))
    return Layout(lanes, block, tiles(chunks, segments), segments)


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
    cut, slots = layout(width, k), power_of_2(k)
    value_bits = 8 * z.element_size()
    bits = z.view(torch.int32 if value_bits == 32 else torch.int16)
    winners = torch.empty((tokens, cut.segments, k), dtype=torch.int64, device=z.device)
    index_bits = {"INDEX_BITS": max(1, (power_of_2(width) - 1).bit_length())}
    number = {"VALUE_BITS": value_bits, **index_bits}
    sizes = tokens, z.stride(0), k

    def launch(kernel: Any, tile: int, pieces: int, *arguments: object, **constants: int | bool) -> None:
        """`tile`: elements of one program for one row; a program takes several rows if they are short."""
        rows = max(1, PROGRAM_KEYS // tile)
        kernel[tiles(tokens, rows), pieces](*arguments, ROWS=rows, **constants, num_warps=_warps(rows * tile))

    if cut.block == cut.chunks == cut.segments == 1:
        launch(whole_kernel, cut.lanes, 1, bits, widths, winners, *sizes, LANES=cut.lanes, **number)
    else:
        chosen = torch.empty((tokens, cut.segments, k), dtype=torch.int32, device=z.device)
        least = torch.empty((tokens, cut.segments), dtype=torch.int32, device=z.device)
        shared = bits, widths, chosen, winners, *sizes, cut.segment_width
        shape = {"LANES": cut.lanes, "BLOCK": cut.block, **number}
        at_a_time = min(MOST_PICKED // 4 if cut.block == BLOCK else MOST_PICKED, cut.lanes * cut.block // 4)
        launch(lanes_kernel, at_a_time, cut.segments, *shared, least, **shape, INTERPRETED=INTERPRETED)
        chunks = power_of_2(cut.chunks)
        tile = slots * chunks * cut.block
        launch(candidates_kernel, tile, cut.segments, *shared, least, **shape, SLOTS=slots, CHUNKS=chunks)
    winners = _merged(winners, cut, launch, widths, index_bits)
    launch(order_kernel, slots, 1, bits, widths, firsts, winners, *out, *sizes, **number, SLOTS=slots, ORDERED=ordered)


def keep_positive(z: Float[Tensor, "tokens width"], k: int) -> None:
    """In place: the positive ones of each row's k largest numbers, equal ones by lowest index, and 0 elsewhere up to
    the row's stride, which is at most `MOST_PICKED`. float32 or bfloat16."""
    (tokens, width), stride = z.shape, z.stride(0)
    lanes, value_bits = power_of_2(max(16, stride)), 8 * z.element_size()
    rows, bits = max(1, PROGRAM_KEYS // lanes), z.view(torch.int32 if value_bits == 32 else torch.int16)
    keep_kernel[(tiles(tokens, rows),)](
        bits, tokens, width, stride, k,
        ROWS=rows, LANES=lanes, VALUE_BITS=value_bits,
        num_warps=max(1, min(MOST_WARPS, rows * lanes // KEPT_PER_WARP)),
    )  # fmt: skip


def _merged(
    winners: Tensor, cut: Layout, launch: Callable[..., None], widths: Tensor, index_bits: dict[str, int]
) -> Tensor:
    """The winners of each row, from those of its segments."""
    tokens, segments, k = winners.shape
    slots, size = power_of_2(k), cut.segment_width
    at_once = MOST_PICKED // slots
    while segments > 1:
        left, most = tiles(segments, at_once), power_of_2(min(segments, at_once))
        merged = torch.empty((tokens, left, k), dtype=torch.int64, device=winners.device)
        sources = winners, merged, widths, tokens, k, segments, size
        launch(merge_kernel, slots * most, left, *sources, SLOTS=slots, MOST=most, **index_bits)
        winners, segments, size = merged, left, size * at_once
    return winners


def fits(width: int, k: int) -> bool:
    """Whether the kernels can hold such a selection."""
    return 2 * power_of_2(k) <= MOST_PICKED or (power_of_2(k) <= MOST_PICKED and width <= MOST_PICKED)


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
