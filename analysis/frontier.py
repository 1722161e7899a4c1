"""L(C): the lowest loss that any run had reached at a given compute."""

from __future__ import annotations

import numpy as np

from analysis.frames import Frame
from analysis.load import evaluations
from analysis.table import RunTable


def frontier(table: RunTable, curves: Frame | None = None) -> Frame:
    """The Pareto frontier of loss against FLOPs over whole runs: run, tokens, flops, loss, by rising flops.

    Points in the middle of a run count only where its learning rate was constant: in the middle of a decayed run the
    loss is not what a run of that length would have reached. Of those only the final point enters.

    Args:
        curves: `analysis.load.evaluations(table)` when already at hand.
    """
    points = allowed_points(evaluations(table) if curves is None else curves)
    if points.empty:
        return points
    points = points.sort_values(["flops", "loss"], kind="stable", ignore_index=True)
    best = np.minimum.accumulate(points["loss"].to_numpy())
    lower = np.r_[True, best[1:] < best[:-1]]
    return points[lower].reset_index(drop=True)


def allowed_points(curves: Frame) -> Frame:
    """The points of `evaluations` that may enter a frontier: constant-lr ones, and the final one of every run."""
    curves = curves[np.isfinite(curves["loss"]) & (curves["loss"] > 0) & (curves["flops"] > 0)]
    final = curves.groupby("run")["tokens"].transform("max") == curves["tokens"]
    return curves[curves["constant_lr"].astype(bool) | final].reset_index(drop=True)
