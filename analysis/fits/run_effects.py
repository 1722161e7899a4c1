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
    plain, theta, common = replace(problem, group=group), optimum.theta, 0.0
    whitened, found = plain, optimum
    for _ in range(ROUNDS):
        shrink, common = _components(plain, theta)
        whitened = replace(plain, shrink=shrink)
        found = minimise(whitened, [theta], evaluations=evaluations)
        theta = found.theta
    return whitened, replace(found, reached=optimum.reached, starts=optimum.starts, moved=True), common


def _components(plain: Problem, theta: Array) -> tuple[float, float]:
    """(shrink, variance of u): the part of a run's mean that whitening takes away, from the residuals at theta."""
    assert plain.group is not None
    residual = plain.residual(theta)
    count = np.bincount(plain.group)
    mean = np.bincount(plain.group, residual) / count
    within = float(np.sum((residual - mean[plain.group]) ** 2))
    inside = plain.size - plain.between
    point = within / max(plain.points - len(count) - inside, 1)
    size = float(count.mean())
    between = float(np.sum(count * mean**2)) / max(plain.dof, 1)
    common = max((between - point) / size, 0.0)
    return 1.0 - np.sqrt(point / (point + size * common)) if common > 0 else 0.0, common
