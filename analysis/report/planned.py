"""Time and memory that a sweep was expected to take (`plan.json`), and what it took."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from analysis.runs.table import RunTable
from harness.record.sweepdir import read_plan


def planned_rows(table: RunTable, directory: Path) -> list[dict[str, Any]]:
    """One row per architecture and n, and a last one for all runs; no row if no usable run has a plan.

    Keys: sae, n, runs; planned_s, took_s (sums over the runs; runs that were trained together share their time);
    time_ratio (median of took/planned) and time_range (its smallest and largest); planned_bytes, took_bytes (largest),
    memory_ratio (median). Unknown values are None. Raises `UserError` if `plan.json` is damaged.
    """
    runs = read_plan(directory)["runs"]
    expected = [runs.get(str(run), {}) for run in table.frame[table.roles["run"]]]
    frame = table.frame.assign(
        planned_s=pd.Series([entry.get("train_s") for entry in expected], dtype=float),
        planned_bytes=pd.Series([entry.get("memory_bytes") for entry in expected], dtype=float),
    )
    frame = frame[frame["planned_s"].notna() & frame.get("wall_s", pd.Series(np.nan, frame.index)).notna()]
    if not len(frame):
        return []
    together = frame.get("trained_together", pd.Series(1.0, frame.index)).fillna(1.0)
    frame = frame.assign(took_s=frame["wall_s"] / together)
    groups = frame.groupby(["sae", "n_latents"], sort=False) if {"sae", "n_latents"} <= set(frame) else []
    rows = []
    for key, part in groups:
        sae, n = cast("tuple[str, float]", key)
        rows.append({"sae": sae, "n": float(n), **_compared(part)})
    rows.sort(key=lambda row: (row["sae"] != "topk", row["sae"], row["n"]))
    return [*rows, {"sae": "all", "n": None, **_compared(frame)}]


def _compared(part: pd.DataFrame) -> dict[str, Any]:
    time = (part["took_s"] / part["planned_s"]).astype(float)
    compared: dict[str, Any] = {
        "runs": len(part),
        "planned_s": float(part["planned_s"].sum()),
        "took_s": float(part["took_s"].sum()),
        "time_ratio": float(time.median()),
        "time_range": (float(time.min()), float(time.max())),
        **dict.fromkeys(("planned_bytes", "took_bytes", "memory_ratio")),
    }
    if "peak_memory_bytes" in part:
        both = part[part["peak_memory_bytes"].notna() & part["planned_bytes"].notna()]
        if len(both):
            compared |= {
                "planned_bytes": float(both["planned_bytes"].max()),
                "took_bytes": float(both["peak_memory_bytes"].max()),
                "memory_ratio": float((both["peak_memory_bytes"] / both["planned_bytes"]).astype(float).median()),
            }
    return compared
