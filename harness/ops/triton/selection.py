"""Exact top-k of each row on a GPU: one read of the pre-activations, no sort of a row.

A row is seen as `lanes` interleaved columns. One pass keeps each lane's largest element; the k largest elements of
the row lie in the k lanes with the largest maxima. A second kernel reads these k lanes only and picks their k largest
elements, a third puts them in order. Values and indices are compared as one integer key (value, then lower index), so
no two keys are equal and ties need no special case. Everything compares bit patterns, so that bfloat16, denormals,
−0 and NaN (taken as largest, so that the loss shows it) are exact on every machine.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from harness.ops import reference
from harness.ops.interface import Codes
from harness.ops.triton.selection_kernels import candidates_kernel, lanes_kernel, order_kernel
from harness.ops.triton.sizes import INTERPRETED, power_of_2, tiles

MOST_LANES = 1 << 14
PROGRAM_KEYS = (1 << 14) if INTERPRETED else 512
"""Keys that a program holds, if a row is not longer."""
KEYS_PER_WARP, MOST_WARPS = 256, 16
MOST_CANDIDATES = 1 << 16
"""Largest tile of keys of one program; `reference` does a selection that needs more (k in the thousands among
millions)."""


def lanes_for(width: int, k: int) -> int:
    """Number of lanes of a row. With more, their threshold costs more; with fewer, there are more candidates. At 4·k
    lanes two of the k largest rarely share one, and √(width·k) balances the two tiles."""
    return min(
        power_of_2(max(16, 4 * k, math.sqrt(width * k))), power_of_2(max(16, width)), max(MOST_LANES, power_of_2(k))
    )


def _warps(tile: int) -> int:
    return min(MOST_WARPS, max(1, tile // KEYS_PER_WARP))


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
        """Rows of one program: several if they are short."""
        return max(1, PROGRAM_KEYS // tile)

    def launch(kernel: Any, tile: int, *arguments: object, **constants: int | bool) -> None:
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
