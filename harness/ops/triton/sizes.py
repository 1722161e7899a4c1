"""Powers of two and tiles, on the host; and whether kernels are interpreted."""

from __future__ import annotations

import math

from triton import knobs

INTERPRETED: bool = knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter, on CPU tensors: for tests."""


def power_of_2(number: float) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (max(1, math.ceil(number)) - 1).bit_length()


def tiles(total: int, size: int) -> int:
    """How many tiles of this size cover `total`."""
    return -(-total // size)
