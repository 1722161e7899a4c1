"""`RunTable`: runs as rows, with roles for the columns and a reason for every run that is left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from analysis.frames import Frame, Series, pd
from analysis.notes import Note, note
from harness.errors import UserError

SWEEP_ROLES = {
    "n": "n_latents",
    "k": "k",
    "experts": "n_experts",
    "d": "tokens",
    "loss": "fvu",
    "loss_se": "fvu_se",
    "flops": "flops",
    "seed": "seed",
    "run": "run_id",
    "status": "status",
    "converged": "converged",
    "dead": "dead_frac",
    "l0": "l0",
    "params": "params",
    "lr": "lr",
}
"""Roles of the columns of a sweep directory (the keys of `result.json`)."""

POSITIVE_ROLES = ("n", "k", "experts", "d", "flops", "x")
"""Roles whose logarithm the laws take."""

ROLES = (*SWEEP_ROLES, "x")

POPULATION = ("sae", "n_experts", "d_model", "model", "hook", "layer", "store_id", "normalize")
"""Columns in which runs of one law must agree; other laws or other populations are fitted apart."""


@dataclass
class RunTable:
    """Runs to be fitted: `frame` holds the usable ones, `excluded` the others with a `reason`.

    Args:
        frame: One row a run. Columns are used through `roles`; others are carried along.
        roles: Role → column, e.g. {"n": "n_latents", "loss": "fvu"}. Known roles: see `ROLES`.
        units: Column → unit, for axes and reports, e.g. {"flops": "FLOP"}.

    Construction checks every value that a role needs and moves the rows that cannot be used to `excluded`: it raises
    `UserError` only for a request that makes no sense (a role without its column, a column without any number).
    """

    frame: Frame
    roles: dict[str, str] = field(default_factory=lambda: dict(SWEEP_ROLES))
    units: dict[str, str] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    name: str = "table"
    excluded: Frame = field(init=False)
    nameless: bool = field(init=False, default=False)
    """Whether rows were given numbers for want of a column with their names."""
    directories: dict[str, Path] = field(default_factory=dict)
    """run → its directory, when the table came from a sweep directory."""
    histories: dict[str, Callable[[], Frame]] = field(default_factory=dict)
    """run → a function that reads all logged lines of that run; called only when curves are asked for."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.roles) - set(ROLES))
        if unknown:
            raise UserError(f"unknown role {unknown[0]!r}; known are: {', '.join(ROLES)}")
        frame = self.frame.copy().reset_index(drop=True)
        for role, column in self.roles.items():
            if column not in frame.columns:
                columns = ", ".join(map(str, frame.columns[:20])) or "none at all"
                raise UserError(f"{self.name}: no column {column!r} (for --{role}); it has: {columns}")
        if frame.columns.duplicated().any():
            twice = sorted({str(c) for c in frame.columns[frame.columns.duplicated()]})
            raise UserError(f"{self.name}: the column {twice[0]!r} appears twice; rename one")
        self.nameless = "run" not in self.roles
        if self.nameless:
            frame["run"] = [f"row {i + 1}" for i in range(len(frame))]
            self.roles = {**self.roles, "run": "run"}
        self.frame = frame
        self.notes = list(self.notes)
        reasons = self._reasons()
        self.excluded = frame[reasons != ""].assign(reason=reasons[reasons != ""]).reset_index(drop=True)
        self.frame = frame[reasons == ""].reset_index(drop=True)
        for role in (*POSITIVE_ROLES, "loss"):
            if role in self.roles:
                self.frame[self.roles[role]] = self.frame[self.roles[role]].astype(float)

    # -- reading ------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.frame)

    def has(self, role: str) -> bool:
        return role in self.roles

    def column(self, role: str) -> Series:
        """The usable rows' values of a role; `UserError` names the missing role."""
        if role not in self.roles:
            raise UserError(f"{self.name}: no column is named for {role!r}; name it with --{role} COLUMN")
        return self.frame[self.roles[role]]

    def values(self, role: str) -> np.ndarray:
        """`column(role)` as float64 (runs,)."""
        return self.column(role).to_numpy(dtype=float)

    def label(self, role: str) -> str:
        """Column name of a role with its unit, for axes."""
        column = self.roles[role]
        return f"{column} [{self.units[column]}]" if column in self.units else column

    def history(self, run: str) -> Frame:
        """All logged lines of a run, read now; empty where there are none."""
        return self.histories[run]() if run in self.histories else pd.DataFrame()

    @property
    def spent(self) -> set[str]:
        """Columns that hold tokens or FLOPs, whatever role they have been given."""
        return {self.roles.get(role, SWEEP_ROLES[role]) for role in ("d", "flops")}

    def left_out(self) -> list[dict[str, str]]:
        """Every run that is not used: run, reason."""
        names, reasons = (self.excluded[column].astype(str) for column in (self.roles["run"], "reason"))
        return [{"run": run, "reason": reason} for run, reason in zip(names, reasons, strict=True)]

    # -- choosing -----------------------------------------------------------------------------------------------------

    def where(self, reason: str = "", /, **conditions: Any) -> RunTable:
        """The runs whose columns equal the given values; the others are listed as excluded with `reason`."""
        keep = np.ones(len(self.frame), dtype=bool)
        for column, value in conditions.items():
            if column not in self.frame.columns:
                raise UserError(f"{self.name}: no column {column!r} to choose by; it has: {', '.join(self.frame)}")
            keep &= _equals(self.frame[column], value)
        chosen = ", ".join(f"{c}={v}" for c, v in conditions.items())
        return self.keep(keep, reason or f"not {chosen}")

    def keep(self, mask: np.ndarray, reason: str) -> RunTable:
        """The runs where `mask` holds; the others are listed as excluded with `reason`."""
        out = self.but()
        dropped = self.frame[~mask].assign(reason=reason)
        parts = [part for part in (self.excluded, dropped) if len(part)]
        out.frame = self.frame[mask].reset_index(drop=True)
        out.excluded = pd.concat(parts, ignore_index=True) if parts else self.excluded.copy()
        return out

    def but(self, **changes: Any) -> RunTable:
        """A shallow copy, already checked, with other attributes."""
        out = object.__new__(RunTable)
        out.__dict__.update(self.__dict__)
        out.notes = list(self.notes)
        out.__dict__.update(changes)
        return out

    # -- checking -----------------------------------------------------------------------------------------------------

    def check(self, law: str) -> list[Note]:
        """Design report: what about these runs stands in the way of that law (notes, most severe first)."""
        from analysis.design import check_table
        from analysis.laws import get

        return check_table(self, get(law))

    def _reasons(self) -> Series:
        """Why each row cannot be used; "" where it can. Adds the notes about the data."""
        frame = self.frame
        reasons = pd.Series("", index=frame.index, dtype=object)

        def mark(mask: Any, text: Callable[[Frame], Any] | str) -> np.ndarray:
            free = np.asarray(mask, dtype=bool) & (reasons == "").to_numpy()
            if free.any():
                reasons[free] = text(frame[free]) if callable(text) else text
            return free

        if "status" in self.roles:
            column = self.roles["status"]
            mark(
                frame[column].astype(object) != "done",
                lambda rows: "status " + rows[column].astype(object).astype(str) + _details(rows),
            )
        for role in POSITIVE_ROLES:
            if role in self.roles:
                column = self.roles[role]
                numbers = _numbers(frame[column])
                mark(~np.isfinite(numbers) | (numbers <= 0), _shown(column, "a positive number"))
                frame[column] = numbers
        if "loss" in self.roles:
            column = self.roles["loss"]
            numbers = _numbers(frame[column])
            for code, mask, wanted in (
                ("nonfinite_loss", ~np.isfinite(numbers), "a finite number"),
                ("nonpositive_loss", numbers <= 0, "positive"),
            ):
                found = mark(mask, _shown(column, wanted))
                if found.any():
                    text = f"{int(found.sum())} run(s) left out: {column} is not {wanted}"
                    self.notes.append(note(code, "warning", text))
            frame[column] = numbers
        self._mark_repeats(reasons, mark)
        return reasons

    def _mark_repeats(self, reasons: Series, mark: Callable[[Any, str], np.ndarray]) -> None:
        """Leave out a run that was already seen: by its name, or, without names, by all of its values."""
        frame, named = self.frame, self.roles["run"] != "run" or not self.nameless
        names = frame[self.roles["run"]].astype(str)
        if named:
            again, why = names.duplicated(keep="first"), "the same run name appears above"
        else:
            again, why = _same_rows(frame.drop(columns="run")), "identical to a row above"
        found = mark(again & (reasons == ""), why)
        if found.any():
            text = f"{int(found.sum())} row(s) repeat another, e.g. {names[found].iloc[0]}: {why}"
            self.notes.append(note("duplicate_run", "warning", text))


