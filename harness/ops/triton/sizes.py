"""How work is cut into powers of two and tiles, on the host; and whether kernels are interpreted."""

from __future__ import annotations

import math

from triton import knobs

INTERPRETED: bool = knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter, on CPU tensors: for tests."""


def power_of_2(number: float) -> int:
    """The power of two at or above."""
    return 1 << (max(1, math.ceil(number)) - 1).bit_length()


def tiles(total: int, size: int) -> int:
    """How many of this size it takes."""
    return -(-total // size)
