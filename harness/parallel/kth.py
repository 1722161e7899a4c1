"""The k-th largest of numbers that are spread over the ranks of a mesh, exactly."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from harness.ops.untyped import integers
from harness.parallel.interface import Kind, Shards

DIGIT_BITS = 8


def ordered_bits(values: Float[Tensor, " count"]) -> Int[Tensor, " count"]:
    """Integers that order as the numbers do, which are not negative (−0 counts as 0); NaN comes last."""
    whole = torch.int64 if values.dtype is torch.float64 else torch.int32
    bits = (values + 0.0).view(whole)
    return torch.where(values.isnan(), torch.iinfo(whole).max, bits).to(torch.int64)


def number_of(bits: Int[Tensor, ""], dtype: torch.dtype) -> Float[Tensor, " one"]:
    """The number with these `ordered_bits`."""
    return bits.to(torch.int64 if dtype is torch.float64 else torch.int32).view(1).view(dtype)


def kth_largest(
    values: Float[Tensor, " count"], k: int, shards: Shards, kind: Kind
) -> tuple[Int[Tensor, ""], int, int]:
    """(`ordered_bits` of the k-th largest of all ranks' values, how many of those equal to it are among the k, how many
    equal it).

    float32 or float64, none negative; k is at most their number over all ranks, and at least 1. A radix search: each
    rank counts its values by the digits of their bits, so few numbers are exchanged and the result does not depend on
    the mesh. Waits for the device.
    """
    bits = ordered_bits(values)
    width = 64 if values.dtype is torch.float64 else 32
    prefix, left, equal = 0, k, 0
    for shift in range(width - DIGIT_BITS, -1, -DIGIT_BITS):
        digits = (bits >> shift) & ((1 << DIGIT_BITS) - 1)
        counts = torch.bincount(digits, minlength=1 << DIGIT_BITS)
        larger = integers(shards.sum_(counts, "all", kind).flip(0).cumsum(0))
        place = next(place for place, reached in enumerate(larger) if reached >= left)
        before = larger[place - 1] if place else 0
        left, equal = left - before, larger[place] - before
        digit = (1 << DIGIT_BITS) - 1 - place
        prefix |= digit << shift
        bits = bits[digits == digit]
    return torch.tensor(prefix, device=values.device), left, equal
