"""Covariance, Wald and profile-F intervals of any linear combination of the coefficients.

Profile: hold c·θ at a value v, optimise everything else, compare F(v) = (RSS(v) − RSS) / s² with its critical value.
An end is *open* (None) if the fit never becomes that bad on its side: the data do not bound it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from scipy.optimize import root_scalar
from scipy.special import fdtri, stdtrit

from analysis.fits.problem import Problem
from analysis.fits.solve import constrained, solve
from analysis.format import Interval
from analysis.laws.law import Array

FARTHEST = 30.0
"""Distance from the estimate (in exponents or log amplitudes) beyond which an end counts as open."""

PRECISION = 1e-9
"""Error of a profile's end, relative to its distance from the estimate."""

HELD = (10.0, 100.0)
"""Weights of a residual that holds the law at a value: the last misses it by a ten-thousandth of the standard error of
ln y. A larger one at once would make a valley so narrow that the descent ends on its way."""

STEP = 1e-4
"""Difference of ln(size) over which the slope of a law is taken."""

NOISELESS = 1e-8
"""Root-mean-square residual below which a profile would measure nothing but rounding."""

ROUNDING = 100 * float(np.finfo(float).eps)
"""A variance below this times the sum of the sizes of its parts is rounding."""

NEGLIGIBLE = 1e-8
"""An undetermined coefficient does not matter if a unit of it changes ln y by less than this."""


