"""L(C): the lowest loss of any run at a given compute, and its law with intervals from resampling whole runs."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.fits.bootstrap import percentile_intervals
from analysis.fits.fit import fit
from analysis.fits.problem import pose
from analysis.fits.result import FitResult
from analysis.fits.solve import solve
from analysis.fits.status import Status
from analysis.laws.law import Array
from analysis.notes import by_severity, note
from analysis.runs.curves import evaluations
from analysis.runs.table import RunTable

OWNED = 0.5
"""If more than this share of the frontier's points are the last of their run, it shows where the runs stopped."""


def frontier(table: RunTable, curves: pd.DataFrame | None = None) -> pd.DataFrame:
    """The Pareto frontier of loss against FLOPs over all runs: run, tokens, flops, loss, by rising flops.

    Points in the middle of a run enter only if its learning rate was constant. In the middle of a decayed run the loss
    is not what a run of that length would have reached, so that only its final point enters.

    Args:
        curves: `analysis.runs.curves.evaluations(table)`, if it is already computed.
    """
    points = allowed_points(evaluations(table) if curves is None else curves)
    if points.empty:
        return points
    keep = _pareto(points["flops"].to_numpy(dtype=float), points["loss"].to_numpy(dtype=float))
    return points.iloc[keep].reset_index(drop=True)


def allowed_points(curves: pd.DataFrame) -> pd.DataFrame:
    """The points of `evaluations` that may enter a frontier: all of constant-rate runs, the final one of the others."""
    curves = curves[np.isfinite(curves["loss"]) & (curves["loss"] > 0) & (curves["flops"] > 0)]
    final = curves.groupby("run")["tokens"].transform("max") == curves["tokens"]
    return curves[curves["constant_lr"].astype(bool) | final].reset_index(drop=True)


def frontier_law(
    table: RunTable,
    curves: pd.DataFrame | None = None,
    *,
    resamples: int = 400,
    level: float = 0.95,
    seed: int = 0,
) -> FitResult:
    """E + A·C^−a along the frontier, with intervals from resampling whole runs.

    The points of a frontier are minima over runs and belong to few of them, so that residuals say nothing about its
    uncertainty. Each resample draws runs with replacement, takes their frontier and fits it.

    Args:
        curves: `analysis.runs.curves.evaluations(table)`, if it is already computed.
    """
    points = allowed_points(evaluations(table) if curves is None else curves)
    front = frontier(table, points)
    result = _fit_points(front)
    if result.status is Status.FAILED:
        return result
    flops, loss = points["flops"].to_numpy(dtype=float), points["loss"].to_numpy(dtype=float)
    rows = [np.flatnonzero((points["run"] == run).to_numpy()) for run in points["run"].unique()]
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(resamples):
        drawn = np.concatenate([rows[i] for i in np.unique(rng.integers(0, len(rows), len(rows)))])
        keep = drawn[_pareto(flops[drawn], loss[drawn])]
        if len(keep) > len(result.law.params):
            draws.append(_refit(result, flops[keep], loss[keep]))
    if len(draws) > 20:
        raw = np.array(draws)
        ends = percentile_intervals(raw, level)
        for name, (low, high) in zip(result.law.params, ends, strict=True):
            scale = np.exp if name in result.law.exp_params else float
            result.intervals[name] = (
                None if low is None else float(scale(low)),
                None if high is None else float(scale(high)),
            )
        result.ci, result.level = "bootstrap", level
    result.notes = [entry for entry in result.notes if entry.code not in ("single_seed", "structured_residuals")]
    ends_of_runs = front["run"].map(points.groupby("run")["flops"].max()) == front["flops"]
    if len(front) > 2 and ends_of_runs.mean() > OWNED:
        text = f"{int(ends_of_runs.sum())} of {len(front)} frontier points are the last of their run"
        result.notes = by_severity([*result.notes, note("frontier_owned_by_end", "warning", text)])
    return result


def _fit_points(front: pd.DataFrame) -> FitResult:
    frame = front[["flops", "loss"]].copy() if len(front) else pd.DataFrame({"flops": [], "loss": []})
    return fit(RunTable(frame, {"x": "flops", "loss": "loss"}, name="frontier"), "power_floor", ci="wald", starts=32)


def _refit(result: FitResult, x: Array, y: Array) -> Array:
    """Raw coefficients of the same law refitted to other points, starting at the old solution."""
    problem = pose(result.law, {"x": x}, y)
    matrix, offset = problem.raw_map()
    start = np.asarray(np.linalg.solve(matrix, result.raw - offset), dtype=np.float64)
    theta, _ = solve(problem, start, evaluations=300)
    return matrix @ theta + offset


def _pareto(flops: Array, loss: Array) -> np.ndarray:
    """Indices of the points that have the lowest loss up to their FLOPs, by rising FLOPs."""
    order = np.lexsort((loss, flops))
    best = np.minimum.accumulate(loss[order])
    return order[np.r_[True, best[1:] < best[:-1]]]
