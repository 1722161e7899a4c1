"""IsoFLOP profiles: the best n at each compute budget, from bracketed minima only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.frames import Frame, pd
from analysis.law import Array
from analysis.load import evaluations
from analysis.notes import Note, note
from analysis.result import FitResult, Status
from analysis.table import RunTable
from harness.errors import UserError

SAME_BUDGET = 0.03
"""Relative difference of FLOPs within which runs of a plain table belong to one budget."""
WINDOW = 5
"""Sizes around the lowest that the local parabola uses: over a whole profile its minimum is biased."""


@dataclass
class IsoFlop:
    """Profiles, their minima, and what follows."""

    profiles: Frame
    """flops, n, loss: every point of every profile."""
    minima: Frame
    """flops, n, loss, bracketed: one row a budget."""
    notes: list[Note]
    law: FitResult | None
    """n_opt = D0·C^p over the bracketed minima (parameters D0 and p); None with fewer than three."""


def isoflop(table: RunTable, budgets: int | np.ndarray = 8, method: str = "akima") -> IsoFlop:
    """The loss-minimising n at each of several FLOP budgets, runs of one k.

    Args:
        budgets: With training curves: FLOPs at which they are read, or how many to space evenly in log where at least
            three sizes overlap. A table without curves is grouped into the budgets that it holds.
        method: `akima` (interpolation through all sizes around the minimum) or `parabola` (least squares in ln n over
            the nearest five sizes).

    A minimum counts only when sizes on both sides are worse (else note `isoflop_edge`, and the row is not bracketed).
    Raises `UserError` for runs of several k, and for curves of fewer than three sizes.
    """
    if method not in ("akima", "parabola"):
        raise UserError(f"method={method!r} is not known; use 'akima' or 'parabola'")
    if table.has("k") and len(set(table.values("k"))) > 1:
        raise UserError(f"{table.name}: isoflop needs runs of one k (e.g. table.where(k=32)); these have several")
    profiles = _from_curves(table, budgets) if table.histories else _from_rows(table)
    minima, edges, rough = [], [], []
    for flops, part in profiles.groupby("flops"):
        part = part.groupby("n", as_index=False)["loss"].mean().sort_values("n")
        x, y = np.log(part["n"].to_numpy(dtype=float)), np.log(part["loss"].to_numpy(dtype=float))
        if len(x) < 3:
            continue
        i = int(np.argmin(y))
        bracketed = 0 < i < len(x) - 1
        if not bracketed:
            edges.append(flops)
        if np.sum((np.diff(y)[:-1] < 0) & (np.diff(y)[1:] > 0)) > 1 or _rises_before(y, i):
            rough.append(flops)
        at, low = (_akima(x, y, i) if method == "akima" else _parabola(x, y, i)) if bracketed else (x[i], y[i])
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
    """Whether the profile is not falling all the way to its minimum and rising all the way after."""
    return bool(np.any(np.diff(y[: i + 1]) > 0) or np.any(np.diff(y[i:]) < 0))


def _law(minima: Frame) -> FitResult | None:
    from analysis.fit import fit

    good = minima[minima["bracketed"].astype(bool)] if len(minima) else minima
    if len(good) < 3:
        return None
    points = RunTable(good[["flops", "n"]].copy(), {"n": "flops", "loss": "n"}, name="isoflop minima")
    result = fit(points, "tokens_to_convergence", weights="none")
    return None if result.status is Status.FAILED else result


def _akima(x: Array, y: Array, i: int) -> tuple[float, float]:
    """Minimum of the Akima interpolation between the neighbours of the lowest point."""
    from scipy.interpolate import Akima1DInterpolator
    from scipy.optimize import minimize_scalar

    curve = Akima1DInterpolator(x, y)
    end: object = minimize_scalar(curve, bounds=(x[i - 1], x[i + 1]), method="bounded", options={"xatol": 1e-9})
    return float(end.x), float(end.fun)  # pyright: ignore[reportAttributeAccessIssue]


def _parabola(x: Array, y: Array, i: int) -> tuple[float, float]:
    """Vertex of a parabola through the sizes nearest to the lowest point, kept between its neighbours."""
    half = WINDOW // 2
    near = slice(max(0, i - half), i + half + 1)
    centre = x[i]
    c, b, a = np.polynomial.polynomial.polyfit(x[near] - centre, y[near], 2)
    if a <= 0:
        return float(x[i]), float(y[i])
    at = float(np.clip(-b / (2 * a), x[i - 1] - centre, x[i + 1] - centre))
    return centre + at, c + b * at + a * at * at


def _from_rows(table: RunTable) -> Frame:
    """Runs grouped into budgets: neighbours in FLOPs within SAME_BUDGET."""
    frame = pd.DataFrame({"flops": table.values("flops"), "n": table.values("n"), "loss": table.values("loss")})
    frame = frame.sort_values("flops", ignore_index=True)
    group = np.cumsum(np.r_[0, np.diff(np.log(frame["flops"])) > SAME_BUDGET])
    frame["flops"] = frame.groupby(group)["flops"].transform(lambda values: np.exp(np.log(values).mean()))
    return frame


def _from_curves(table: RunTable, budgets: int | np.ndarray) -> Frame:
    """Every constant-lr run's loss at each budget that it passes, interpolated log-log along its own curve."""
    curves = evaluations(table)
    curves = curves[curves["constant_lr"].astype(bool)]
    size = dict(zip(table.column("run").astype(str), table.values("n"), strict=True))
    paths = []
    for run, part in curves.groupby("run"):
        part = part.sort_values("flops")
        if len(part) > 1:
            paths.append((size[run], np.log(part["flops"].to_numpy()), np.log(part["loss"].to_numpy())))
    if len({n for n, _, _ in paths}) < 3:
        raise UserError(f"{table.name}: isoflop needs constant-lr curves of at least three sizes, found {len(paths)}")
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
