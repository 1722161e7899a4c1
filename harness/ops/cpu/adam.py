"""The optimiser: one pass over a parameter, its gradient and its moments."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from harness.ops import reference
from harness.ops.cpu import adam_kernels as kernels
from harness.ops.cpu.arrays import floats
from harness.ops.cpu.compile import Floats
from harness.ops.cpu.team import cuts, run
from harness.ops.interface import AdamState, Hyper

_ONE = np.ones(1, np.float32)
_NO_COPY = np.empty((0, 0), np.int16)


def project(param: Float[Tensor, "rows d"], grad: Float[Tensor, "rows d"]) -> None:
    if param.dtype is torch.float64:
        return reference.project(param, grad)
    pieces = cuts(param.shape[0])
    run(len(pieces), lambda item: kernels.project(*pieces[item], param.numpy(), grad.numpy()))


def _rows(tensor: Tensor) -> Floats:
    """A matrix as it is; a vector as one row."""
    return tensor.view(-1, tensor.shape[-1]).numpy()


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
    weight, gradient, mean, square = map(_rows, (param, grad, *state))
    copy = _NO_COPY if low_precision is None else low_precision.view(torch.int16).view(-1, param.shape[-1]).numpy()
    scale = _ONE if hyper.scale is None else floats(hyper.scale).reshape(1)
    corrections = 1 - hyper.beta1**hyper.step, 1 - hyper.beta2**hyper.step
    numbers = np.array(
        [1 - hyper.beta1, 1 - hyper.beta2, 1 / corrections[1], hyper.eps, hyper.lr / corrections[0]], np.float32
    )
    allowed = ok.numpy().reshape(1)
    pieces = cuts(weight.shape[0])

    def work(item: int) -> None:
        kernels.adam(
            *pieces[item],
            weight,
            gradient,
            mean,
            square,
            allowed,
            scale,
            numbers,
            hyper.project,
            hyper.unit_rows,
            copy,
        )

    run(len(pieces), work)
