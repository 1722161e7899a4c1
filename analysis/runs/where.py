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
    if not conditions:
        return table
    before = [part for part in (table.frame, table.excluded) if len(part)]
    rows = pd.concat(before, ignore_index=True) if before else table.frame
    reasons = rows.pop("reason").fillna("") if "reason" in rows else pd.Series("", rows.index)
    inside = pd.Series(True, rows.index)
    for condition in conditions:
        column, satisfied = _satisfied(table, rows, condition)
        # an unfinished run has no value; why it was left out says more
        reasons = reasons.mask(inside & ~satisfied & ~(column.isna() & (reasons != "")), f"not {condition}")
        inside &= satisfied
    kept = _checked_anew(table, rows[inside])
    parts = [part for part in (kept.excluded, rows.assign(reason=reasons)[~inside]) if len(part)]
    kept.excluded = pd.concat(parts, ignore_index=True) if parts else kept.excluded
    return kept


def _checked_anew(table: RunTable, rows: pd.DataFrame) -> RunTable:
    """The table of these rows alone, with the notes about them."""
    if not table.nameless:
        kept = RunTable(rows, dict(table.roles), name=table.name)
    else:
        # rows without names are compared by their values, and keep the numbers that they have in their file
        roles = {role: column for role, column in table.roles.items() if role != "run"}
        kept = RunTable(rows.drop(columns="run"), roles, name=table.name)
        numbers = {f"row {i}": name for i, name in enumerate(rows["run"], start=1)}
        kept.frame["run"], kept.excluded["run"] = (part["run"].map(numbers) for part in (kept.frame, kept.excluded))
    kept.directories, kept.histories = table.directories, table.histories
    return kept


def _satisfied(table: RunTable, rows: pd.DataFrame, condition: str) -> tuple[pd.Series, pd.Series]:
    """The column that a condition names, and whether each row satisfies it; numbers are compared as numbers."""
    match = _CONDITION.fullmatch(condition)
    if match is None or not match[3]:
        raise UserError(f"--where {condition!r} is not COLUMN=VALUE or a comparison such as 'k<=160'")
    name, sign, text = match.groups()
    name = name if name in rows else table.roles.get(name, name)
    if name not in rows:
        columns = ", ".join(map(str, table.frame))
        raise UserError(f"{table.name}: no column {name!r} to choose by; it has: {columns}")
    column = rows[name]
    numbers = pd.to_numeric(column, errors="coerce").astype(float)
    try:
        value = float(text)
    except ValueError:
        value = np.nan
    if sign in _COMPARE:
        if np.isnan(value):
            raise UserError(f"--where {condition!r}: {text!r} is not a number")
        return column, _COMPARE[sign](numbers, value)
    equal = (column.astype(str) == text) | (numbers == value)
    return column, equal if sign in ("=", "==") else ~equal & column.notna()
