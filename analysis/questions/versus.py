"""TopK against Switch, cell by cell: at equal n, and at equal FLOPs, where TopK is interpolated between its sizes."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import pandas as pd

from analysis.questions.paired import PairedErrors, contrast
from analysis.runs.table import RunTable


def equal_n_and_flops(table: RunTable, errors: PairedErrors | None = None) -> list[dict[str, Any]]:
    """One row per Switch cell (n, k, experts): its loss over that of TopK at the same n, and at the same FLOPs.

    Seeds are averaged (geometric mean). The loss of TopK at the FLOPs of Switch is interpolated log-log between TopK
    sizes of the same k, two on either side where there are two. It is not extrapolated: outside them it is None.

    Args:
        errors: Paired errors of the table; then `ends_n` and `ends_flops` are the 95 % intervals of the ratios.

    `weights_n` and `weights_flops` say which runs make the ratio: ln ratio = Σ weight·ln(loss).
    """
    frame = table.frame
    if "sae" not in frame or not {"topk", "switch"} <= set(frame["sae"]):
        return []
    n, k, loss, flops, run = (table.roles[role] for role in ("n", "k", "loss", "flops", "run"))
    logs = frame.assign(log_loss=np.log(frame[loss]), log_flops=np.log(frame[flops]), run=frame[run].astype(str))
    dense = {key: _Cell(part) for key, part in logs[logs["sae"] == "topk"].groupby([k, n])}
    rows = []
    for key, part in logs[logs["sae"] == "switch"].groupby([k, n, "n_experts"]):
        k_value, n_value, experts = cast("tuple[float, float, float]", key)
        cell = _Cell(part)
        row: dict[str, Any] = {"k": k_value, "n": n_value, "experts": experts, "switch": math.exp(cell.log_loss)}
        row |= {"flops": math.exp(cell.log_flops), "flops_saved": None}
        same = dense.get((k_value, n_value))
        if same is not None:
            row["flops_saved"] = math.exp(same.log_flops - cell.log_flops)
        row |= _against(cell, [] if same is None else [(1.0, same)], "n", errors)
        series = sorted((other for (level, _), other in dense.items() if level == k_value), key=lambda c: c.log_flops)
        row |= _against(cell, _around(series, cell.log_flops), "flops", errors)
        rows.append(row)
    return rows


class _Cell:
    """The repeats of one cell: mean logarithms, and the names of the runs."""

    def __init__(self, part: pd.DataFrame) -> None:
        self.log_loss, self.log_flops = float(part["log_loss"].mean()), float(part["log_flops"].mean())
        self.runs = list(part["run"])


def _around(series: list[_Cell], log_flops: float) -> list[tuple[float, _Cell]]:
    """The weights with which the cells of `series`, by rising FLOPs, interpolate at `log_flops`; empty outside.

    The polynomial (in logs) goes through the two nearest cells and the next one on either side, unless that is so near
    that noise would decide the curvature. A straight line would lie above a curve that levels off, by about the width
    of a paired interval, and so favour Switch.
    """
    at = [cell.log_flops for cell in series]
    for i in range(len(series) - 1):
        if at[i] < at[i + 1] and at[i] <= log_flops <= at[i + 1]:
            least = (at[i + 1] - at[i]) / 2
            near = [i, i + 1]
            near += [i - 1] if i > 0 and at[i] - at[i - 1] >= least else []
            near += [i + 2] if i + 2 < len(at) and at[i + 2] - at[i + 1] >= least else []
            weights = [math.prod((log_flops - at[m]) / (at[j] - at[m]) for m in near if m != j) for j in near]
            return [(weight, series[j]) for weight, j in zip(weights, near, strict=True)]
    return []


def _against(cell: _Cell, others: list[tuple[float, _Cell]], name: str, errors: PairedErrors | None) -> dict[str, Any]:
    """The ratio of a cell's loss to a weighted mean of other cells; all values are None without others."""
    row: dict[str, Any] = dict.fromkeys((f"topk_{name}", f"ratio_{name}", f"weights_{name}", f"ends_{name}"))
    if others:
        at = sum(weight * other.log_loss for weight, other in others)
        weights = contrast(cell.runs, [])
        for weight, other in others:
            for run in other.runs:
                weights[run] = weights.get(run, 0.0) - weight / len(other.runs)
        ends = errors.interval(weights, cell.log_loss - at) if errors is not None else None
        row |= {f"topk_{name}": math.exp(at), f"ratio_{name}": math.exp(cell.log_loss - at), f"weights_{name}": weights}
        row[f"ends_{name}"] = None if ends is None else (math.exp(ends[0]), math.exp(ends[1]))
    return row


def mean_ratio(
    rows: list[dict[str, Any]], name: str, errors: PairedErrors | None = None
) -> tuple[float, tuple[float, float] | None] | None:
    """Geometric mean of `ratio_<name>` over the rows that have it, with its interval; None if no row has it."""
    chosen = [row for row in rows if row.get(f"ratio_{name}") is not None]
    if not chosen:
        return None
    value = float(np.mean([math.log(row[f"ratio_{name}"]) for row in chosen]))
    weights: dict[str, float] = {}
    for row in chosen:
        for run, weight in (row.get(f"weights_{name}") or {}).items():
            weights[run] = weights.get(run, 0.0) + weight / len(chosen)
    ends = errors.interval(weights, value) if errors is not None and weights else None
    return math.exp(value), None if ends is None else (math.exp(ends[0]), math.exp(ends[1]))
