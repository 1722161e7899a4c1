"""Checks of a finished fit: is it identified, reproduced, free of pattern, within the noise, not due to one run?"""

from __future__ import annotations

import numpy as np
from scipy.special import fdtrc, stdtr

from analysis.fits.intervals import NOISELESS, condition
from analysis.fits.problem import Problem
from analysis.fits.solve import Optimum
from analysis.fits.weights import SeedNoise
from analysis.format import Interval
from analysis.laws.law import Array
from analysis.notes import Note, note

NO_FLOOR = 1e-6
"""Share of the smallest loss below which a fitted floor counts as none."""


LARGE = 0.10
"""Scatter around the law from which on it does not describe the runs."""

FLOOR_LEVELS = 4
"""Fewest sizes at which a floor can be told from a bend: three leave none to test it."""

MOST_DEVIATIONS = 1000
"""Largest number of standard deviations that is told: beyond it the others are exact, and the number means nothing."""


def check_fit(
    problem: Problem,
    optimum: Optimum,
    intervals: dict[str, Interval],
    noise: SeedNoise | None,
    runs: list[str],
    cell: np.ndarray,
) -> list[Note]:
    """Notes on a fit; one of severity error if it cannot be used.

    Args:
        runs: The names of the runs behind the points, in the order of `problem`.
        cell: The number of the cell of each point: points of one cell are repeats.
    """
    return [
        *_convergence(optimum),
        *_identified(problem, optimum.theta, intervals),
        *_design(problem, optimum.theta),
        *_residuals(problem, optimum, noise, runs, cell),
    ]


def _convergence(optimum: Optimum) -> list[Note]:
    notes = []
    if not optimum.moved:
        notes.append(note("start_equals_solution", "error", "the solution equals its start and is not a minimum"))
    hits = round(optimum.reached * optimum.starts)
    if optimum.starts >= 8 and (hits < 2 or optimum.reached < 0.03):
        text = f"only {hits} of {optimum.starts} starts reached the best objective"
        notes.append(note("optimum_not_reproduced", "warning", text))
    return notes


def _identified(problem: Problem, theta: Array, intervals: dict[str, Interval]) -> list[Note]:
    law, notes = problem.law, []
    if law.floor is not None:
        names = law.floor_params
        opened = [name for name in names if name in intervals and None in intervals[name]]
        if opened:
            text = f"the data do not bound {' and '.join(opened)}: the interval is open"
            notes.append(note("floor_not_identified", "warning", text))
        if _without_floor(problem, theta):
            text = f"the best floor is zero ({', '.join(names)} run to the edge): the fit is that without a floor"
            notes.append(note("parameter_at_bound", "warning", text))
    return notes


def _without_floor(problem: Problem, theta: Array) -> bool:
    """Whether the fitted floor is negligible at every point."""
    return bool(np.max(problem.law.log_floor(theta, problem.phi) - problem.y) < np.log(NO_FLOOR))


def _design(problem: Problem, theta: Array) -> list[Note]:
    law = problem.law
    keep = np.ones(problem.size, dtype=bool)
    if law.floor is not None and _without_floor(problem, theta):
        keep[[law.params.index(name) for name in law.floor_params]] = False
    number = condition(problem.jacobian(theta)[:, keep])
    notes = []
    if number > 300:
        severity = "error" if number > 1e3 else "warning"
        notes.append(note("degenerate_design", severity, f"condition of the centred, scaled Jacobian is {number:.3g}"))
    levels = len(np.unique(problem.inputs[law.scale_input]))
    if law.floor is not None and levels < FLOOR_LEVELS:
        text = f"{levels} sizes do not show whether there is a floor: a law with a floor goes through any three"
        notes.append(note("too_few_levels", "error", text, f"run at least {FLOOR_LEVELS} sizes, or fit a law without"))
    return notes