def _shown(column: str, wanted: str) -> Callable[[Frame], Series]:
    """Reason for rows whose value in `column` is not what is wanted, with that value."""
    return lambda rows: f"{column} is " + rows[column].astype(object).map(lambda v: f"{v!r}"[:40]) + f", not {wanted}"


def _same_rows(frame: Frame) -> Series:
    """Rows equal to an earlier one; columns that hold lists or dicts are compared by their text."""
    try:
        return frame.duplicated(keep="first")
    except TypeError:
        return frame.astype(str).duplicated(keep="first")


def _numbers(series: Series) -> np.ndarray:
    """Float64 values; what is no number becomes NaN."""
    if series.dtype == bool:
        return np.full(len(series), np.nan)
    return pd.to_numeric(series, errors="coerce").to_numpy(dtype=float)


def _equals(series: Series, value: Any) -> np.ndarray:
    """Elementwise equality that lets "8" on a command line match 8 in a column."""
    if isinstance(value, str):
        try:
            return (_numbers(series) == float(value)) | (series.astype(str) == value).to_numpy()
        except ValueError:
            return (series.astype(str) == value).to_numpy()
    return (series == value).to_numpy()


def _details(frame: Frame) -> Series:
    """What the record says about a run that is not done: the step of the divergence or the error."""
    text = pd.Series("", index=frame.index, dtype=object)
    if "diverged_at_step" in frame:
        known = frame["diverged_at_step"].notna()
        text[known] = frame.loc[known, "diverged_at_step"].map(lambda step: f" at step {int(step):,}")
    if "error" in frame:
        known = frame["error"].notna() & (frame["error"].astype(str) != "")
        text[known] = text[known] + ": " + frame.loc[known, "error"].astype(str).str.split("\n").str[0].str[:160]
    return text