def covariance(problem: Problem, theta: Array, variance: float) -> Array:
    """variance·(JᵀJ)⁻¹ in centred coordinates (params, params); inf on the diagonal of undetermined coefficients."""
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

    NaN if it cannot be computed: rounding swamps it (huge entries of a near-singular covariance cancel, sometimes to
    less than zero), or it depends on a coefficient that the data do not determine.
    """
    lost = ~np.isfinite(np.diag(cov))
    finite = np.where(np.isfinite(cov), cov, 0.0)
    finite[lost, :], finite[:, lost] = 0.0, 0.0
    variance = np.einsum("np,pq,nq->n", rows, finite, rows)
    size = np.abs(rows)
    rounding = ROUNDING * np.einsum("np,pq,nq->n", size, np.abs(finite), size)
    undetermined = (size[:, lost] > NEGLIGIBLE).any(axis=1)
    return np.where((variance > rounding) & ~undetermined, variance, np.nan)


def condition(jac: Array) -> float:
    """Condition number of a Jacobian with its columns scaled to length one; inf if a column is zero."""
    scale = np.linalg.norm(jac, axis=0)
    if not np.all(scale > 1e-12 * scale.max()):
        return float("inf")
    s = np.linalg.svd(jac / scale, compute_uv=False)
    return float(s[0] / s[-1]) if s[-1] > 0 else float("inf")


def critical_f(dof: int, level: float) -> float:
    """F quantile with (1, dof) degrees of freedom."""
    return float(fdtri(1, dof, level))


def critical_t(dof: int, level: float) -> float:
    """Two-sided t quantile with `dof` degrees of freedom."""
    return float(stdtrit(dof, 0.5 + level / 2))


def wald(estimate: float, se: float, dof: int, level: float) -> Interval:
    """estimate ± t·se; open if se is not finite."""
    if not np.isfinite(se):
        return None, None
    half = critical_t(dof, level) * se
    return estimate - half, estimate + half


def coefficient(design: Array, y: Array, place: int, level: float = 0.95) -> tuple[float, Interval]:
    """A coefficient of least squares and its t interval; open without degrees of freedom."""
    found = np.linalg.lstsq(design, y, rcond=None)[0]
    dof = len(y) - design.shape[1]
    if dof < 1:
        return float(found[place]), (None, None)
    variance = float(np.square(y - design @ found).sum()) / dof * np.linalg.inv(design.T @ design)[place, place]
    return float(found[place]), wald(float(found[place]), float(np.sqrt(variance)), dof, level)


def noiseless(rss: float, points: int) -> bool:
    """Whether residuals are rounding only, so that F has no meaning."""
    return bool(np.sqrt(rss / points) < NOISELESS)


def profile_f(
    problem: Problem, theta: Array, rss: float, contrast: Array, value: float, start: Array | None = None
) -> tuple[float, Array]:
    """(F, theta) with contrast·theta held at `value` and everything else optimised, from `start` (default: theta)."""
    unit = contrast / np.linalg.norm(contrast)
    fixed = unit * (value / np.linalg.norm(contrast))
    basis = np.linalg.svd(unit[None, :])[2][1:].T
    dof = problem.points - problem.size
    end, objective = constrained(problem, theta if start is None else start, fixed, basis)
    return (objective - rss) / max(rss / dof, np.finfo(float).tiny), end


def profile(problem: Problem, theta: Array, rss: float, contrast: Array, se: float, level: float) -> Interval:
    """Profile-F interval of contrast·theta (raw offset not included); None for an open end."""
    dof = problem.dof
    if dof < 1:
        return None, None
    estimate = float(contrast @ theta)
    if noiseless(rss, problem.points):
        return wald(estimate, se, dof, level)
    return _both_ends(
        lambda value, start: profile_f(problem, theta, rss, contrast, value, start),
        theta,
        estimate,
        contrast / (contrast @ contrast),
        se,
        critical_f(dof, level),
    )


def value_profile(problem: Problem, theta: Array, rss: float, phi: Array, level: float) -> Interval:
    """Profile-F interval of centred ln y of the law at any point; None for an open end.

    Args:
        phi: Features of the point (terms, 1, params).
    """
    spare = problem.points - problem.size
    if problem.dof < 1 or noiseless(rss, problem.points):
        return None, None
    se, along = _direction(problem, theta, rss / spare, phi)
    estimate = float(problem.law.log_value(theta, phi)[0])
    return _both_ends(
        lambda value, start: _held_at(problem, rss, phi, value, start),
        theta,
        estimate,
        along,
        se,
        critical_f(problem.dof, level),
    )


def size_profile(
    problem: Problem, theta: Array, rss: float, features: Callable[[float], Array], log_size: float, level: float
) -> Interval:
    """Profile-F interval of ln(size) at which the law has the value that its estimate has at `log_size`; None for an
    open end.

    Args:
        features: ln(size) → features of the point of that size (terms, 1, params).
    """
    spare = problem.points - problem.size
    if problem.dof < 1 or noiseless(rss, problem.points):
        return None, None
    phi = features(log_size)
    value = float(problem.law.log_value(theta, phi)[0])
    slope = (float(problem.law.log_value(theta, features(log_size + STEP))[0]) - value) / STEP
    se, along = _direction(problem, theta, rss / spare, phi)
    return _both_ends(
        lambda size, start: _held_at(problem, rss, features(size), value, start),
        theta,
        log_size,
        -slope * along,
        se / max(abs(slope), np.finfo(float).tiny),
        critical_f(problem.dof, level),
    )


def _direction(problem: Problem, theta: Array, variance: float, phi: Array) -> tuple[float, Array]:
    """(standard error of ln y at a point, change of theta with that value if everything else is optimised)."""
    slope, cov = problem.law.jacobian(theta, phi), covariance(problem, theta, variance)
    with np.errstate(invalid="ignore"):
        se = float(np.sqrt(form_variance(slope, cov)[0]))
        along = cov @ slope[0] / se**2
    return se, along if np.isfinite(along).all() else slope[0] / (slope[0] @ slope[0])


def _held_at(problem: Problem, rss: float, phi: Array, value: float, start: Array) -> tuple[float, Array]:
    """(F, theta) with ln y of the law held at `value` at a point, by a further point of overwhelming weight."""
    group = None if problem.group is None else np.r_[problem.group, problem.group.max() + 1]
    held = replace(problem, phi=np.concatenate([problem.phi, phi], axis=1), y=np.r_[problem.y, value], group=group)
    end = start
    for weight in HELD:  # the point is a run of its own, of which whitening leaves a part
        root_weight = np.r_[problem.root_weight, weight / (1.0 - problem.shrink)]
        end, _ = solve(replace(held, root_weight=root_weight), end, evaluations=200)
    worse = float(np.sum(problem.residual(end) ** 2)) - rss
    return worse / max(rss / (problem.points - problem.size), np.finfo(float).tiny), end


Held = Callable[[float, Array], tuple[float, Array]]
"""(value, start) → (F, theta) with a quantity held at that value and everything else optimised."""


def _both_ends(held: Held, theta: Array, estimate: float, along: Array, se: float, limit: float) -> Interval:
    """Where F reaches `limit` on either side of the estimate; None for an open end.

    Args:
        along: By how much theta changes, to first order, as the quantity grows by one (params,).
    """
    root = float(np.sqrt(limit))
    step = root * se if np.isfinite(se) and 0 < se * root < FARTHEST / 4 else 0.5
    low, high = (_end(held, theta, estimate, along, sign * step, root) for sign in (-1.0, 1.0))
    return low, high


def profile_curve(problem: Problem, theta: Array, rss: float, contrast: Array, values: Array) -> Array:
    """√F (points,) with contrast·theta held at each of `values`, which increase.

    The fits go outwards from the estimate; each starts from the solution of its neighbour.
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


def _end(held: Held, theta: Array, estimate: float, along: Array, step: float, root: float) -> float | None:
    """Where √F first reaches `root` on the side of `step`; None if it does not within reach.

    The search steps outwards until it brackets the end, then closes in. Every constrained fit starts from the solution
    at the inner side of the bracket: from beyond the interval it may end in a basin in which one term of the law has
    vanished.
    """
    inner, start = 0.0, theta
    excesses = {0.0: -root}

    def excess(at: float) -> float:
        nonlocal inner, start
        if at not in excesses:
            f, end = held(estimate + at, start + along * (at - inner))
            excesses[at] = float(np.sqrt(max(f, 0.0)) - root)
            if excesses[at] <= 0:
                inner, start = at, end
        return excesses[at]

    outer, reach = step, max(FARTHEST, 3.0 * abs(step))
    while excess(outer) <= 0:
        if abs(outer) >= reach:
            return None
        outer = float(np.sign(step)) * min(abs(outer) * (1.7 if excess(outer) < -0.3 * root else 1.15), reach)
    closed = root_scalar(excess, bracket=(inner, outer), method="brentq", xtol=PRECISION * abs(outer))
    return estimate + float(closed.root)
