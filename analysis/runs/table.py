"""`RunTable`: one row per run, roles for the columns, and a reason for every run that is left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

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
"""Columns in which the runs of one fit must agree; each population is fitted on its own."""


@dataclass
class RunTable:
    """Runs to be fitted: `frame` holds the usable runs, `excluded` the others with a `reason`.

    Args:
        frame: One row per run. Columns are used through `roles`; all others are kept.
        roles: Role → column, e.g. {"n": "n_latents", "loss": "fvu"}. Known roles: see `ROLES`.

    The constructor checks every value that a role needs and moves unusable rows to `excluded`. It raises `UserError`
    only for a wrong request: an unknown role, a role without its column, a column name that appears twice.
    """

    frame: pd.DataFrame
    roles: dict[str, str] = field(default_factory=lambda: dict(SWEEP_ROLES))
    notes: list[Note] = field(default_factory=list)
    name: str = "table"
    excluded: pd.DataFrame = field(init=False)
    nameless: bool = field(init=False, default=False)
    """Whether the rows were numbered because no column holds their names."""
    directories: dict[str, Path] = field(default_factory=dict)
    """run → its directory, if the table came from a sweep directory."""
    histories: dict[str, Callable[[], pd.DataFrame]] = field(default_factory=dict)
    """run → a function that reads all logged lines of that run; called only for curves."""

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
        """Whether a column has that role."""
        return role in self.roles

    def column(self, role: str) -> pd.Series:
        """The values of a role in the usable rows. Raises `UserError` if no column has that role."""
        if role not in self.roles:
            raise UserError(f"{self.name}: no column is named for {role!r}; name it with --{role} COLUMN")
        return self.frame[self.roles[role]]

    def values(self, role: str) -> np.ndarray:
        """`column(role)` as float64 (runs,)."""
        return self.column(role).to_numpy(dtype=float)

    def history(self, run: str) -> pd.DataFrame:
        """All logged lines of a run, read now; empty if there are none."""
        return self.histories[run]() if run in self.histories else pd.DataFrame()

    @property
    def spent(self) -> set[str]:
        """Columns that hold tokens or FLOPs, also under another role."""
        return {self.roles.get(role, SWEEP_ROLES[role]) for role in ("d", "flops")}

    def left_out(self) -> list[dict[str, str]]:
        """Every excluded run: run, reason."""
        names, reasons = (self.excluded[column].astype(str) for column in (self.roles["run"], "reason"))
        return [{"run": run, "reason": reason} for run, reason in zip(names, reasons, strict=True)]

    # -- choosing -----------------------------------------------------------------------------------------------------

    def where(self, reason: str = "", /, **conditions: Any) -> RunTable:
        """The runs whose columns equal the given values; the others are listed as excluded with `reason`."""
        keep = np.ones(len(self.frame), dtype=bool)
        for column, value in conditions.items():
            if column not in self.frame.columns:
                columns = ", ".join(map(str, self.frame))
                raise UserError(f"{self.name}: no column {column!r} to choose by; it has: {columns}")
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
        """A shallow copy with some attributes changed; values are not checked again."""
        out = object.__new__(RunTable)
        out.__dict__.update(self.__dict__)
        out.notes = list(self.notes)
        out.__dict__.update(changes)
        return out

    # -- checking -----------------------------------------------------------------------------------------------------

    def _reasons(self) -> pd.Series:
        """Why each row is unusable; "" for a usable one. Adds the notes about the data."""
        frame = self.frame
        reasons = pd.Series("", index=frame.index, dtype=object)

        def mark(mask: Any, text: Callable[[pd.DataFrame], Any] | str) -> np.ndarray:
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
                marked = mark(mask, _shown(column, wanted))
                if marked.any():
                    text = f"{int(marked.sum())} run(s) left out: {column} is not {wanted}"
                    self.notes.append(note(code, "warning", text))
            if all(self.roles.get(role) == SWEEP_ROLES[role] for role in ("loss", "status")):
                # a run of ours that was trained to its end, but blew up
                useless = mark(numbers >= 1, _shown(column, "below 1, so predicting the mean is as good"))
                if useless.any():
                    text = (
                        f"{int(useless.sum())} run(s) left out: {column} of at least 1 is worse than the mean predictor"
                    )
                    self.notes.append(note("worse_than_mean", "warning", text))
            frame[column] = numbers
        self._mark_repeats(reasons, mark)
        return reasons

    def _mark_repeats(self, reasons: pd.Series, mark: Callable[[Any, str], np.ndarray]) -> None:
        """Leave out a run that appeared before: by its name, or by all of its values if the runs have no names."""
        frame, named = self.frame, self.roles["run"] != "run" or not self.nameless
        names = frame[self.roles["run"]].astype(str)
        if named:
            again, why = names.duplicated(keep="first"), "the same run name appears above"
        else:
            again, why = _same_rows(frame.drop(columns="run")), "identical to a row above"
        marked = mark(again & (reasons == ""), why)
        if marked.any():
            text = f"{int(marked.sum())} row(s) repeat another, e.g. {names[marked].iloc[0]}: {why}"
            self.notes.append(note("duplicate_run", "warning", text))


def _shown(column: str, wanted: str) -> Callable[[pd.DataFrame], pd.Series]:
    """The reason for rows whose value in `column` is not `wanted`; it shows that value."""
    return lambda rows: f"{column} is " + rows[column].astype(object).map(lambda v: f"{v!r}"[:40]) + f", not {wanted}"


def _same_rows(frame: pd.DataFrame) -> pd.Series:
    """Whether each row equals an earlier one; lists and dicts are compared as text."""
    try:
        return frame.duplicated(keep="first")
    except TypeError:
        return frame.astype(str).duplicated(keep="first")


def _numbers(series: pd.Series) -> np.ndarray:
    """The values as float64 (rows,); NaN for anything but a number."""
    if series.dtype == bool:
        return np.full(len(series), np.nan)
    return pd.to_numeric(series, errors="coerce").to_numpy(dtype=float)


def _equals(series: pd.Series, value: Any) -> np.ndarray:
    """Elementwise equality; "8" from a command line equals 8 in a column."""
    if isinstance(value, str):
        try:
            return (_numbers(series) == float(value)) | (series.astype(str) == value).to_numpy()
        except ValueError:
            return (series.astype(str) == value).to_numpy()
    return (series == value).to_numpy()


def _details(frame: pd.DataFrame) -> pd.Series:
    """What the record says about unfinished and failed runs: the step of the divergence, the error."""
    text = pd.Series("", index=frame.index, dtype=object)
    if "diverged_at_step" in frame:
        diverged = frame["diverged_at_step"].notna()
        text[diverged] = frame.loc[diverged, "diverged_at_step"].astype(float).map(lambda step: f" at step {step:,.0f}")
    if "error" in frame:
        failed = frame["error"].notna() & (frame["error"].astype(str) != "")
        text[failed] = text[failed] + ": " + frame.loc[failed, "error"].astype(str).str.split("\n").str[0].str[:160]
    return text
