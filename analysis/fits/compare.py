"""Several laws on the same runs, side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from analysis.fits.nested import add_delta_aicc, aicc_row
from analysis.fits.result import FitResult
from analysis.fits.status import Status
from harness.errors import UserError

COLUMNS = ["law", "params", "rss_log", "aicc", "delta_aicc", "holdout", "status"]


def compare(fits: Sequence[FitResult]) -> pd.DataFrame:
    """One row per possible fit, best AICc first: law, params, rss_log, aicc, delta_aicc, holdout, status.

    `holdout` is the error on the largest value of each law's scale, fitted without it. Raises `UserError` if no fit was
    possible, one is robust, or they differ in losses or weights: their criteria would not be comparable.
    """
    usable = [result for result in fits if result.status is not Status.FAILED]
    if not usable:
        raise UserError("none of these fits was possible; nothing to compare")
    first = usable[0]
    for other in usable:
        if other.robust:
            raise UserError("compare needs least-squares fits; fit them with robust=None")
        same = other.y.shape == first.y.shape and np.array_equal(np.sort(other.y), np.sort(first.y))
        if not same or _weights(other) != _weights(first):
            raise UserError(f"{first.law.name} and {other.law.name} were fitted to different runs or weights")
    rows = [
        aicc_row(result.law, result.rss, result.points, result.holdout()["error"]) | {"status": result.status.value}
        for result in usable
    ]
    add_delta_aicc(rows)
    return pd.DataFrame(rows, columns=COLUMNS).sort_values("aicc", kind="stable", ignore_index=True)


def _weights(result: FitResult) -> tuple[float, ...]:
    return () if result.weights is None else tuple(np.sort(result.weights))
