"""Bootstrap that resamples whole runs: all points of a run are drawn together."""

from __future__ import annotations

import numpy as np

from analysis.fits.intervals import FARTHEST
from analysis.fits.problem import Problem
from analysis.fits.solve import solve
from analysis.format import Interval
from analysis.laws.law import Array


def cluster_bootstrap(
    problem: Problem, theta: Array, clusters: np.ndarray, resamples: int, seed: int, huber: float | None = None
) -> Array:
    """Coefficients (resamples, params) of refits to runs drawn with replacement; each refit starts at `theta`.

    Args:
        clusters: Name of the run behind each point (points,), in the order of `problem`.
    """
    rng = np.random.default_rng(seed)
    _, member = np.unique(clusters, return_inverse=True)
    groups = int(member.max()) + 1
    draws = np.empty((resamples, problem.size))
    for i in range(resamples):
        times = np.bincount(rng.integers(0, groups, groups), minlength=groups)[member]
        rows = np.repeat(np.arange(problem.points), times)
        draws[i], _ = solve(problem.take(rows), theta, huber, evaluations=200)
    return draws


def percentile_intervals(draws: Array, level: float) -> list[Interval]:
    """Percentile interval of each column; an end is open if it lies more than `FARTHEST` from the median."""
    tail = (1 - level) / 2
    out: list[Interval] = []
    for column in draws.T:
        low, middle, high = np.quantile(column, [tail, 0.5, 1 - tail])
        out.append((None if middle - low > FARTHEST else float(low), None if high - middle > FARTHEST else float(high)))
    return out
