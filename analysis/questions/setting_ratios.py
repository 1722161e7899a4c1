"""What one setting does to the loss: every value of it against a base value, at equal architecture, n and k."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from analysis.format import Interval
from analysis.questions.paired import mean_difference, paired_errors, pooled_sd
from analysis.runs.table import RunTable
from harness.errors import UserError


@dataclass(frozen=True)
class SettingRatio:
    """The loss of the runs with one value of a setting over that of the runs with the base value."""

    cell: str
    """What both have in common, e.g. `switch, n=2048, k=16`."""
    setting: str
    """What sets them apart from the base, e.g. `sae.routing=hash`."""
    ratio: float
    """Of geometric means over repeats."""
    interval: Interval
    """95 %, over held-out documents and repeats."""
    runs: int
    loss: float
    """Geometric mean over repeats, as `base`."""
    base: float


def setting_ratios(table: RunTable, base: Mapping[str, str]) -> list[SettingRatio]:
    """One entry per cell and combination of values other than the base.

    Args:
        base: Column → its base value as text. Runs that differ in other settings than these, architecture, n, k and
            seed are one group, so choose runs first.

    Raises `UserError` for a column that the runs do not have, and if no cell has both the base and another value.
    """
    frame = table.frame
    for column in base:
        if column not in frame:
            raise UserError(f"{table.name}: no column {column!r}; write --by COLUMN=VALUE, e.g. sae.routing=learned")
    loss, run = table.roles["loss"], table.roles["run"]
    shared = [
        name for name in ("sae", "n_experts", table.roles.get("n", ""), table.roles.get("k", "")) if name in frame
    ]
    shared = [name for name in shared if name not in base]
    values = frame[list(base)].map(_text)
    label = values.apply(lambda row: ", ".join(f"{k}={row[k]}" for k in base if row[k] != base[k]), axis=1)
    cell = frame[shared].map(_text).apply(lambda row: ", ".join(f"{k}={row[k]}" for k in shared), axis=1)
    frame = frame.assign(_label=label, _cell=cell, _log=np.log(frame[loss].astype(float)))
    errors = paired_errors(table)
    if errors is not None:
        sd, dof = pooled_sd(frame["_log"], [frame["_cell"], frame["_label"]])
        errors = replace(errors, repeat_sd=sd, repeat_dof=dof)
    found = []
    for name, part in frame.groupby("_cell"):
        first = part[part["_label"] == ""]
        for text, other in part[part["_label"] != ""].groupby("_label"):
            if not len(first):
                continue
            apart, ends = mean_difference(errors, other.set_index(run)["_log"], first.set_index(run)["_log"])
            interval = (None, None) if ends is None else (math.exp(ends[0]), math.exp(ends[1]))
            means = math.exp(float(other["_log"].mean())), math.exp(float(first["_log"].mean()))
            found.append(SettingRatio(str(name), str(text), math.exp(apart), interval, len(other), *means))
    if not found:
        stated = ", ".join(f"{column}={value}" for column, value in base.items())
        raise UserError(f"{table.name}: no architecture, n and k has runs with {stated} and others")
    return found


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
