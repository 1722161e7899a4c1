"""What was planned when a sweep was launched (`plan.json`), beside what it took: time and memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from analysis.frames import Frame, pd
from analysis.table import RunTable
from harness.errors import UserError


def planned_rows(table: RunTable, directory: Path) -> list[dict[str, Any]]:
    """One row per architecture and n, a last one over all; none where no usable run has a plan.

    Keys: sae, n, runs; planned_s, took_s (sums over the runs; of the time of runs trained together, their share);
    time_ratio (median of took/planned) and time_range (its smallest and largest); planned_bytes, took_bytes (largest),
    memory_ratio (median). What is not known is None. Raises `UserError` when `plan.json` is damaged.
    """
    expected = _read(directory / "plan.json")
    frame = table.frame.assign(
        planned_s=[expected.get(str(run), {}).get("train_s") for run in table.frame[table.roles["run"]]],
        planned_bytes=[expected.get(str(run), {}).get("memory_bytes") for run in table.frame[table.roles["run"]]],
    )
    frame = frame[frame["planned_s"].notna() & frame.get("wall_s", pd.Series(np.nan, frame.index)).notna()]
    if not len(frame):
        return []
    together = frame.get("trained_together", pd.Series(1.0, frame.index)).fillna(1.0)
    frame = frame.assign(took_s=frame["wall_s"] / together)
    groups = frame.groupby(["sae", "n_latents"], sort=False) if {"sae", "n_latents"} <= set(frame) else []
    rows = [{"sae": str(key[0]), "n": float(key[1]), **_compared(part)} for key, part in groups]
    rows.sort(key=lambda row: (row["sae"] != "topk", row["sae"], row["n"]))
    return [*rows, {"sae": "all", "n": None, **_compared(frame)}]


def _read(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["runs"])
    except (ValueError, KeyError, TypeError) as problem:
        raise UserError(f"{path} cannot be read: {problem}; remove it, launching the sweep writes a new one") from None


def _compared(part: Frame) -> dict[str, Any]:
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
        known = part[part["peak_memory_bytes"].notna() & part["planned_bytes"].notna()]
        if len(known):
            compared |= {
                "planned_bytes": float(known["planned_bytes"].max()),
                "took_bytes": float(known["peak_memory_bytes"].max()),
                "memory_ratio": float((known["peak_memory_bytes"] / known["planned_bytes"]).astype(float).median()),
            }
    return compared
