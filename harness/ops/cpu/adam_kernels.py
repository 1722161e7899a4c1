"""Loops of the optimiser. See `compile` for what holds for all loops."""

from __future__ import annotations

import numpy as np
from numba.extending import register_jitable

from harness.ops.cpu.compile import Bools, Floats, Shorts, compiled


@register_jitable
def _remove_parallel(row: Floats, grad: Floats) -> None:
    dot = np.float32(0.0)
    for i in range(row.shape[0]):
        dot += row[i] * grad[i]
    for i in range(row.shape[0]):
        grad[i] -= dot * row[i]


@compiled
def project(begin: int, end: int, param: Floats, grad: Floats) -> None:
    """Remove from each row of grad its component parallel to the unit row of param."""
    for r in range(begin, end):
        _remove_parallel(param[r], grad[r])


@compiled
def adam(
    begin: int,
    end: int,
    param: Floats,
    grad: Floats,
    mean: Floats,
    square: Floats,
    ok: Bools,
    scale: Floats,
    numbers: Floats,
    project_rows: bool,
    unit_rows: bool,
    copy: Shorts,
) -> None:
    """One Adam update of these rows; `numbers` = (rate of mean, rate of square, 1/(1 − β₂ᵗ), ε, lr/(1 − β₁ᵗ)).

    Projection changes `grad` in place. `copy`: bfloat16 bits to refresh, or of length 0. Nothing changes unless ok.
    """
    if not ok[0]:
        return
    rate_mean, rate_square, inverse, eps, lr = numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]
    factor = scale[0]
    for r in range(begin, end):
        row, g, m, s = param[r], grad[r], mean[r], square[r]
        if project_rows:
            _remove_parallel(row, g)
        norm = np.float32(0.0)
        for i in range(row.shape[0]):
            gradient = factor * g[i]
            m[i] += rate_mean * (gradient - m[i])
            s[i] += rate_square * (gradient * gradient - s[i])
            row[i] -= lr * (m[i] / (np.sqrt(s[i] * inverse) + eps))
            norm += row[i] * row[i]
        if unit_rows:
            norm = np.sqrt(norm)
            for i in range(row.shape[0]):
                row[i] /= norm
        if copy.shape[0]:
            for i in range(row.shape[0]):
                bits = np.float32(row[i]).view(np.int32)
                rounded = (bits + np.int32(0x7FFF) + ((bits >> np.int32(16)) & np.int32(1))) >> np.int32(16)
                copy[r, i] = np.int16(rounded) if row[i] == row[i] else np.int16(0x7FC0)
