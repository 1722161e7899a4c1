"""Two architectures: do they share an exponent, how much compute does one save, where do their curves cross?

Both are fitted at once with a common floor: ln(L − E) = ln A + s·g − a·ln x, g = 0 for the first and 1 for the second.
With a shared exponent, the second needs exp(s/a) times the compute of the first for any loss: the multiplier is
exp(−s/a) everywhere. With different exponents (g·ln x has its own slope) the multiplier depends on the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy.optimize import root_scalar
from scipy.special import fdtrc

from analysis.fits.intervals import covariance, critical_f, profile_f, wald
from analysis.fits.problem import Problem, pose, starting_points
from analysis.fits.solve import Optimum, minimise
from analysis.laws.law import Array, Entry, Law
from analysis.notes import Note, note
from analysis.runs.axes import AXES, at_equal_flops, on_axis
from analysis.runs.table import RunTable
from harness.errors import UserError

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


@dataclass
class Multiplier:
    """How much less of x the second architecture needs for the same loss."""

    value: float | None
    """Above 1 if the second needs less. None if the loss lies below the floor or a curve does not fall."""
    lo: float | None
    hi: float | None
    at_loss: float | None
    """The loss at which it holds; None if it holds at every loss (shared exponent)."""
    p_shared: float
    """p-value of the F test of a shared exponent."""
    exponents: tuple[float, float]
    """a of the first and of the second, fitted apart."""
    floor: float
    """The common floor."""
    crossing: float | None
    """x at which both have the same loss; None if it lies outside the data."""
    crossing_lo: float | None = None
    crossing_hi: float | None = None
    """Profile interval of that x; None for an open end (parallel curves never cross)."""
    floor_identified: bool = True
    """False if a floor of zero fits as well."""
    notes: list[Note] = field(default_factory=list)
    axis: str = ""
    """Column of x."""


def multiplier(
    table: RunTable,
    first: dict[str, object] | None = None,
    second: dict[str, object] | None = None,
    x: str = "flops",
    at_loss: float | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> Multiplier:
    """Compare two groups of runs of one k by the x (FLOPs by default, AuxK apart where it is known) that they need.

    Args:
        first: Column values that choose the first group; TopK by default.
        second: Column values that choose the second group; Switch by default.
        at_loss: Loss at which to quote the multiplier. None: every loss if a shared exponent is not rejected, else the
            geometric middle of the losses that both groups reach.

    Raises `UserError` if a group has fewer than three sizes or several k, or there are too few runs.
    """
    part = at_equal_flops(table) if x == "flops" else table
    return _multiplier(part, first, second, x, at_loss, level, seed)


def on_every_axis(
    table: RunTable, second: dict[str, object] | None = None, at_loss: float | None = None
) -> list[tuple[str, Multiplier]]:
    """(column, multiplier) for every axis of `analysis.runs.axes.AXES` that all runs have, the default one first.

    Args:
        second, at_loss: See `multiplier`.
    """
    found = []
    for axis in AXES:
        with suppress(UserError):  # too few sizes
            if (part := on_axis(table, axis)) is not None:
                found.append((axis, _multiplier(part, None, second, "flops", at_loss)))
    return found


def _multiplier(
    table: RunTable,
    first: dict[str, object] | None,
    second: dict[str, object] | None,
    x: str,
    at_loss: float | None,
    level: float = 0.95,
    seed: int = 0,
) -> Multiplier:
    table = table.use("n", "k", x, "loss")
    groups = [first or {"sae": "topk"}, second or {"sae": "switch"}]
    parts = [table.where("another architecture", **conditions).frame for conditions in groups]
    for part, conditions in zip(parts, groups, strict=True):
        if part[table.roles[x]].nunique() < 3:
            raise UserError(
                f"{table.name}: {conditions} has fewer than 3 values of {table.roles[x]}; nothing to compare"
            )
    if any(part[table.roles["k"]].nunique() > 1 for part in parts if "k" in table.roles):
        raise UserError(f"{table.name}: compare architectures at one k (e.g. table.where(k=32))")
    axis = table.roles[x]
    values, y, group = _stacked(parts, table, x)
    inputs = {"x": values, "group": np.exp(group)}
    shared, at_shared = _solved(SHARED, inputs, y, seed)
    apart, at_apart = _solved(APART, inputs, y, seed)
    dof = apart.points - apart.size
    if dof < 1:
        raise UserError(f"{table.name}: {apart.points} runs are too few to compare two architectures")
    p = _f_test(at_shared.objective, at_apart.objective, dof)
    raw = _raw(apart, at_apart.theta)
    notes: list[Note] = []
    exponents = (raw["a"], raw["a"] + raw["d"])
    crossing = _crossing(raw, values)
    ends = (None, None) if crossing is None else _crossing_interval(apart, at_apart, math.log(crossing), level)
    floor_open = profile_floor_open(apart, at_apart)
    if floor_open:
        notes.append(note("floor_not_identified", "warning", "the common floor may be zero"))
    if p >= 1 - level and at_loss is None:
        value, low, high = _shared_multiplier(shared, at_shared, level)
        return Multiplier(value, low, high, None, p, exponents, raw["E"], crossing, *ends, not floor_open, notes, axis)
    if at_loss is None:
        low_end, high_end = max(y[group == g].min() for g in (0, 1)), min(y[group == g].max() for g in (0, 1))
        at_loss = float(np.sqrt(low_end * high_end))
    value = _at_loss(raw, at_loss)
    low, high = _at_loss_interval(apart, at_apart, at_loss, level)
    reached = [y[group == g].min() <= at_loss <= y[group == g].max() for g in (0, 1)]
    if not all(reached):
        notes.append(note("extrapolation", "warning", f"loss {at_loss:.4g} was not reached by both architectures"))
    return Multiplier(value, low, high, at_loss, p, exponents, raw["E"], crossing, *ends, not floor_open, notes, axis)


def _stacked(parts: list[pd.DataFrame], table: RunTable, x: str) -> tuple[Array, Array, Array]:
    values = np.concatenate([part[table.roles[x]].to_numpy(dtype=float) for part in parts])
    y = np.concatenate([part[table.roles["loss"]].to_numpy(dtype=float) for part in parts])
    group = np.concatenate([np.full(len(part), float(g)) for g, part in enumerate(parts)])
    return values, y, group


def _solved(law: Law, inputs: dict[str, Array], y: Array, seed: int) -> tuple[Problem, Optimum]:
    problem = pose(law, inputs, y)
    return problem, minimise(problem, starting_points(problem, 48, seed))


def _f_test(simple: float, full: float, dof: int) -> float:
    if full <= 0:
        return 1.0 if simple <= 0 else 0.0
    return float(fdtrc(1, dof, max(simple - full, 0.0) / (full / dof)))


def _raw(problem: Problem, theta: Array) -> dict[str, float]:
    matrix, offset = problem.raw_map()
    return _named(problem.law, matrix @ theta + offset)


def _named(law: Law, raw: Array) -> dict[str, float]:
    """Coefficients by name: E itself, and ln A, s, a, d."""
    named = dict(zip(law.params, map(float, raw), strict=True))
    return named | {"E": math.exp(min(named["E"], 700.0))}


def profile_floor_open(problem: Problem, optimum: Optimum, level: float = 0.95) -> bool:
    """Whether a floor of zero is not rejected by the F test."""
    contrast = np.zeros(problem.size)
    contrast[problem.law.params.index("E")] = 1.0
    far = float(contrast @ optimum.theta) - 20.0
    f, _ = profile_f(problem, optimum.theta, max(optimum.objective, 1e-300), contrast, far)
    return f < critical_f(problem.points - problem.size, level)


def _shared_multiplier(problem: Problem, optimum: Optimum, level: float) -> tuple[float, float | None, float | None]:
    """exp(−s/a) with its profile interval: the values m for which s + m·a = 0 is not rejected (Fieller)."""
    matrix, _ = problem.raw_map()
    s_row, a_row = (matrix[problem.law.params.index(name)] for name in ("s", "a"))
    best = -float(s_row @ optimum.theta) / float(a_row @ optimum.theta)
    return math.exp(best), *_where_zero(problem, optimum, s_row, a_row, best, level)


def _crossing_interval(
    problem: Problem, optimum: Optimum, log_x: float, level: float
) -> tuple[float | None, float | None]:
    """The values of x at which equal losses are not rejected: s − d·ln x = 0 (Fieller)."""
    matrix, _ = problem.raw_map()
    s_row, d_row = (matrix[problem.law.params.index(name)] for name in ("s", "d"))
    return _where_zero(problem, optimum, s_row, -d_row, log_x, level)


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


def _at_loss(raw: dict[str, float], loss: float) -> float | None:
    """x needed by the first over x needed by the second for that loss; None if the loss lies below the floor."""
    a, b = raw["a"], raw["a"] + raw["d"]
    if loss <= raw["E"] or a <= 0 or b <= 0:
        return None
    need = math.log(loss - raw["E"])
    log_ratio = (raw["A"] - need) / a - (raw["A"] + raw["s"] - need) / b
    return math.exp(log_ratio) if abs(log_ratio) < 700 else None


def _at_loss_interval(
    problem: Problem, optimum: Optimum, loss: float, level: float
) -> tuple[float | None, float | None]:
    """Delta-method interval of the multiplier, from that of its logarithm with t quantiles."""
    matrix, offset = problem.raw_map()
    dof = problem.points - problem.size
    raw_cov = matrix @ covariance(problem, optimum.theta, optimum.objective / dof) @ matrix.T
    raw = matrix @ optimum.theta + offset
    gradient = np.empty(len(raw))
    centre = _at_loss(_named(problem.law, raw), loss)
    for i in range(len(raw)):
        step = np.zeros(len(raw))
        step[i] = 1e-6 * max(abs(raw[i]), 1.0)
        up, down = (_at_loss(_named(problem.law, raw + sign * step), loss) for sign in (1.0, -1.0))
        if up is None or down is None or centre is None:
            return None, None
        gradient[i] = (math.log(up) - math.log(down)) / (2 * step[i])
    with np.errstate(invalid="ignore"):
        se = float(np.sqrt(gradient @ raw_cov @ gradient))
    low, high = wald(math.log(centre), se, dof, level) if centre is not None else (None, None)
    return (None if low is None else math.exp(low)), (None if high is None else math.exp(high))


def _crossing(raw: dict[str, float], x: Array) -> float | None:
    """x where s = d·ln x; None outside the data."""
    if raw["d"] == 0:
        return None
    log_x = raw["s"] / raw["d"]
    return math.exp(log_x) if math.log(x.min()) <= log_x <= math.log(x.max()) else None
