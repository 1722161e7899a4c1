"""Runs that equal another to the last digits under another name: copies of one measurement, not repeats."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from analysis.notes import note
from analysis.runs.cells import cell_numbers
from analysis.runs.table import RunTable

SAME = 1e-7
"""Relative difference of two losses up to which they are one: another order of sums, no other seed or data."""

MOST_RUNS = 30
"""Runs of a cell above which none is taken for a copy: so many losses that scatter by 1 % come this close by chance."""

_SETTINGS = ("n", "k", "experts", "d", "x", "lr")
_COLUMNS = ("sae", "model", "hook", "layer", "normalize", "store_id")


def without_identical(table: RunTable, inputs: Sequence[str]) -> RunTable:
    """The table with one of each set of identical repeats; the others are left out, and a note says so.

    Only values that are written to more digits than `SAME` are compared: two values of four digits agree by chance.
    """
    if len(table) < 2 or not {*inputs, "loss"} <= set(table.roles):
        return table
    frame, loss = table.frame, table.values("loss")
    columns = [table.roles[role] for role in (*inputs, *_SETTINGS) if table.has(role) and role not in table.guessed]
    columns = list(dict.fromkeys([*columns, *(name for name in _COLUMNS if name in frame)]))
    columns = [name for name in columns if name != table.roles["loss"]]
    order = np.lexsort([np.arange(len(table)), loss])
    cell = cell_numbers(frame[name] for name in columns)
    few = np.bincount(cell)[cell] <= MOST_RUNS
    gap = pd.Series(np.log(loss[order])).groupby(cell[order], sort=False).diff()
    written = np.abs(loss - np.round(loss, 6)) > 1e-12 * loss
    copies = order[(gap < SAME).to_numpy() & (written & few)[order]]
    if not len(copies):
        return table
    keep = np.ones(len(table), dtype=bool)
    keep[copies] = False
    out = table.keep(keep, "equal to another run of its cell to the last digits")
    name = str(table.column("run").iloc[int(copies[0])])
    text = f"{len(copies)} run(s) equal another of their cell to the last digits (e.g. {name}): one measurement each"
    out.notes.append(note("identical_repeats", "warning", text))
    return out
