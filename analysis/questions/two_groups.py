"""Two groups of runs fitted at once, with a common floor and with floors of their own: what they need for a loss.

ln(L − E) = ln A + s·g − a·ln x, g = 0 for the first group and 1 for the second. With exponents of their own, the second
has a + d; with floors of their own, its floor is E·e^f.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy.optimize import root_scalar
from scipy.special import fdtrc

from analysis.fits.intervals import covariance, critical_f, form_variance, profile_f, wald
from analysis.fits.problem import Problem, pose, starting_points
from analysis.fits.solve import Optimum, minimise
from analysis.format import Interval
from analysis.laws.law import Array, Entry, Law

_POWER = (Entry("A"), Entry("s", ("group",)), Entry("a", ("x",), -1.0))
SHARED = Law("shared_exponent", "E + A·e^(s·g)·x^−a", ("x", "group"), ((Entry("E"),), _POWER), ("E", "A"), 0, "x")
APART = Law(
    "own_exponents",
    "E + A·e^(s·g)·x^−(a + d·g)",
    ("x", "group"),
    ((Entry("E"),), (*_POWER, Entry("d", ("group", "x"), -1.0))),
    ("E", "A"),
    0,
    "x",
)
OWN_FLOORS = Law(
    "own_floors",
    "E·e^(f·g) + A·e^(s·g)·x^−(a + d·g)",
    ("x", "group"),
    ((Entry("E"), Entry("f", ("group",))), (*_POWER, Entry("d", ("group", "x"), -1.0))),
    ("E", "A"),
    0,
    "x",
)


def solved(law: Law, inputs: dict[str, Array], y: Array, seed: int) -> tuple[Problem, Optimum]:
    """The problem of a law of two groups, x and e^g as inputs, and its optimum."""
    problem = pose(law, inputs, y)
    return problem, minimise(problem, starting_points(problem, 48, seed))


def f_test(simple: float, full: float, dof: int) -> float:
    """p-value of one further coefficient, from the sums of squares without and with it (`dof` of the latter)."""
    if full <= 0:
        return 1.0 if simple <= 0 else 0.0
    return float(fdtrc(1, dof, max(simple - full, 0.0) / (full / dof)))


def raw(problem: Problem, theta: Array) -> dict[str, float]:
    """Coefficients by name: ln A, s, a, d, and E, F, the floors of the first and of the second group."""
    matrix, offset = problem.raw_map()
    return _named(problem.law, matrix @ theta + offset)


def _named(law: Law, raw: Array) -> dict[str, float]:
    named = {"d": 0.0, "f": 0.0} | dict(zip(law.params, map(float, raw), strict=True))
    floors = (math.exp(min(value, 700.0)) for value in (named["E"], named["E"] + named["f"]))
    return named | dict(zip(("E", "F"), floors, strict=True))


def floor_open(problem: Problem, optimum: Optimum, level: float = 0.95) -> bool:
    """Whether a floor of zero is not rejected by the F test."""
    contrast = np.zeros(problem.size)
    contrast[problem.law.params.index("E")] = 1.0
    far = float(contrast @ optimum.theta) - 20.0
    f, _ = profile_f(problem, optimum.theta, max(optimum.objective, 1e-300), contrast, far)
    return f < critical_f(problem.points - problem.size, level)


def shared_multiplier(problem: Problem, optimum: Optimum, level: float) -> tuple[float, float | None, float | None]:
    """exp(−s/a) with its profile interval: the values m for which s + m·a = 0 is not rejected (Fieller)."""
    matrix, _ = problem.raw_map()
    s_row, a_row = (matrix[problem.law.params.index(name)] for name in ("s", "a"))
    best = -float(s_row @ optimum.theta) / float(a_row @ optimum.theta)
    return math.exp(best), *_where_zero(problem, optimum, s_row, a_row, best, level)


def _where_zero(
    problem: Problem, optimum: Optimum, row: Array, per_unit: Array, best: float, level: float
) -> tuple[float | None, float | None]:
    """exp of the ends of {v: (row + v·per_unit)·θ = 0 is not rejected}, by profile F; None for an open end."""
    limit = critical_f(problem.points - problem.size, level)

    def rejected(v: float) -> float:
        f, _ = profile_f(problem, optimum.theta, optimum.objective, row + v * per_unit, 0.0)
        return f - limit

    return _edge(rejected, best, -1.0), _edge(rejected, best, 1.0)


def _edge(rejected: Callable[[float], float], best: float, sign: float) -> float | None:
    step = 0.02
    while step < 12:
        if rejected(best + sign * step) > 0:
            inner = best + sign * step / 2 if step > 0.02 else best
            closed = root_scalar(rejected, bracket=(inner, best + sign * step), method="brentq", xtol=1e-8)
            return math.exp(closed.root)
        step *= 2
    return None


def at_loss_of(raw: dict[str, float], loss: float) -> float | None:
    """x needed by the first over x needed by the second for that loss; None if the loss lies below a floor."""
    a, b = raw["a"], raw["a"] + raw["d"]
    if loss <= max(raw["E"], raw["F"]) or a <= 0 or b <= 0:
        return None
    first, second = (math.log(loss - raw[floor]) for floor in ("E", "F"))
    log_ratio = (raw["A"] - first) / a - (raw["A"] + raw["s"] - second) / b
    return math.exp(log_ratio) if abs(log_ratio) < 700 else None


def at_loss_interval(problem: Problem, optimum: Optimum, loss: float, level: float) -> Interval:
    """Delta-method interval of the multiplier, from that of its logarithm with t quantiles."""
    return _delta(problem, optimum, lambda raw: at_loss_of(raw, loss), level)


def crossing(problem: Problem, optimum: Optimum, x: Array) -> float | None:
    """x inside the data at which both groups have the same loss; None if there is none."""
    log_x = _log_crossing(raw(problem, optimum.theta), float(np.log(x.min())), float(np.log(x.max())))
    return None if log_x is None else math.exp(log_x)


def crossing_interval(problem: Problem, optimum: Optimum, x: Array, at: float, level: float) -> Interval:
    """Interval of `crossing`, whose value is `at`.

    With a common floor it holds the values of x at which equal losses are not rejected: s − d·ln x = 0 (Fieller). With
    floors of their own it is that of the delta method, open where the curves run side by side.
    """
    if "f" not in problem.law.params:
        matrix, _ = problem.raw_map()
        s_row, d_row = (matrix[problem.law.params.index(name)] for name in ("s", "d"))
        return _where_zero(problem, optimum, s_row, -d_row, math.log(at), level)
    low, high = float(np.log(x.min())) - 3, float(np.log(x.max())) + 3

    def found(values: dict[str, float]) -> float | None:
        log_x = _log_crossing(values, low, high, math.log(at))
        return None if log_x is None else math.exp(log_x)

    return _delta(problem, optimum, found, level)


def _log_crossing(raw: dict[str, float], low: float, high: float, near: float | None = None) -> float | None:
    """ln x in [low, high] at which the curves cross, the one nearest to `near` (default: the first); None if none."""
    if raw["f"] == 0:
        log_x = raw["s"] / raw["d"] if raw["d"] != 0 else math.inf
        return log_x if low <= log_x <= high else None

    def gap(log_x: float | Array) -> Array:
        first = raw["E"] + np.exp(raw["A"] - raw["a"] * log_x)
        second = raw["F"] + np.exp(raw["A"] + raw["s"] - (raw["a"] + raw["d"]) * log_x)
        return np.log(first) - np.log(second)

    grid = np.linspace(low, high, 200)
    signs = np.sign(gap(grid))
    changes = np.flatnonzero(signs[:-1] != signs[1:])
    if not len(changes):
        return None
    i = changes[0] if near is None else changes[np.argmin(np.abs(grid[changes] - near))]
    return float(root_scalar(lambda at: float(gap(at)), bracket=(grid[i], grid[i + 1]), method="brentq").root)


def _delta(
    problem: Problem, optimum: Optimum, value: Callable[[dict[str, float]], float | None], level: float
) -> Interval:
    """Interval of a positive function of the coefficients, from that of its logarithm with t quantiles; open where it
    does not exist next to the estimate."""
    matrix, offset = problem.raw_map()
    dof = problem.points - problem.size
    coefficients = matrix @ optimum.theta + offset
    gradient = np.empty(problem.size)
    centre = value(_named(problem.law, coefficients))
    for i in range(problem.size):
        step = np.zeros(problem.size)
        step[i] = 1e-6 * max(abs(coefficients[i]), 1.0)
        up, down = (value(_named(problem.law, coefficients + sign * step)) for sign in (1.0, -1.0))
        if up is None or down is None or centre is None:
            return None, None
        gradient[i] = (math.log(up) - math.log(down)) / (2 * step[i])
    cov = covariance(problem, optimum.theta, optimum.objective / dof)
    variance = float(form_variance((gradient @ matrix)[None, :], cov)[0])
    low, high = wald(math.log(centre), math.sqrt(variance), dof, level) if centre is not None else (None, None)
    return _exp(low), _exp(high)


def _exp(value: float | None) -> float | None:
    return None if value is None else math.exp(min(value, 700.0))
