"""Covariance, Wald and profile-F intervals of any linear combination of the coefficients.

Profile: hold c·θ at a value v, optimise everything else, compare F(v) = (RSS(v) − RSS) / s² with its critical value.
An end beyond which the fit never becomes worse than that is *open* (None): the data do not bound it.
"""

from __future__ import annotations

import numpy as np
from scipy.special import fdtri, stdtrit

from analysis.law import Array
from analysis.problem import Problem
from analysis.solve import constrained

FARTHEST = 30.0
"""How far from the estimate (in exponents or log amplitudes) an end is looked for before it is called open."""

NOISELESS = 1e-8
"""Root-mean-square residual below which only rounding is left and a profile would measure that."""

ROUNDING = 100 * float(np.finfo(float).eps)
"""A variance below this times the sum of its parts' sizes is rounding, not a number."""

NEGLIGIBLE = 1e-8
"""Change of ln y per unit of an undetermined coefficient below which that coefficient does not matter."""


def covariance(problem: Problem, theta: Array, variance: float) -> Array:
    """variance·(JᵀJ)⁻¹ in centred coordinates; inf on the diagonal of what the data do not determine at all."""
    jac = problem.jacobian(theta)
    scale = np.linalg.norm(jac, axis=0)
    lost = ~(scale > 1e-12 * max(float(scale.max()), 1e-300))
    cov = np.full((problem.size, problem.size), np.nan)
    keep = np.flatnonzero(~lost)
    if len(keep):
        _, s, vt = np.linalg.svd(jac[:, keep] / scale[keep], full_matrices=False)
        s = np.maximum(s, 1e-13 * s[0])
        half = (vt.T / s) / scale[keep][:, None]
        cov[np.ix_(keep, keep)] = variance * half @ half.T
    cov[lost, lost] = np.inf
    return cov


def form_variance(rows: Array, cov: Array) -> Array:
    """Variance of rows @ theta (points,) under a covariance that may be degenerate.

    NaN where it cannot be computed: where rounding swamps it (huge entries of a near-singular covariance cancel, and
    may even do so to less than zero), or where it hangs on a coefficient that the data do not determine at all.
    """
    lost = ~np.isfinite(np.diag(cov))
    finite = np.where(np.isfinite(cov), cov, 0.0)
    finite[lost, :], finite[:, lost] = 0.0, 0.0
    variance = np.einsum("np,pq,nq->n", rows, finite, rows)
    size = np.abs(rows)
    rounding = ROUNDING * np.einsum("np,pq,nq->n", size, np.abs(finite), size)
    hangs = (size[:, lost] > NEGLIGIBLE).any(axis=1)
    return np.where((variance > rounding) & ~hangs, variance, np.nan)


def condition(jac: Array) -> float:
    """Condition number of a Jacobian with its columns scaled to length one; inf when a column is zero."""
    scale = np.linalg.norm(jac, axis=0)
    if not np.all(scale > 1e-12 * scale.max()):
        return float("inf")
    s = np.linalg.svd(jac / scale, compute_uv=False)
    return float(s[0] / s[-1]) if s[-1] > 0 else float("inf")


def critical_f(dof: int, level: float) -> float:
    """F quantile with (1, dof) degrees of freedom."""
    return float(fdtri(1, dof, level))


def critical_t(dof: int, level: float) -> float:
    """Two-sided t quantile."""
    return float(stdtrit(dof, 0.5 + level / 2))


def wald(estimate: float, se: float, dof: int, level: float) -> tuple[float | None, float | None]:
    """estimate ± t·se; open when se is not finite."""
    if not np.isfinite(se):
        return None, None
    half = critical_t(dof, level) * se
    return estimate - half, estimate + half


def profile_f(
    problem: Problem, theta: Array, rss: float, contrast: Array, value: float, start: Array | None = None
) -> tuple[float, Array]:
    """(F, theta) with contrast·theta held at `value` and all else optimised."""
    unit = contrast / np.linalg.norm(contrast)
    fixed = unit * (value / np.linalg.norm(contrast))
    basis = np.linalg.svd(unit[None, :])[2][1:].T
    dof = problem.points - problem.size
    end, objective = constrained(problem, theta if start is None else start, fixed, basis)
    return (objective - rss) / (rss / dof), end


def profile(
    problem: Problem, theta: Array, rss: float, contrast: Array, se: float, level: float
) -> tuple[float | None, float | None]:
    """Profile-F interval of contrast·theta (raw offset not included); None for an open end."""
    dof = problem.points - problem.size
    if dof < 1:
        return None, None
    estimate = float(contrast @ theta)
    if np.sqrt(rss / problem.points) < NOISELESS:
        return wald(estimate, se, dof, level)
    root = np.sqrt(critical_f(dof, level))
    step = root * se if np.isfinite(se) and 0 < se * root < FARTHEST / 4 else 0.5
    low, high = (_end(problem, theta, rss, contrast, estimate, sign * step, root) for sign in (-1.0, 1.0))
    return low, high


def profile_curve(problem: Problem, theta: Array, rss: float, contrast: Array, values: Array) -> Array:
    """√F (points,) with contrast·theta held at each of some increasing values, each fit started at its neighbour's end.

    The fits go outwards from the estimate, so that every start is a solution nearby.
    """
    roots = np.empty(len(values))
    middle = int(np.searchsorted(values, float(contrast @ theta)))
    unit = contrast / (contrast @ contrast)
    for indices in (range(middle - 1, -1, -1), range(middle, len(values))):
        start, at = theta, float(contrast @ theta)
        for i in indices:
            f, start = profile_f(problem, theta, rss, contrast, float(values[i]), start + unit * (values[i] - at))
            roots[i], at = np.sqrt(max(f, 0.0)), float(values[i])
    return roots


def _end(
    problem: Problem, theta: Array, rss: float, contrast: Array, estimate: float, step: float, root: float
) -> float | None:
    """Where √F first reaches `root` on one side: expand until bracketed, then close in.

    Every constrained fit starts from the solution at the inner side of the bracket: a start from beyond the interval
    may sit in a basin where one term of the law has vanished.
    """
    inner, inner_g, start = 0.0, -root, theta
    outer, outer_g = step, 0.0
    reach = max(FARTHEST, 3.0 * abs(step))
    unit = contrast / (contrast @ contrast)

    def excess(at: float) -> tuple[float, Array]:
        f, end = profile_f(problem, theta, rss, contrast, estimate + at, start + unit * (at - inner))
        return float(np.sqrt(max(f, 0.0)) - root), end

    while True:
        outer_g, end = excess(outer)
        if outer_g > 0:
            break
        if abs(outer) >= reach:
            return None
        inner, inner_g, start = outer, outer_g, end
        outer = np.sign(step) * min(abs(outer) * (1.7 if outer_g < -0.3 * root else 1.15), reach)
    inner_weight, outer_weight = 1.0, 1.0
    for _ in range(60):
        if abs(outer - inner) < 1e-10 * max(abs(outer), abs(step)):
            break
        share = inner_weight * inner_g / (inner_weight * inner_g - outer_weight * outer_g)
        middle = inner + (outer - inner) * (share if outer_g < 2 * root else 0.5)
        g, end = excess(middle)
        if abs(g) < 1e-7 * root:
            return estimate + middle
        if g > 0:
            outer, outer_g, outer_weight, inner_weight = middle, g, 1.0, 0.5 * inner_weight
        else:
            inner, inner_g, start, inner_weight, outer_weight = middle, g, end, 1.0, 0.5 * outer_weight
    return estimate + 0.5 * (inner + outer)
