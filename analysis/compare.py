"""Several laws on the same runs, side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from analysis.frames import Frame, pd
from analysis.nested import aicc
from analysis.result import FitResult, Status
from harness.errors import UserError


def compare(fits: Sequence[FitResult]) -> Frame:
    """One row a fit, best AICc first: law, params, rss_log, aicc, delta_aicc, holdout, status.

    All must be least-squares fits to the same losses with the same weights, else their criteria mean different things;
    `UserError` otherwise. `holdout` is the error on the largest value of each law's scale, fitted without it.
    """
    usable = [result for result in fits if result.status is not Status.FAILED]
    if len(usable) < 1:
        raise UserError("none of these fits was possible; nothing to compare")
    first = usable[0]
    for other in usable:
        if other.robust or other.space != first.space:
            raise UserError("compare needs least-squares fits in one space; fit them with robust=None and equal space=")
        same = other.y.shape == first.y.shape and np.array_equal(np.sort(other.y), np.sort(first.y))
        if not same or _weights(other) != _weights(first):
            raise UserError(f"{first.law.name} and {other.law.name} were fitted to different runs or weights")
    rows = [
        {
            "law": result.law.name,
            "params": len(result.law.params),
            "rss_log": result.rss,
            "aicc": aicc(result.rss, result.points, len(result.law.params)),
            "holdout": result.holdout()["error"],
            "status": result.status.value,
        }
        for result in usable
    ]
    frame = pd.DataFrame(rows).sort_values("aicc", kind="stable", ignore_index=True)
    frame.insert(4, "delta_aicc", frame["aicc"] - frame["aicc"].iloc[0])
    return frame


def _weights(result: FitResult) -> tuple[float, ...]:
    return () if result.weights is None else tuple(np.sort(result.weights))
