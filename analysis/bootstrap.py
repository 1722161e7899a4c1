"""Bootstrap that resamples whole runs: checkpoints of one run are one draw, never several."""

from __future__ import annotations

import numpy as np

from analysis.law import Array
from analysis.problem import Problem
from analysis.solve import solve


def cluster_bootstrap(
    problem: Problem, theta: Array, clusters: np.ndarray, resamples: int, seed: int, huber: float | None = None
) -> Array:
    """Coefficients (resamples, params) of refits to runs drawn with replacement, each started at `theta`.

    Args:
        clusters: Name of the run behind each point, in the problem's order.
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


def percentile_intervals(draws: Array, level: float) -> list[tuple[float | None, float | None]]:
    """Percentile interval of each column; an end is open where the draws run away (beyond 30 from the median)."""
    tail = (1 - level) / 2
    out: list[tuple[float | None, float | None]] = []
    for column in draws.T:
        low, middle, high = np.quantile(column, [tail, 0.5, 1 - tail])
        out.append((None if middle - low > 30 else float(low), None if high - middle > 30 else float(high)))
    return out
