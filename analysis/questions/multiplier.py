"""Two architectures: do they share an exponent, how much compute does one save, where do their curves cross?

Both are fitted at once (`two_groups`), with a common floor and with floors of their own. If neither a common floor nor
a shared exponent is rejected, the multiplier is the same at every loss. Else it is quoted at a loss, with floors of
their own: that holds whether or not the floors are equal. What the other way gives goes with it.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from analysis.format import number
from analysis.laws.law import Array
from analysis.notes import Note, note
from analysis.questions.two_groups import (
    APART,
    OWN_FLOORS,
    SHARED,
    at_loss_interval,
    at_loss_of,
    crossing,
    crossing_interval,
    f_test,
    floor_open,
    raw,
    shared_multiplier,
    solved,
)
from analysis.runs.axes import AXES, at_equal_flops, on_axis
from analysis.runs.regime import regime_words
from analysis.runs.table import RunTable
from harness.errors import UserError

SAME_FLOOR = 0.1
"""p-value of the F test of a common floor below which none is assumed."""


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
    """The floor of the first; of both, if a common one is not rejected."""
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
    floor_word: str = "floor"
    """What the floors are: "level at this budget" of runs that are not all converged."""
    floors: tuple[float, float] = (0.0, 0.0)
    """The floor of the first and of the second, each fitted with its own."""
    p_floor: float = 1.0
    """p-value of the F test of a common floor."""
    own_floors: bool = False
    """Whether the value is from floors of their own."""
    otherwise: tuple[float | None, float | None, float | None] | None = None
    """(value, lo, hi) of the other way, at `at_loss` or in the middle of the losses that both reach; None if that loss
    lies below the floor of an architecture."""


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
    shared, at_shared = solved(SHARED, inputs, y, seed)
    apart, at_apart = solved(APART, inputs, y, seed)
    own, at_own = solved(OWN_FLOORS, inputs, y, seed)
    dof = apart.points - apart.size
    if dof < 2:
        raise UserError(f"{table.name}: {apart.points} runs are too few to compare two architectures")
    p_shared = f_test(at_shared.objective, at_apart.objective, dof)
    p_floor = f_test(at_apart.objective, at_own.objective, dof - 1)
    with_own = raw(own, at_own.theta)
    everywhere = at_loss is None and p_floor >= SAME_FLOOR and p_shared >= 1 - level
    used, at_used = (own, at_own) if p_floor < SAME_FLOOR else (apart, at_apart)
    named = raw(used, at_used.theta)
    low_end, high_end = max(y[group == g].min() for g in (0, 1)), min(y[group == g].max() for g in (0, 1))
    middle = float(np.sqrt(low_end * high_end))
    found = Multiplier(
        value=None,
        lo=None,
        hi=None,
        at_loss=at_loss,
        p_shared=p_shared,
        exponents=(named["a"], named["a"] + named["d"]),
        floor=named["E"],
        crossing=crossing(used, at_used, values),
        floor_identified=not floor_open(used, at_used),
        axis=axis,
        floor_word="level at this budget" if regime_words(table) in ("fixed tokens", "mixed") else "floor",
        floors=(with_own["E"], with_own["F"]),
        p_floor=p_floor,
        own_floors=not everywhere,
    )
    if found.crossing is not None:
        found.crossing_lo, found.crossing_hi = crossing_interval(used, at_used, values, found.crossing, level)
    if not found.floor_identified:
        found.notes.append(note("floor_not_identified", "warning", f"the common {found.floor_word} may be zero"))
    at = middle if at_loss is None else at_loss
    other = (own, at_own) if everywhere else (apart, at_apart)
    found.otherwise = (at_loss_of(raw(other[0], other[1].theta), at), *at_loss_interval(*other, at, level))
    if at <= max(with_own["E"], with_own["F"]):
        lowest = f"the {found.floor_word} of an architecture ({number(max(found.floors))})"
        text = f"loss {at:.4g} lies below {lowest}: no number is given"
        found.notes.append(note("extrapolation", "warning", text))
        return replace(found, at_loss=at, otherwise=None)
    if everywhere:
        value, low, high = shared_multiplier(shared, at_shared, level)
        return replace(found, value=value, lo=low, hi=high)
    value, (low, high) = at_loss_of(with_own, at), at_loss_interval(own, at_own, at, level)
    if not all(y[group == g].min() <= at <= y[group == g].max() for g in (0, 1)):
        found.notes.append(note("extrapolation", "warning", f"loss {at:.4g} was not reached by both architectures"))
    return replace(found, value=value, lo=low, hi=high, at_loss=at)


def _stacked(parts: list[pd.DataFrame], table: RunTable, x: str) -> tuple[Array, Array, Array]:
    values = np.concatenate([part[table.roles[x]].to_numpy(dtype=float) for part in parts])
    y = np.concatenate([part[table.roles["loss"]].to_numpy(dtype=float) for part in parts])
    group = np.concatenate([np.full(len(part), float(g)) for g, part in enumerate(parts)])
    return values, y, group
