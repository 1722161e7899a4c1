"""Sums of held-out error and variance per document, as finished runs keep them (`heldout.parquet`)."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.laws.law import Array
from analysis.runs.table import RunTable
from harness.errors import UserError
from harness.record import names

COLUMNS = {"fvu": ("error", "variance"), "fvu_raw": ("error_raw", "variance_raw")}
"""Loss → the columns of which it is the ratio of the sums."""


def influences(table: RunTable) -> tuple[list[str], Array]:
    """What each held-out document adds to ln(loss) of each run, to first order.

    Returns (runs, influence): influence (runs, documents) is e_d/Σe − v_d/Σv, which sums to 0 over the documents. Only
    runs that were evaluated on the same documents of the same store can be paired: if there are several such groups,
    the largest. No runs if none keeps its sums. Raises `UserError` for a damaged file.
    """
    columns = COLUMNS.get(table.roles.get("loss", ""))
    if columns is None or not table.directories:
        return [], np.zeros((0, 0))
    groups: dict[tuple[Any, ...], dict[str, Array]] = {}
    for _, row in table.frame.iterrows():
        run = str(row[table.roles["run"]])
        sums = (
            _read(table.directories[run] / names.HELDOUT, row.get("heldout_sha256"))
            if run in table.directories
            else None
        )
        if sums is None or not {*columns, "document", "rows"} <= set(sums):
            continue
        same = (row.get("store_id"), *(sums[name].to_numpy().tobytes() for name in ("document", "rows")))
        error, variance = (sums[name].to_numpy(dtype=float) for name in columns)
        groups.setdefault(same, {})[run] = error / error.sum() - variance / variance.sum()
    if not groups:
        return [], np.zeros((0, 0))
    largest = max(groups.values(), key=len)
    return list(largest), np.array(list(largest.values()))


def _read(path: Path, sha256: Any) -> pd.DataFrame | None:
    """The sums of one run; None if it keeps none (a run of an earlier version, or of W&B)."""
    if not isinstance(sha256, str) or not path.exists():
        return None
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"{path} is damaged (its sha256 is not that of {names.RESULT}); remove it to do without it")
    return pd.read_parquet(io.BytesIO(content))
