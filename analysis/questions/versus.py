"""TopK against Switch, cell by cell: at equal n, and at equal FLOPs, where TopK is interpolated between its sizes."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from analysis.runs.table import RunTable


def equal_n_and_flops(table: RunTable) -> list[dict[str, Any]]:
    """One row per Switch cell (n, k, experts): its loss over that of TopK at the same n, and at the same FLOPs.

    Seeds are averaged (geometric mean). The loss of TopK at the FLOPs of Switch is interpolated log-log between the two
    nearest TopK sizes of the same k. It is not extrapolated: outside their range it is None.
    """
    frame = table.frame
    if "sae" not in frame or not {"topk", "switch"} <= set(frame["sae"]):
        return []
    n, k, loss, flops = (table.roles[role] for role in ("n", "k", "loss", "flops"))
    logs = frame.assign(log_loss=np.log(frame[loss]), log_flops=np.log(frame[flops]))
    dense = logs[logs["sae"] == "topk"].groupby([k, n])[["log_loss", "log_flops"]].mean()
    at_size = dict(dense.iterrows())
    rows = []
    switch = logs[logs["sae"] == "switch"].groupby([k, n, "n_experts"])[["log_loss", "log_flops"]].mean()
    for key, cell in switch.iterrows():
        k_value, n_value, experts = cast("tuple[float, float, float]", key)
        row: dict[str, Any] = {
            "k": k_value,
            "n": n_value,
            "experts": experts,
            "switch": float(np.exp(cell["log_loss"])),
        }
        row |= {"flops": float(np.exp(cell["log_flops"])), "topk_n": None, "ratio_n": None, "flops_saved": None}
        row |= {"topk_flops": None, "ratio_flops": None}
        same = at_size.get((k_value, n_value))
        if same is not None:
            row["topk_n"] = float(np.exp(same["log_loss"]))
            row["ratio_n"] = float(np.exp(cell["log_loss"] - same["log_loss"]))
            row["flops_saved"] = float(np.exp(same["log_flops"] - cell["log_flops"]))
        series = dense[dense.index.get_level_values(0) == k_value].sort_values("log_flops")
        x, y = series["log_flops"].to_numpy(), series["log_loss"].to_numpy()
        if len(x) > 1 and x[0] <= cell["log_flops"] <= x[-1]:
            at = float(np.interp(cell["log_flops"], x, y))
            row["topk_flops"] = float(np.exp(at))
            row["ratio_flops"] = float(np.exp(cell["log_loss"] - at))
        rows.append(row)
    return rows
