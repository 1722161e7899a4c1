"""The axes on which training can be counted: FLOPs without AuxK, with it, as executed, as papers count, and time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pandas as pd

from analysis.runs.table import RunTable

AXES = {
    "flops_core": "training FLOPs without AuxK",
    "flops": "training FLOPs with a nominal AuxK",
    "flops_executed": "executed FLOPs",
    "flops_switch2024": "FLOPs as Mudide et al. count (4·n·d/E per token)",
    "flops_six_per_parameter": "6 FLOPs per parameter and token",
    "train_s": "wall-clock time",
}
"""Column → what it counts. The first is used for comparisons at equal FLOPs: a run whose latents are alive never
executes AuxK, and its nominal part is as large for a small SAE as for a large one."""


def add_axes(frame: pd.DataFrame, configs: Sequence[Any]) -> None:
    """Add the columns of `AXES` that a sweep's rows do not have yet; NaN where a run records too little."""
    count = [_counted(row, config) for (_, row), config in zip(frame.iterrows(), configs, strict=True)]
    for axis in ("flops_core", "flops_switch2024", "flops_six_per_parameter"):
        derived = pd.Series([entry.get(axis, np.nan) for entry in count], index=frame.index, dtype=float)
        given = pd.to_numeric(frame[axis], errors="coerce") if axis in frame else derived
        frame[axis] = given.fillna(derived)
    if "wall_s" in frame:
        together = pd.to_numeric(frame.get("trained_together", pd.Series(1.0, frame.index)), errors="coerce").fillna(
            1.0
        )
        frame["train_s"] = pd.to_numeric(frame["wall_s"], errors="coerce") / together


def _counted(row: pd.Series, config: Any) -> dict[str, float]:
    """FLOPs of a run that follow from its configuration; empty if that is not recorded."""
    from harness.budget import flops_per_token, params  # takes a tenth of a second: omegaconf
    from harness.config import SaeConfig

    try:
        known = {spec.name for spec in fields(SaeConfig)}
        sae = SaeConfig(**{key: value for key, value in config["sae"].items() if key in known})
        d_model, tokens, flops = int(row["d_model"]), float(row["tokens"]), float(row["flops"])
        auxk = flops_per_token(sae, d_model, int(config["train"]["batch_tokens"]))["auxk"]
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}
    return {
        "flops_core": flops - tokens * auxk,
        "flops_switch2024": tokens * 4.0 * sae.n_latents * d_model / sae.n_experts,
        "flops_six_per_parameter": tokens * 6.0 * params(sae, d_model),
    }


def on_axis(table: RunTable, axis: str) -> RunTable | None:
    """The table with `axis` as its FLOPs; None if a run does not have it."""
    if axis not in table.frame or not table.has("flops"):
        return None
    values = pd.to_numeric(table.frame[axis], errors="coerce").to_numpy(dtype=float)
    if not len(values) or not (np.isfinite(values) & (values > 0)).all():
        return None
    return table.but(frame=table.frame.assign(**{axis: values}), roles={**table.roles, "flops": axis})


def at_equal_flops(table: RunTable) -> RunTable:
    """The table with FLOPs without AuxK, if all its runs have them and its FLOPs are not a column of the user's."""
    if table.roles.get("flops") != "flops":
        return table
    return on_axis(table, "flops_core") or table


def axis_words(roles: Mapping[str, str]) -> str:
    """What the FLOPs of a table count, in words; a column of the user's is named."""
    column = roles.get("flops")
    return "training FLOPs" if column is None else AXES.get(column, f"training FLOPs ({column})")
