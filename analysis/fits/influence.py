"""Fits without some of the rows: how much each cell moves the exponents, and whether the rows at an edge belong."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import fdtrc

from analysis.fits.intervals import NOISELESS, covariance, critical_t, form_variance
from analysis.fits.problem import Problem
from analysis.fits.solve import minimise
from analysis.format import number
from analysis.laws.law import Array, SmoothBreak
from analysis.notes import Note, note

MOST_CELLS = 150
"""Cells above which none is left out: one of so many decides nothing."""

MOST_WORK = 3_000_000
"""Cells times points above which none is left out: the fits would take minutes."""

EVALUATIONS = 100
"""Most evaluations of the residuals in a fit without some rows. It starts from the fit to all."""

LEAST_DOF = 2
"""Degrees of freedom that a fit without some rows must keep."""

DECIDES = 1.5
"""`Influence.shift` above which one cell decides. In simulations without any fault the largest one of 15 cells is
below 1.4 in 95 % of draws."""

DOUBTFUL = 0.01
"""p-value, over all edges together, below which the rows at an edge do not belong to the fit of the others."""


@dataclass(frozen=True)
class Influence:
    """What the fit would be without one cell."""

    cell: dict[str, float]
    """Input → value."""
    without: dict[str, float]
    """Exponent → its estimate without the cell."""
    shift: float
    """Largest distance of an exponent of all cells from that without this one, in half widths of the latter's
    interval (Wald): the fit to the others does not know the cell, so its interval does not hide it."""

    @property
    def where(self) -> str:
        """The cell in words: "n=4096 k=32"."""
        return " ".join(f"{name}={value:g}" for name, value in self.cell.items())

    @property
    def values(self) -> str:
        """The exponents without the cell in words."""
        return ", ".join(f"{name} {number(value)}" for name, value in self.without.items())


def exponents(problem: Problem) -> list[str]:
    """The parameters that are exponents: those that multiply a logarithm."""
    law = problem.law
    if isinstance(law, SmoothBreak):
        return ["a", "c"]
    owners = {entry.param for term in law.terms for entry in term if entry.monomial}
    return [name for name in law.params if name in owners]


def influences(problem: Problem, theta: Array, cell: np.ndarray, level: float) -> list[Influence]:
    """The fit without each cell, the most influential first; none if there are too few or too many cells.

    Args:
        cell: The number of the cell of each point (points,), from 0.
        level: Confidence level of the intervals.
    """
    cells = int(cell.max()) + 1
    names = exponents(problem)
    if cells > MOST_CELLS or cells * problem.points > MOST_WORK or not names:
        return []
    estimates = _named(problem, theta, names)
    found = []
    for number_of_cell in range(cells):
        kept = np.flatnonzero(cell != number_of_cell)
        rest = problem.take(kept)
        if min(rest.dof, rest.points - rest.size) < LEAST_DOF:
            return []
        at = _refit(problem, theta, kept)
        without, half = _named(problem, at, names), _half_widths(rest, at, names, level)
        shift = max(abs(without[name] - estimates[name]) / half[name] for name in names)
        found.append(Influence(_inputs(problem, int(np.flatnonzero(cell == number_of_cell)[0])), without, shift))
    return sorted(found, key=lambda entry: -entry.shift)


def influence_notes(found: list[Influence], noiseless: bool) -> list[Note]:
    """A note if one cell decides the exponents: the fit to the others excludes what all cells give."""
    if noiseless or not found or found[0].shift <= DECIDES:
        return []
    worst = found[0]
    text = f"the cell {worst.where} decides the exponents: without it {worst.values}, which excludes the fit to all"
    return [note("one_cell_decides", "error", text)]


def edge_notes(problem: Problem, theta: Array) -> list[Note]:
    """A note if the rows at the smallest or largest value of an input do not agree with the fit to the others."""
    edges = list(_edges(problem))
    rss = float(np.sum(problem.residual(theta) ** 2))
    worst: tuple[float, str] | None = None
    for name, value, out in edges:
        kept, left_out = np.flatnonzero(~out), problem.take(np.flatnonzero(out))
        others = problem.take(kept)
        spare = others.points - others.size
        if min(others.dof, spare) < LEAST_DOF:
            continue
        at = _refit(problem, theta, kept)
        rest = float(np.sum(others.residual(at) ** 2))
        if np.sqrt(rest / len(kept)) < NOISELESS:
            continue
        runs = left_out.points if left_out.group is None else len(np.unique(left_out.group))
        f = max(rss - rest, 0.0) / left_out.points / (rest / spare)
        p = float(fdtrc(runs, others.dof, f)) * len(edges)
        if p < DOUBTFUL and (worst is None or p < worst[0]):
            residual = problem.y[out] - problem.law.log_value(at, problem.phi[:, out])
            off = ", ".join(f"{100 * float(end):+.2g}" for end in (residual.min(), residual.max()))
            values = ", ".join(f"{key} {number(v)}" for key, v in _named(problem, at, exponents(problem)).items())
            rows = f"the {int(out.sum())} row(s) with {name} = {value:g}"
            text = (
                f"{rows} do not belong: they lie {off} % (least, most) from the fit to the others, which has {values}"
            )
            worst = p, text.replace("-", "−")
    return [] if worst is None else [note("edge_rows", "error", worst[1])]


def _edges(problem: Problem):
    """(input, value, mask of the points) at both ends of every input that keeps its levels without them."""
    law = problem.law
    for name in law.inputs:
        x = problem.inputs[name]
        levels = np.unique(x)
        if len(levels) - 1 < max(law.min_levels.get(name, 2), 2):
            continue
        for value in (levels[0], levels[-1]):
            yield name, float(value), x == value


def _refit(problem: Problem, theta: Array, kept: np.ndarray) -> Array:
    return minimise(problem.take(kept), [theta], evaluations=EVALUATIONS).theta


def _named(problem: Problem, theta: Array, names: list[str]) -> dict[str, float]:
    matrix, offset = problem.raw_map()
    raw = dict(zip(problem.law.params, map(float, matrix @ theta + offset), strict=True))
    return {name: raw[name] for name in names}


def _half_widths(problem: Problem, theta: Array, names: list[str], level: float) -> dict[str, float]:
    """Half widths of the Wald intervals of some raw coefficients; inf where the data do not determine them."""
    dof, spare = problem.dof, problem.points - problem.size
    variance = max(float(np.sum(problem.residual(theta) ** 2)) / spare, NOISELESS**2)
    matrix, _ = problem.raw_map()
    rows = matrix[[problem.law.params.index(name) for name in names]]
    half = critical_t(dof, level) * np.sqrt(form_variance(rows, covariance(problem, theta, variance)))
    return dict(zip(names, map(float, np.where(np.isfinite(half), half, np.inf)), strict=True))


def _inputs(problem: Problem, point: int) -> dict[str, float]:
    return {name: float(values[point]) for name, values in problem.inputs.items()}
