"""L(C): the lowest loss that any run had reached at a given compute, and its law with intervals over whole runs."""

from __future__ import annotations

import numpy as np

from analysis.frames import Frame, pd
from analysis.law import Array
from analysis.load import evaluations
from analysis.notes import note
from analysis.result import FitResult, Status
from analysis.table import RunTable

OWNED = 0.5
"""Share of frontier points that are the last of their run above which the frontier shows where runs stopped."""


def frontier(table: RunTable, curves: Frame | None = None, hull: bool = False) -> Frame:
    """The Pareto frontier of loss against FLOPs over whole runs: run, tokens, flops, loss, by rising flops.

    Points in the middle of a run count only where its learning rate was constant: in the middle of a decayed run the
    loss is not what a run of that length would have reached. Of those only the final point enters.

    Args:
        curves: `analysis.load.evaluations(table)` when already at hand.
        hull: Keep only the corners of the lower convex hull in log-log.
    """
    points = allowed_points(evaluations(table) if curves is None else curves)
    if points.empty:
        return points
    keep = _pareto(points["flops"].to_numpy(dtype=float), points["loss"].to_numpy(dtype=float))
    if hull:
        keep = keep[_lower_hull(np.log(points["flops"].to_numpy()[keep]), np.log(points["loss"].to_numpy()[keep]))]
    return points.iloc[keep].reset_index(drop=True)


def allowed_points(curves: Frame) -> Frame:
    """The points of `evaluations` that may enter a frontier: constant-lr ones, and the final one of every run."""
    curves = curves[np.isfinite(curves["loss"]) & (curves["loss"] > 0) & (curves["flops"] > 0)]
    final = curves.groupby("run")["tokens"].transform("max") == curves["tokens"]
    return curves[curves["constant_lr"].astype(bool) | final].reset_index(drop=True)


def frontier_law(
    table: RunTable,
    curves: Frame | None = None,
    *,
    hull: bool = False,
    resamples: int = 400,
    level: float = 0.95,
    seed: int = 0,
) -> FitResult:
    """E + A·C^−a along the frontier, with intervals from resampling whole runs.

    The points of a frontier are minima over runs and belong to few of them, so residuals say nothing about its
    uncertainty: each resample draws runs with replacement, takes their frontier anew and fits it.
    """
    from analysis.bootstrap import percentile_intervals
    from analysis.fit import fit, sort_notes

    points = allowed_points(evaluations(table) if curves is None else curves)
    front = frontier(table, points, hull)
    result = _fit_points(fit, front)
    if result.status is Status.FAILED:
        return result
    flops, loss = points["flops"].to_numpy(dtype=float), points["loss"].to_numpy(dtype=float)
    rows = [np.flatnonzero((points["run"] == run).to_numpy()) for run in points["run"].unique()]
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(resamples):
        drawn = np.concatenate([rows[i] for i in np.unique(rng.integers(0, len(rows), len(rows)))])
        keep = drawn[_pareto(flops[drawn], loss[drawn])]
        if hull:
            keep = keep[_lower_hull(np.log(flops[keep]), np.log(loss[keep]))]
        if len(keep) > result.problem_size:
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
        result.notes = sort_notes([*result.notes, note("frontier_owned_by_end", "warning", text)])
    return result


def _fit_points(fit, front: Frame) -> FitResult:
    frame = front[["flops", "loss"]].copy() if len(front) else pd.DataFrame({"flops": [], "loss": []})
    return fit(RunTable(frame, {"x": "flops", "loss": "loss"}, name="frontier"), "power_floor", ci="wald", starts=32)


def _refit(result: FitResult, x: Array, y: Array) -> Array:
    """Raw coefficients of the same law refitted to other points, started at the old solution."""
    from analysis.problem import pose
    from analysis.solve import solve

    problem = pose(result.law, {"x": x}, y)
    matrix, offset = problem.raw_map()
    start = np.asarray(np.linalg.solve(matrix, result.raw - offset), dtype=np.float64)
    theta, _ = solve(problem, start, evaluations=300)
    return matrix @ theta + offset


def _pareto(flops: Array, loss: Array) -> np.ndarray:
    """Indices of the points that no cheaper (or equal) one undercuts, by rising FLOPs."""
    order = np.lexsort((loss, flops))
    best = np.minimum.accumulate(loss[order])
    return order[np.r_[True, best[1:] < best[:-1]]]


def _lower_hull(x: Array, y: Array) -> np.ndarray:
    """Indices of the lower convex hull of points sorted by x."""
    kept: list[int] = []
    for i in range(len(x)):
        while len(kept) > 1:
            a, b = kept[-2], kept[-1]
            if (x[b] - x[a]) * (y[i] - y[a]) > (y[b] - y[a]) * (x[i] - x[a]):
                break
            kept.pop()
        kept.append(i)
    return np.array(kept)
