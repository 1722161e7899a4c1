"""Fits to points of curves: what is common to the points of one run is one draw of noise, not many.

The residual of a point is u_run + e_point. The variances of u and e are estimated from the residuals, the problem is
whitened with them (generalised least squares for a random effect of the run), and the fit repeated. Intervals have the
degrees of freedom of the runs.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from analysis.fits.problem import Problem
from analysis.fits.solve import Optimum, minimise
from analysis.laws.law import Array

ROUNDS = 4
"""Fits after the first: the variances stand still to a per mille."""


def with_run_effects(
    problem: Problem, optimum: Optimum, runs: np.ndarray, evaluations: int
) -> tuple[Problem, Optimum, float]:
    """(whitened problem, its optimum, variance of what is common to a run).

    Args:
        problem: On points of curves, not whitened; `optimum` is its optimum.
        runs: Name of the run of each point (points,).
    """
    _, group = np.unique(runs, return_inverse=True)
    whitened, found, common = replace(problem, group=group), optimum, 0.0
    for _ in range(ROUNDS):
        whitened, common = _whitened(whitened, found.theta)
        found = minimise(whitened, [found.theta], evaluations=evaluations)
    return whitened, replace(found, reached=optimum.reached, starts=optimum.starts, moved=True), common


def _whitened(problem: Problem, theta: Array) -> tuple[Problem, float]:
    """(the problem whitened anew, variance of u), from the residuals of its optimum.

    Coefficients take degrees of freedom from the runs as far as the means of runs determine them, and from the points
    as far as the shapes of curves do: the squares of the means of an orthonormal basis of the whitened Jacobian say how
    far. Noise that is common to a curve does not change its shape, so the shapes may determine even a floor.
    """
    assert problem.group is not None
    count = np.bincount(problem.group)
    basis, _ = np.linalg.qr(problem.jacobian(theta))
    means = np.stack([np.bincount(problem.group, column) for column in basis.T], axis=1) / count[:, None]
    between = float(np.sum(count[:, None] * means**2))
    residual = replace(problem, shrink=0.0).residual(theta)
    mean = np.bincount(problem.group, residual) / count
    within = float(np.sum((residual - mean[problem.group]) ** 2))
    point = within / max(problem.points - len(count) - (problem.size - between), 1)
    size = float(count.mean())
    across = float(np.sum(count * mean**2)) / max(len(count) - between, 1)
    common = max((across - point) / size, 0.0)
    shrink = 1.0 - np.sqrt(point / (point + size * common)) if common > 0 else 0.0
    return replace(problem, shrink=shrink, between=between), common