def _residuals(
    problem: Problem, optimum: Optimum, noise: SeedNoise | None, runs: list[str], cell: np.ndarray
) -> list[Note]:
    notes = []
    residual = problem.residual(optimum.theta)
    dof = problem.points - problem.size
    scatter = np.sqrt(np.sum(residual**2) / dof) if dof > 0 else 0.0
    if scatter >= LARGE:
        notes.append(note("large_residuals", "error", f"runs scatter by {100 * scatter:.2g} % around the law"))
    if dof < 4 or np.sqrt(np.mean(residual**2)) < NOISELESS:
        return notes
    patterns = [name for name in problem.law.inputs if _pattern(problem, optimum.theta, residual, name) < 0.005]
    if patterns:
        text = f"residuals bend along {' and '.join(patterns)} (p < 0.005)"
        notes.append(note("structured_residuals", "error", text))
    if noise is not None and noise.dof >= 2 and noise.cells > problem.size:
        p = _lack_of_fit(problem, residual, cell)
        if p < 0.01:
            text = f"residuals exceed the noise between seeds of {100 * noise.sd:.2g} % (F test, p = {p:.1g})"
            notes.append(note("lack_of_fit", "warning", text))
    t, worst = _studentised(problem, optimum.theta, residual)
    p = 2 * problem.points * float(stdtr(dof - 1, -abs(t)))
    if p < 0.01:
        far = f"more than {MOST_DEVIATIONS:,}" if abs(t) > MOST_DEVIATIONS else f"{abs(t):.1f}"
        text = f"{runs[worst]} lies {far} standard deviations from the fit to the others"
        notes.append(note("outlier_driven", "warning", text))
    return notes


def _pattern(problem: Problem, theta: Array, residual: Array, name: str) -> float:
    """p-value of a cubic in ln(input) added to the fit, linearised."""
    u = np.log(problem.inputs[name])
    u = u - u.mean()
    levels = len(np.unique(np.round(u, 9)))
    if levels < 4:
        return 1.0
    u = u / max(float(np.max(np.abs(u))), 1e-12)
    added = np.stack([u**power for power in (2, 3)], axis=1) * problem.root_weight[:, None]
    return _added_p(problem.jacobian(theta), added, residual)


def _added_p(base: Array, added: Array, residual: Array) -> float:
    """p-value of the F test for adding columns. The first columns of Q span the smaller design."""
    size = base.shape[1]
    q, r = np.linalg.qr(np.column_stack([base, added]))
    along = q.T @ residual
    large = float(np.sum((residual - q @ along) ** 2))
    small = large + float(np.sum(along[size:] ** 2))
    few, many = int(np.linalg.matrix_rank(r[:size, :size])), int(np.linalg.matrix_rank(r))
    dof = len(residual) - many
    if many <= few or dof < 3 or large <= 0:
        return 1.0
    return float(fdtrc(many - few, dof, (small - large) / (many - few) / (large / dof)))


def _lack_of_fit(problem: Problem, residual: Array, cell: np.ndarray) -> float:
    """p-value of the pure-error F test: mean squares between repeated cells against those within."""
    weight = problem.root_weight**2
    mean = np.bincount(cell, problem.root_weight * residual) / np.bincount(cell, weight)
    within = float(np.sum((residual - problem.root_weight * mean[cell]) ** 2))
    cells = int(cell.max()) + 1
    between = float(np.sum(residual**2)) - within
    dof_between, dof_within = cells - problem.size, problem.points - cells
    if dof_between < 1 or dof_within < 1 or within <= 0:
        return 1.0
    return float(fdtrc(dof_between, dof_within, (between / dof_between) / (within / dof_within)))


def _studentised(problem: Problem, theta: Array, residual: Array) -> tuple[float, int]:
    """The largest externally studentised residual and the index of its point."""
    q, _ = np.linalg.qr(problem.jacobian(theta))
    leverage = np.minimum(np.sum(q**2, axis=1), 1 - 1e-9)
    dof = problem.points - problem.size
    rss = float(np.sum(residual**2))
    left = np.maximum(rss - residual**2 / (1 - leverage), 1e-300) / (dof - 1)
    t = residual / np.sqrt(left * (1 - leverage))
    worst = int(np.argmax(np.abs(t)))
    return float(t[worst]), worst
