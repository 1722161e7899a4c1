"""Names of runs that repeat: the same run twice, checkpoints of one run, or no names at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

PROGRESS = (
    *("step", "steps", "globalstep", "trainstep", "trainingstep", "numsteps", "nsteps"),
    *("tokens", "ntokens", "numtokens", "tokensseen", "traintokens", "trainingtokens", "ntrainingtokens"),
    *("iteration", "iterations", "iter", "iters", "update", "updates", "epoch", "epochs"),
)
"""Columns that order the checkpoints of a run, the first that exists first; `_step`, `Step` and `trainer/global_step`
count too."""

SIZES = ("n", "k", "experts", "params")
"""Roles whose value belongs to a run and does not change while it is trained."""

_VALUES = (*SIZES, "d", "flops", "x", "seed", "loss")


@dataclass
class Repeats:
    """What the repeated names of a table mean."""

    same: pd.Series
    """Rows that equal an earlier row of the same run."""
    earlier: pd.Series
    """Rows that are earlier checkpoints of a run."""
    by: str
    """The column that orders the checkpoints; empty if there are none."""
    contradiction: str
    """Why the names cannot be those of runs; empty if they can."""


def repeats(frame: pd.DataFrame, names: pd.Series, roles: Mapping[str, str]) -> Repeats:
    """Tell repeated rows from checkpoints.

    Rows of one name are repeats if all their values that have a role are equal. Else they are checkpoints, if the run
    keeps its sizes and a column of `PROGRESS` has one largest value in it. Else the names contradict themselves.
    """
    columns = list(dict.fromkeys(roles[role] for role in _VALUES if role in roles))
    ordered = _progress(frame, roles)
    values = frame[[*columns, *(column for column in ordered if column not in columns)]]
    values = values.astype(object).map(str)
    same = values.assign(_name=names).duplicated(keep="first")
    rest, rest_names = frame[~same], names[~same]
    none = pd.Series(False, index=frame.index)
    again = rest_names[rest_names.duplicated(keep=False)]
    if again.empty:
        return Repeats(same, none, "", "")
    some = rest.loc[again.index]
    for column in dict.fromkeys(roles[role] for role in SIZES if role in roles):
        different = some[column].astype(object).map(str).groupby(again).unique()
        different = different[different.map(len) > 1]
        if len(different):
            shown = " and ".join(different.iloc[0][:2])
            return Repeats(same, none, "", f"{different.index[0]!r} appears with {column} {shown}")
    for column in ordered:
        progress = pd.to_numeric(some[column], errors="coerce")
        last = progress == progress.groupby(again).transform("max")
        if (last.groupby(again).sum() == 1).all():
            earlier = none.copy()
            earlier[again.index] = ~last
            return Repeats(same, earlier, column, "")
    first = again.iloc[0]
    return Repeats(same, none, "", f"{first!r} appears {int((again == first).sum())} times with different values")


def _progress(frame: pd.DataFrame, roles: Mapping[str, str]) -> list[str]:
    """The columns of `frame` that order checkpoints, in the order of `PROGRESS`, then the role of tokens."""
    plain = {column: str(column).replace("/", ".").rpartition(".")[2].lower() for column in frame.columns}
    plain = {column: word.replace("_", "").replace(" ", "") for column, word in plain.items()}
    found = [column for word in PROGRESS for column, other in plain.items() if word == other]
    return list(dict.fromkeys([*found, *([roles["d"]] if "d" in roles else [])]))


def progress_column(frame: pd.DataFrame, roles: Mapping[str, str]) -> str | None:
    """A column without a role that takes several values in one cell of a table without names of runs, or None."""
    unused = [column for column in _progress(frame, roles) if column not in roles.values()]
    cell = [roles[role] for role in (*SIZES, "seed") if role in roles]
    if not cell:
        return None
    return next((column for column in unused if frame.groupby(cell)[column].nunique().max() > 1), None)
