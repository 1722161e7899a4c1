"""The optimiser's loops and who calls them: one pass over a parameter, its gradient and its moments."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float
from numba.extending import register_jitable
from torch import Tensor

from harness.ops import reference
from harness.ops.cpu.arrays import floats
from harness.ops.cpu.compile import compiled
from harness.ops.cpu.team import cuts, run
from harness.ops.interface import AdamState, Hyper

_ONE = np.ones(1, np.float32)
_NO_COPY = np.empty((0, 0), np.int16)


@register_jitable
def _remove_parallel(row, grad):
    dot = np.float32(0.0)
    for i in range(row.shape[0]):
        dot += row[i] * grad[i]
    for i in range(row.shape[0]):
        grad[i] -= dot * row[i]


@compiled
def _project(begin, end, param, grad):
    """Remove from each row of grad its component parallel to the unit row of param."""
    for r in range(begin, end):
        _remove_parallel(param[r], grad[r])


@compiled
def _adam(begin, end, param, grad, mean, square, ok, scale, numbers, project_rows, unit_rows, copy):
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


def project(param: Float[Tensor, "rows d"], grad: Float[Tensor, "rows d"]) -> None:
    if param.dtype is torch.float64:
        return reference.project(param, grad)
    pieces = cuts(param.shape[0])
    run(len(pieces), lambda item: _project(*pieces[item], param.numpy(), grad.numpy()))


def update(
    param: Tensor,
    grad: Tensor,
    state: AdamState,
    hyper: Hyper,
    ok: Bool[Tensor, ""],
    low_precision: Tensor | None = None,
) -> None:
    if param.dtype is torch.float64:
        return reference.update(param, grad, state, hyper, ok, low_precision)
    # a vector is one row
    matrices = [tensor.view(-1, tensor.shape[-1]).numpy() for tensor in (param, grad, *state)]
    copy = _NO_COPY if low_precision is None else low_precision.view(torch.int16).view(-1, param.shape[-1]).numpy()
    scale = _ONE if hyper.scale is None else floats(hyper.scale).reshape(1)
    corrections = 1 - hyper.beta1**hyper.step, 1 - hyper.beta2**hyper.step
    numbers = np.array(
        [1 - hyper.beta1, 1 - hyper.beta2, 1 / corrections[1], hyper.eps, hyper.lr / corrections[0]], np.float32
    )
    allowed = ok.numpy().reshape(1)
    pieces = cuts(matrices[0].shape[0])

    def work(item: int) -> None:
        _adam(*pieces[item], *matrices, allowed, scale, numbers, hyper.project, hyper.unit_rows, copy)

    run(len(pieces), work)
