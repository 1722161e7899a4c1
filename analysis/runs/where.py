"""Conditions on the command line that choose runs: `sae=topk`, `k<=160`, `n!=256`."""

from __future__ import annotations

import operator
import re

import numpy as np
import pandas as pd

from analysis.runs.table import RunTable
from harness.errors import UserError

_COMPARE = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
_CONDITION = re.compile(r"\s*(.+?)\s*(<=|>=|!=|==|=|<|>)\s*(.*?)\s*")


def choose(table: RunTable, conditions: list[str]) -> RunTable:
    """The runs that satisfy all conditions, checked anew, so that notes count only them; the others are left out.

    A condition is a column, or the name of a role, then `=`, `!=`, `<`, `<=`, `>` or `>=`, then a value. A run whose
    value is missing satisfies none. Raises `UserError` for anything else.
    """
    for condition in conditions:
        table = _chosen(table, condition)
    return table


def _chosen(table: RunTable, condition: str) -> RunTable:
    match = _CONDITION.fullmatch(condition)
    if match is None or not match[3]:
        raise UserError(f"--where {condition!r} is not COLUMN=VALUE or a comparison such as 'k<=160'")
    name, sign, value = match.groups()
    before = [part for part in (table.frame, table.excluded) if len(part)]
    rows = pd.concat(before, ignore_index=True) if before else table.frame
    column = name if name in rows else table.roles.get(name, name)
    if column not in rows:
        columns = ", ".join(map(str, table.frame))
        raise UserError(f"{table.name}: no column {name!r} to choose by; it has: {columns}")
    inside = _satisfied(rows[column], sign, value, condition)
    reasons = rows["reason"] if "reason" in rows else pd.Series(np.nan, rows.index)
    rows = rows.drop(columns="reason", errors="ignore")
    # an unfinished run has no value; why it was left out says more
    outside = rows.assign(reason=reasons.where(reasons.notna() & rows[column].isna(), f"not {condition}"))[~inside]
    kept = RunTable(rows[inside], dict(table.roles), name=table.name)
    kept.directories, kept.histories, kept.nameless = table.directories, table.histories, table.nameless
    parts = [part for part in (kept.excluded, outside) if len(part)]
    kept.excluded = pd.concat(parts, ignore_index=True) if parts else kept.excluded
    return kept


def _satisfied(column: pd.Series, sign: str, text: str, condition: str) -> np.ndarray:
    """Whether each value satisfies the comparison with `text`; numbers are compared as numbers."""
    numbers = pd.to_numeric(column, errors="coerce").to_numpy(dtype=float)
    try:
        value = float(text)
    except ValueError:
        value = None
    if sign in _COMPARE:
        if value is None or np.isnan(value):
            raise UserError(f"--where {condition!r}: {text!r} is not a number")
        return _COMPARE[sign](numbers, value)
    equal = (column.astype(str) == text).to_numpy()
    if value is not None:
        equal = equal | (numbers == value)
    return equal if sign in ("=", "==") else ~equal & column.notna().to_numpy()
