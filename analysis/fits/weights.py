"""Noise between seeds: its size, whether it depends on scale, and the weights that follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import chdtrc

from analysis.laws.law import Array
from analysis.runs.cells import cell_numbers

MOST_DECIMALS = 7
"""Values with this many decimals or more are taken to be written in full."""


@dataclass(frozen=True)
class SeedNoise:
    """Variance of ln y between repeats of a cell, σ²(x) = exp(level + slope·(ln x − centre))."""

    level: float
    slope: float
    centre: float
    """Mean ln x of the repeated cells."""
    dof: int
    scales: int
    """Distinct values of x with repeats."""
    p_constant: float
    """Likelihood-ratio p-value of slope = 0."""
    pure_error: float
    """Σ of squares within cells."""
    cells: int
    """Distinct cells among all points."""

    def weights(self, log_x: Array) -> Array:
        """Inverse variances (points,), up to a common factor."""
        return np.exp(-self.slope * (log_x - self.centre))

    @property
    def sd(self) -> float:
        """Pooled standard deviation of ln y between seeds."""
        return float(np.sqrt(self.pure_error / self.dof))


def rounding(y: Array) -> Array:
    """Variance of ln y (points,) that comes from the decimals to which all of y are written; 0 at full precision."""
    for decimals in range(MOST_DECIMALS):
        step = 10.0**-decimals
        if np.all(np.abs(y - np.round(y, decimals)) < 1e-9 * step):
            return (step / y) ** 2 / 12
    return np.zeros(len(y))


def seed_noise(inputs: Mapping[str, Array], y: Array, scale: str, cell: np.ndarray | None = None) -> SeedNoise | None:
    """Estimate the noise from cells that were run more than once; None if there are none, or if their repeats differ
    by no more than rounding.

    ln σ² is linear in ln of the input named `scale`. The fit maximises the likelihood of the variances within cells,
    which follow χ² distributions. No variance is taken to be smaller than what rounding makes of it.

    Args:
        cell: The number of the cell of each point (points,); by default, points with equal inputs share one.
    """
    log_y = np.log(y)
    if cell is None:
        cell = cell_numbers(np.asarray(values, dtype=float) for values in inputs.values())
    count = np.bincount(cell)
    mean = np.bincount(cell, log_y) / count
    square = np.bincount(cell, (log_y - mean[cell]) ** 2)
    repeated = count > 1
    if not repeated.any():
        return None
    log_x_cell = np.bincount(cell, np.log(inputs[scale])) / count
    dof, ss, log_x = count[repeated] - 1.0, square[repeated], log_x_cell[repeated]
    least = dof * (np.bincount(cell, rounding(y)) / count)[repeated]
    if ss.sum() <= least.sum():
        return None
    ss = np.maximum(ss, least)
    centre = float(np.average(log_x, weights=dof))
    u = log_x - centre
    scales = len(np.unique(np.round(log_x, 9)))
    total = float(ss.sum())

    def twice_negative_log_likelihood(slope: float) -> float:
        level = np.log(np.sum(ss * np.exp(-slope * u)) / dof.sum())
        return float(dof.sum() * level + np.sum(dof * slope * u) + dof.sum())

    slope, p = 0.0, 1.0
    if scales >= 2 and total > 0:
        end: Any = minimize_scalar(twice_negative_log_likelihood, bounds=(-6.0, 6.0), method="bounded")
        slope = float(end.x)
        p = float(chdtrc(1, max(twice_negative_log_likelihood(0.0) - end.fun, 0.0)))
    level = float(np.log(max(np.sum(ss * np.exp(-slope * u)) / dof.sum(), 1e-300)))
    return SeedNoise(level, slope, centre, int(dof.sum()), scales, p, total, len(count))
