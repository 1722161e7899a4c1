"""Mean and variance of the training rows, as they are stored and after per-token normalisation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

_BLOCK_ROWS = 4096


@dataclass(frozen=True, eq=False)
class Statistics:
    """Of the training rows, accumulated in float64."""

    count: int
    mean: Float64[Tensor, " d"]
    mean_sq_norm: float
    """E‖x‖²."""
    variance: float
    """E‖x − mean‖², summed over d."""


def layernorm_rows(x: Float[Tensor, "rows d"]) -> Float[Tensor, "rows d"]:
    """Per row: subtract the mean over d, scale to unit norm (Gao et al. 2024). A constant row becomes zero."""
    centred = x - x.mean(dim=1, keepdim=True)
    return centred / centred.norm(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


class Moments:
    """Running sums in float64. They use numpy, whose reductions do not depend on the number of threads."""

    def __init__(self, d_model: int) -> None:
        self._count = 0
        self._sum = np.zeros(d_model)
        self._squares = 0.0

    def add(self, rows: Float[Tensor, "rows d"], layernorm: bool) -> None:
        """Add rows of any dtype; with `layernorm` after `layernorm_rows`."""
        for block in rows.split(_BLOCK_ROWS):
            x = block.to(torch.float64)
            values = (layernorm_rows(x) if layernorm else x).numpy()
            self._count += len(values)
            self._sum += values.sum(axis=0)
            self._squares += float(np.square(values).sum())

    def result(self) -> Statistics:
        """Statistics of all rows added so far, at least one."""
        mean = self._sum / self._count
        mean_sq_norm = self._squares / self._count
        variance = max(0.0, mean_sq_norm - float(np.square(mean).sum()))
        assert math.isfinite(variance)
        return Statistics(self._count, torch.from_numpy(mean), mean_sq_norm, variance)
