"""What the features of each run are worth, as columns: `quality.<metric>.<name>` and its standard error `…_se`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from harness.errors import UserError
from harness.record.quality import read_qualities

PREFIX = "quality."
"""Of the names of all these columns."""

INSTEAD = {
    "quality.downstream.delta_ce": "quality.downstream.kl",
    "quality.downstream.delta_ce_all": "quality.downstream.kl_all",
    "quality.refinement.log_ratio": "quality.refinement.fvu_after",
}
"""Qualities that may be zero or below, whose logarithm no law can take, and what to fit in their place."""


def quality_columns(runs: Sequence[Path]) -> pd.DataFrame:
    """A row per run directory; NaN where a metric has not been evaluated or has no standard error.

    Raises `UserError` for a damaged file.
    """
    rows = []
    for run in runs:
        row = {}
        for metric, found in read_qualities(run).items():
            for name, entry in found["values"].items():
                for suffix, key in (("", "value"), ("_se", "se")):
                    row[f"{PREFIX}{metric}.{name}{suffix}"] = entry[key]
        rows.append(row)
    frame = pd.DataFrame(rows, index=range(len(runs)), dtype=float)
    return frame.replace({None: np.nan})


def require_positive(loss: str) -> None:
    """Raises `UserError` for a loss that may be zero or below, and names the one to use."""
    if loss in INSTEAD:
        raise UserError(f"--loss {loss} may be 0 or negative, and the laws take its logarithm; use {INSTEAD[loss]}")
