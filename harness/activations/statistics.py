"""Mean and variance of the training rows, as they are stored and after per-token normalisation."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
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
    explained: Float64[Tensor, " d"] | None = None
    """`explained_shares` of the held-out rows, if the source keeps them."""


def layernorm_rows(x: Float[Tensor, "rows d"]) -> Float[Tensor, "rows d"]:
    """Per row: subtract the mean over d, scale to unit norm (Gao et al. 2024). A constant row becomes zero."""
    centred = x - x.mean(dim=1, keepdim=True)
    return centred / centred.norm(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def explained_shares(
    batches: Iterable[Float[Tensor, "rows d"]], mean: Float64[Tensor, " d"], layernorm: bool
) -> Float64[Tensor, " d"]:
    """At k − 1: share of the squared distance of the rows to `mean` that their k largest directions explain.

    Raw, or with `layernorm` after `layernorm_rows`. In float64; d² operations per row and d³ once.
    """
    moment = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for rows in batches:
        x = rows.to(torch.float64)
        centred = (layernorm_rows(x) if layernorm else x) - mean
        moment += centred.T @ centred
    eigenvalues = torch.linalg.eigvalsh(moment).flip(0).clamp_min(0)
    return eigenvalues.cumsum(0) / eigenvalues.sum()


class Sums(NamedTuple):
    """Sums over the rows of each block of `_BLOCK_ROWS`, in float64. They use numpy, whose reductions do not depend on
    the number of threads."""

    rows: Int[np.ndarray, " blocks"]
    values: Float64[np.ndarray, "blocks d"]
    squares: Float64[np.ndarray, " blocks"]


def sums_of(rows: Float[Tensor, "rows d"], layernorm: bool) -> Sums:
    """`Sums` of rows of any dtype; with `layernorm` after `layernorm_rows`."""
    counts, sums, squares = list[int](), list[np.ndarray](), list[float]()
    for block in rows.split(_BLOCK_ROWS):
        x = block.to(torch.float64)
        values = (layernorm_rows(x) if layernorm else x).numpy()
        counts.append(len(values))
        sums.append(values.sum(axis=0))
        squares.append(float(np.square(values).sum()))
    return Sums(np.array(counts), np.stack(sums), np.array(squares))


class Moments:
    """Running sums in float64. Their bits depend on the order in which blocks are added, not on who summed them."""

    def __init__(self, d_model: int) -> None:
        self._count = 0
        self._sum = np.zeros(d_model)
        self._squares = 0.0

    def add(self, sums: Sums) -> None:
        for count, values, squares in zip(*sums, strict=True):
            self._count += int(count)
            self._sum += values
            self._squares += float(squares)

    def result(self) -> Statistics:
        """Statistics of all rows added so far, at least one."""
        mean = self._sum / self._count
        mean_sq_norm = self._squares / self._count
        variance = max(0.0, mean_sq_norm - float(np.square(mean).sum()))
        assert math.isfinite(variance)
        return Statistics(self._count, torch.from_numpy(mean), mean_sq_norm, variance)
