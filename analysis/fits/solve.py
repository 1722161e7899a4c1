"""Levenberg–Marquardt (MINPACK) from many starts, and the share of the starts that reached the best optimum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import least_squares, leastsq

from analysis.fits.problem import Problem
from analysis.laws.law import Array

MANY = 20_000
"""Points above which the search for the optimum runs on a sample and intervals are Wald's."""
SAMPLE = 4_000
"""Points of that sample."""

SAME_OPTIMUM = 1e-5
"""Relative excess of the objective within which two solutions count as one."""

POLISHES = 12
"""Most Gauss–Newton steps after the descent."""
DETERMINED = 1e6
"""Condition of the scaled Jacobian up to which an optimum is polished."""


@dataclass(frozen=True)
class Optimum:
    """The best solution, and how the starts fared."""

    theta: Array
    """(params,)"""
    objective: float
    """Σ r² (least squares), or twice the Huber cost."""
    reached: float
    """Share of the starts that ended at this objective."""
    moved: bool
    """False if the solution equals its start although the gradient there is not zero."""
    starts: int
    """Number of starts."""


def minimise(problem: Problem, starts: list[Array], huber: float | None = None, evaluations: int = 2000) -> Optimum:
    """The best solution over all starts.

    Args:
        huber: δ of the Huber loss on the residuals; None is least squares.
        evaluations: Most evaluations of the residuals per start.
    """
    ends = [solve(problem, start, huber, evaluations) for start in starts]
    objectives = np.array([objective for _, objective in ends])
    best = int(np.argmin(objectives))
    theta, objective = ends[best] if huber is not None else _polished(problem, *ends[best])
    slack = SAME_OPTIMUM * objective + 1e-18 * problem.points
    reached = float(np.mean(objectives <= objective + slack))
    moved = bool(np.max(np.abs(theta - starts[best])) > 1e-10) or _stationary(problem, theta, huber)
    return Optimum(theta, float(objective), reached, moved, len(starts))


def minimise_many(problem: Problem, starts: list[Array], seed: int, huber: float | None, evaluations: int) -> Optimum:
    """`minimise` for very many points: the search runs on a sample, and its best end is refined on all points."""
    rows = np.sort(np.random.default_rng(seed).choice(problem.points, SAMPLE, replace=False))
    thin = problem.take(rows)
    ends = sorted((solve(thin, start, huber, evaluations) for start in starts), key=lambda end: end[1])
    best = minimise(problem, [ends[0][0]], huber, evaluations)
    reached = float(np.mean([end[1] <= ends[0][1] * (1 + SAME_OPTIMUM) for end in ends]))
    return Optimum(best.theta, best.objective, reached, best.moved, len(starts))


def solve(problem: Problem, start: Array, huber: float | None = None, evaluations: int = 2000) -> tuple[Array, float]:
    """(theta, objective) reached from one start; (start, inf) if the residuals are not finite."""
    if not np.all(np.isfinite(problem.residual(start))):
        return start, float("inf")
    if huber is not None:
        end: Any = least_squares(
            problem.residual,
            start,
            problem.jacobian,  # pyright: ignore[reportArgumentType]
            loss="huber",
            f_scale=huber,
            x_scale="jac",
            xtol=1e-14,
            ftol=1e-14,
            gtol=1e-14,
            max_nfev=evaluations,
        )
        return end.x, 2.0 * float(end.cost)
    return _least_squares(problem.residual, problem.jacobian, start, evaluations)


def constrained(
    problem: Problem, start: Array, fixed: Array, basis: Array, evaluations: int = 200
) -> tuple[Array, float]:
    """Least squares over theta = fixed + basis @ φ; returns (theta, Σ r²). `start` is projected onto that set."""
    if basis.shape[1] == 0:
        return fixed, float(np.sum(problem.residual(fixed) ** 2))
    phi, objective = _least_squares(
        lambda free: problem.residual(fixed + basis @ free),
        lambda free: problem.jacobian(fixed + basis @ free) @ basis,
        basis.T @ (start - fixed),
        evaluations,
    )
    return fixed + basis @ phi, objective


def _least_squares(
    residual: Callable[[Array], Array], jacobian: Callable[[Array], Array], start: Array, evaluations: int
) -> tuple[Array, float]:
    if not np.all(np.isfinite(residual(start))):
        return start, float("inf")
    with np.errstate(all="ignore"):
        solution: Any = leastsq(
            residual,
            start,
            Dfun=jacobian,
            full_output=True,
            ftol=1e-13,
            xtol=1e-13,
            gtol=0.0,
            maxfev=evaluations,
        )
    end, info = solution[0], solution[2]
    objective = float(np.sum(info["fvec"] ** 2))
    return (end, objective) if np.isfinite(objective) else (start, float("inf"))


def _polished(problem: Problem, theta: Array, objective: float) -> tuple[Array, float]:
    """Gauss–Newton down to rounding: the descent stops when the objective stands still, with half the digits of theta.

    It stops if the data do not determine all coefficients: a step would run along the undetermined ones.
    """
    left = np.inf
    for _ in range(POLISHES if np.isfinite(objective) else 0):
        residual, jac = problem.residual(theta), problem.jacobian(theta)
        scale = np.linalg.norm(jac, axis=0)
        if not (np.all(np.isfinite(jac)) and np.all(scale > 0)):
            break
        q, r = np.linalg.qr(jac / scale)
        slope = q.T @ residual
        if np.linalg.cond(r) > DETERMINED or not np.linalg.norm(slope) < 0.5 * left:
            break
        left = float(np.linalg.norm(slope))
        candidate = theta - np.linalg.solve(r, slope) / scale
        reached = float(np.sum(problem.residual(candidate) ** 2))
        if not reached <= objective * (1 + 1e-12) + 1e-300:
            break
        theta, objective = candidate, reached
    return theta, objective


def _stationary(problem: Problem, theta: Array, huber: float | None) -> bool:
    """Whether the gradient is zero relative to the largest that these residuals and columns allow."""
    residual, jac = problem.residual(theta), problem.jacobian(theta)
    if huber is not None:
        residual = np.clip(residual, -huber, huber)
    scale = np.linalg.norm(jac, axis=0) * np.linalg.norm(residual) + 1e-300
    return bool(np.max(np.abs(jac.T @ residual) / scale) < 1e-6) or bool(np.linalg.norm(residual) < 1e-9)
