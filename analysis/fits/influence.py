"""Fits without some of the rows: how much each cell moves the exponents and the forecasts, and whether the rows at an
edge belong."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import fdtrc, stdtr

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

ASTRAY = 0.02
"""p-value, over all cells of the largest size together, below which one of them decides the forecasts. They hold the
end of the law, so that an error in one shows little in the residuals: hence a laxer limit than for other outliers."""

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
    off: float
    """How far ln(loss) of the cell lies from the fit to the others."""
    p: float
    """p-value of that distance, of this cell alone; 1 where the others do not determine the law there."""

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
        variance = max(float(np.sum(rest.residual(at) ** 2)) / (rest.points - rest.size), NOISELESS**2)
        cov = covariance(rest, at, variance)
        without, half = _named(problem, at, names), _half_widths(rest, cov, names, level)
        shift = max(abs(without[name] - estimates[name]) / half[name] for name in names)
        left_out = problem.take(np.flatnonzero(cell == number_of_cell))
        off, t = _distance(left_out, at, cov, variance)
        p = 2 * float(stdtr(rest.dof, -abs(t))) if np.isfinite(t) else 1.0
        inputs = {name: float(values[0]) for name, values in left_out.inputs.items()}
        found.append(Influence(inputs, without, shift, off, p))
    return sorted(found, key=lambda entry: -entry.shift)


def _distance(cell: Problem, at: Array, cov: Array, variance: float) -> tuple[float, float]:
    """(how far ln(loss) of a cell lies from a fit to others, in standard errors: of the cell and of that fit)."""
    unit = cell.unit()
    weight = float(unit @ unit)
    off = -float(unit @ cell.residual(at)) / weight
    slope = unit @ cell.jacobian(at) / weight
    return off, off / float(np.sqrt(variance / weight + form_variance(slope[None, :], cov)[0]))


def influence_notes(found: list[Influence], scale: str, noiseless: bool) -> list[Note]:
    """A note if one cell decides the exponents (the fit to the others excludes what all cells give) or the forecasts
    (a cell of the largest size lies too far from the fit to the others).

    Args:
        scale: The input along which forecasts go.
    """
    if noiseless or not found:
        return []
    notes, worst = [], found[0]
    if worst.shift > DECIDES:
        text = (
            f"one cell, {worst.where}, decides the exponents: without it they are {worst.values}, and their intervals "
            "do not hold the values with it"
        )
        notes.append(note("one_cell_decides", "error", text))
    largest = max(entry.cell[scale] for entry in found)
    last = [entry for entry in found if entry.cell[scale] == largest]
    astray = min(last, key=lambda entry: entry.p)
    if astray.p * len(last) < ASTRAY and (astray is not worst or not notes):
        off = f"{100 * astray.off:+.2g} %".replace("-", "−")
        text = f"forecasts rest on the cell {astray.where}, which lies {off} from the fit to the others"
        notes.append(note("one_cell_decides", "error", text))
    return notes


@dataclass(frozen=True)
class Edge:
    """Rows at the smallest or largest value of an input that do not agree with the fit to the others."""

    input: str
    value: float
    points: np.ndarray
    """Which points of the problem (points,)."""
    ends: tuple[float, float]
    """The least and the most that ln(loss) of these rows lies from the fit to the others."""
    without: str
    """The exponents of the fit to the others, in words."""
    with_them: str
    """The exponents of the fit to all."""
    p: float

    @property
    def text(self) -> str:
        """Which rows do not belong, and how far off they are."""
        off = " to ".join(f"{100 * end:+.2g}" for end in self.ends).replace("-", "−")
        count = int(self.points.sum())
        rows = f"the {count} rows" if count > 1 else "the row"
        return (
            f"{rows} with {self.input} = {self.value:g} lie {off} % from the fit to the others and do not belong to it"
        )


def doubtful_edge(problem: Problem, theta: Array, cell: np.ndarray) -> Edge | None:
    """The rows at an edge that agree least with the fit to the others; None if all edges agree.

    Rows that disagree only because of one of their cells are no such edge: the cell is told by `influence_notes`.

    Args:
        cell: The number of the cell of each point (points,).
    """
    edges = list(_edges(problem))
    worst: Edge | None = None
    for name, value, out in edges:
        at, p = _disagreement(problem, theta, out)
        if p * len(edges) >= DOUBTFUL or (worst is not None and p >= worst.p):
            continue
        residual = problem.y[out] - problem.law.log_value(at, problem.phi[:, out])
        cells = np.unique(cell[out])
        if len(cells) > 1:
            far = max(cells, key=lambda c: abs(float(residual[cell[out] == c].mean())))
            left = np.flatnonzero(cell != far)
            if _disagreement(problem.take(left), _refit(problem, theta, left), out[left])[1] >= DOUBTFUL:
                continue
        ends = float(residual.min()), float(residual.max())
        worst = Edge(name, value, out, ends, _in_words(problem, at), _in_words(problem, theta), p)
    return worst


def _disagreement(problem: Problem, theta: Array, out: np.ndarray) -> tuple[Array, float]:
    """(the fit without some points, p-value of the F test that these follow it); 1 where there is nothing to test."""
    kept, left_out = np.flatnonzero(~out), problem.take(np.flatnonzero(out))
    others = problem.take(kept)
    spare = others.points - others.size
    if min(others.dof, spare) < LEAST_DOF:
        return theta, 1.0
    at = _refit(problem, theta, kept)
    rest = float(np.sum(others.residual(at) ** 2))
    if np.sqrt(rest / len(kept)) < NOISELESS:
        return at, 1.0
    rss = float(np.sum(problem.residual(theta) ** 2))
    runs = left_out.points if left_out.group is None else len(np.unique(left_out.group))
    f = max(rss - rest, 0.0) / left_out.points / (rest / spare)
    return at, float(fdtrc(runs, others.dof, f))


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


def _in_words(problem: Problem, theta: Array) -> str:
    """The exponents with their names."""
    return ", ".join(f"{name} {number(v)}" for name, v in _named(problem, theta, exponents(problem)).items())


def _named(problem: Problem, theta: Array, names: list[str]) -> dict[str, float]:
    matrix, offset = problem.raw_map()
    raw = dict(zip(problem.law.params, map(float, matrix @ theta + offset), strict=True))
    return {name: raw[name] for name in names}


def _half_widths(problem: Problem, cov: Array, names: list[str], level: float) -> dict[str, float]:
    """Half widths of the Wald intervals of some raw coefficients; inf where the data do not determine them."""
    matrix, _ = problem.raw_map()
    rows = matrix[[problem.law.params.index(name) for name in names]]
    half = critical_t(problem.dof, level) * np.sqrt(form_variance(rows, cov))
    return dict(zip(names, map(float, np.where(np.isfinite(half), half, np.inf)), strict=True))
