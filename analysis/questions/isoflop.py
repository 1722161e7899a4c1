"""IsoFLOP profiles: the best n at each compute budget, from bracketed minima only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar

from analysis.fits.fit import fit
from analysis.fits.result import FitResult
from analysis.fits.status import Status
from analysis.laws.law import Array
from analysis.notes import Note, note
from analysis.runs.curves import evaluations
from analysis.runs.table import RunTable
from harness.errors import UserError

SAME_BUDGET = 0.03
"""Relative difference of FLOPs within which runs of a plain table belong to one budget."""


@dataclass
class IsoFlop:
    """Profiles, their minima, and the law of the minima."""

    profiles: pd.DataFrame
    """flops, n, loss: every point of every profile."""
    minima: pd.DataFrame
    """flops, n, loss, bracketed: one row per budget."""
    notes: list[Note]
    law: FitResult | None
    """n_opt = D0·C^p over the bracketed minima (law `monomial`, input C); None with fewer than three."""


def isoflop(table: RunTable, budgets: int | np.ndarray = 8) -> IsoFlop:
    """The n with the lowest loss at each of several FLOP budgets, from runs of one k, by Akima interpolation.

    Args:
        budgets: For training curves, the FLOPs at which to read them, or how many values to space evenly in log over
            the range in which at least three sizes overlap. A table without curves is grouped by its own budgets.

    A minimum counts only if sizes on both sides are worse (else there is a note `isoflop_edge`, and its row is not
    bracketed). Raises `UserError` for runs of several k, and for curves of fewer than three sizes.
    """
    table = table.use("n", "k", "loss", "flops")
    if table.has("k") and len(set(table.values("k"))) > 1:
        raise UserError(f"{table.name}: isoflop needs runs of one k (e.g. table.where(k=32)); these have several")
    profiles = _from_curves(table, budgets) if table.histories else _from_rows(table)
    minima, edges, rough = [], [], []
    for flops, part in profiles.groupby("flops"):
        part = part.groupby("n", as_index=False)[["loss"]].mean().sort_values("n")
        x, y = np.log(part["n"].to_numpy(dtype=float)), np.log(part["loss"].to_numpy(dtype=float))
        if len(x) < 3:
            continue
        i = int(np.argmin(y))
        bracketed = 0 < i < len(x) - 1
        if not bracketed:
            edges.append(flops)
        if np.sum((np.diff(y)[:-1] < 0) & (np.diff(y)[1:] > 0)) > 1 or _rises_before(y, i):
            rough.append(flops)
        at, low = _minimum(x, y, i) if bracketed else (x[i], y[i])
        minima.append({"flops": flops, "n": np.exp(at), "loss": np.exp(low), "bracketed": bracketed})
    frame = pd.DataFrame(minima, columns=["flops", "n", "loss", "bracketed"])
    notes = []
    if edges:
        text = f"{len(edges)} of {len(frame)} budgets have their lowest loss at the smallest or largest n"
        notes.append(note("isoflop_edge", "warning", text))
    if rough:
        notes.append(note("isoflop_nonconvex", "warning", f"{len(rough)} profile(s) have more than one dip"))
    return IsoFlop(profiles, frame, notes, _law(frame))


def _rises_before(y: Array, i: int) -> bool:
    """Whether the profile rises somewhere before its minimum i or falls somewhere after it."""
    return bool(np.any(np.diff(y[: i + 1]) > 0) or np.any(np.diff(y[i:]) < 0))


def _law(minima: pd.DataFrame) -> FitResult | None:
    good = minima[minima["bracketed"].astype(bool)] if len(minima) else minima
    if len(good) < 3:
        return None
    points = RunTable(good[["flops", "n"]].copy(), {"n": "flops", "loss": "n"}, name="isoflop minima")
    result = fit(points, "monomial", weights="none")
    return None if result.status is Status.FAILED else result


def _minimum(x: Array, y: Array, i: int) -> tuple[float, float]:
    """(x, y) of the minimum of the Akima interpolation between the neighbours of the lowest point i."""
    from scipy.interpolate import Akima1DInterpolator  # adds a third to the time of `import analysis`

    curve = Akima1DInterpolator(x, y)
    end: Any = minimize_scalar(curve, bounds=(x[i - 1], x[i + 1]), method="bounded", options={"xatol": 1e-9})
    return float(end.x), float(end.fun)


def _from_rows(table: RunTable) -> pd.DataFrame:
    """Runs grouped into budgets: neighbours in FLOPs within `SAME_BUDGET` share one."""
    frame = pd.DataFrame({"flops": table.values("flops"), "n": table.values("n"), "loss": table.values("loss")})
    frame = frame.sort_values("flops", ignore_index=True)
    group = np.cumsum(np.r_[0, np.diff(np.log(frame["flops"])) > SAME_BUDGET])
    frame["flops"] = frame.groupby(group)["flops"].transform(lambda values: np.exp(np.log(values).mean()))
    return frame


def _from_curves(table: RunTable, budgets: int | np.ndarray) -> pd.DataFrame:
    """The loss of every constant-rate run at each budget on its curve, interpolated log-log."""
    curves = evaluations(table)
    curves = curves[curves["constant_lr"].astype(bool)]
    size = dict(zip(table.column("run").astype(str), table.values("n"), strict=True))
    paths = []
    for run, part in curves.groupby("run"):
        part = part.sort_values("flops")
        if len(part) > 1:
            paths.append((size[str(run)], np.log(part["flops"].to_numpy()), np.log(part["loss"].to_numpy())))
    sizes = {n for n, _, _ in paths}
    if len(sizes) < 3:
        raise UserError(f"{table.name}: isoflop needs constant-rate curves of at least three sizes, not {len(sizes)}")
    if isinstance(budgets, int):
        starts, ends = np.sort([c[0] for _, c, _ in paths]), np.sort([c[-1] for _, c, _ in paths])
        budgets = np.exp(np.linspace(starts[2], ends[-3], budgets)) if starts[2] < ends[-3] else np.array([])
    rows = [
        {"flops": budget, "n": n, "loss": np.exp(np.interp(np.log(budget), c, y))}
        for budget in np.asarray(budgets, dtype=float)
        for n, c, y in paths
        if c[0] <= np.log(budget) <= c[-1]
    ]
    return pd.DataFrame(rows, columns=["flops", "n", "loss"])
