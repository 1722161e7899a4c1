"""`RunTable`: one row per run, roles for the columns, and a reason for every run that is left out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.notes import Note, note
from analysis.runs.read_table import plain_frame
from analysis.runs.repeats import progress_column, repeats
from analysis.runs.vocabulary import ended_well, truths
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

LARGEST = int(sys.float_info.max)

Unusable = tuple[Any, Callable[[pd.DataFrame], Any] | str, str, str]
"""Mask of rows, their reason, and the code and text of a note about them (no note without a code)."""


@dataclass
class RunTable:
    """Runs to be fitted: `frame` holds the usable runs, `excluded` the others with a `reason`.

    Args:
        frame: One row per run. Columns are used through `roles`; all others are kept.
        roles: Role → column, e.g. {"n": "n_latents", "loss": "fvu"}. Known roles: see `ROLES`.

    The constructor checks every value that a role needs and moves unusable rows to `excluded`. It raises `UserError`
    only for a wrong request: an unknown role, a role without its column, a column that appears twice with different
    values, a column for `run` whose repeated names are not those of checkpoints.
    """

    frame: pd.DataFrame
    roles: dict[str, str] = field(default_factory=lambda: dict(SWEEP_ROLES))
    notes: list[Note] = field(default_factory=list)
    name: str = "table"
    guessed: frozenset[str] = frozenset()
    """Roles that only the name of a column suggests. They exclude no row before something uses them (`use`)."""
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
        self.frame = plain_frame(self.frame)
        for role, column in self.roles.items():
            if column not in self.frame.columns:
                columns = ", ".join(map(str, self.frame.columns[:20])) or "none at all"
                raise UserError(f"{self.name}: no column {column!r} (for --{role}); it has: {columns}")
        self.frame = _each_column_once(self.frame, self.name)
        self.roles, self.notes = dict(self.roles), list(self.notes)
        self.excluded = self.frame[:0].assign(reason=pd.Series(dtype=object))
        if "run" in self.roles:
            column = self.roles["run"]
            names = self.frame[column].astype(object)
            self.frame[column] = names.map(str).where(names.notna(), [f"row {i + 1}" for i in self.frame.index])
        else:
            self._number_rows()
        self._understand_words()
        self._exclude_repeats()
        self._check_values(set(self.roles) - self.guessed)

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
        """`column(role)` as float64 (runs,); NaN for anything but a number."""
        return _numbers(self.column(role))

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

    def use(self, *roles: str) -> RunTable:
        """The table with these roles checked, also those that only the name of a column suggests."""
        fresh = self.guessed & set(roles)
        if not fresh:
            return self
        out = self.but(guessed=self.guessed - fresh)
        out._check_values(fresh)
        return out

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

    def _exclude(self, unusable: Iterable[Unusable]) -> None:
        """Move rows to `excluded`, each for the first reason that applies, and note what has a code."""
        frame = self.frame
        reasons = pd.Series("", index=frame.index, dtype=object)
        for rows, reason, code, message in unusable:
            rows = np.asarray(rows, dtype=bool) & (reasons == "").to_numpy()
            if rows.any():
                reasons[rows] = reason(frame[rows]) if callable(reason) else reason
                if code:
                    self.notes.append(note(code, "warning", f"{int(rows.sum())} {message}"))
        out = (reasons != "").to_numpy()
        if out.any():
            parts = [self.excluded, frame[out].assign(reason=reasons[out])]
            self.excluded = pd.concat([part for part in parts if len(part)])
            self.frame = frame[~out]

    def _check_values(self, roles: Iterable[str]) -> None:
        """Leave out rows in which the value of a role is unusable; the columns become float64."""
        for role in sorted(set(roles) & {*POSITIVE_ROLES, "loss"}, key=ROLES.index):
            column = self.roles[role]
            numbers = _numbers(self.frame[column])
            checks = [("", ~np.isfinite(numbers) | (numbers <= 0), "a positive number")]
            if role == "loss":
                checks = [("nonfinite_loss", ~np.isfinite(numbers), "a finite number")]
                checks.append(("nonpositive_loss", numbers <= 0, "positive"))
                if all(self.roles.get(name) == SWEEP_ROLES[name] for name in ("loss", "status")):
                    # a run of ours that was trained to its end, but blew up
                    checks.append(("worse_than_mean", numbers >= 1, "below 1, so predicting the mean is as good"))
            left = f"run(s) left out: {column} is not"
            shown = self.frame[column].astype(object)
            self.frame = self.frame.assign(**{column: numbers})
            self._exclude((rows, _shown(shown, wanted), code, f"{left} {wanted}") for code, rows, wanted in checks)
        self.frame, self.excluded = (part.reset_index(drop=True) for part in (self.frame, self.excluded))

    def _understand_words(self) -> None:
        """Leave out the runs that were not trained to their end; `converged` becomes True, False or None."""
        if "converged" in self.roles:
            column = self.roles["converged"]
            self.frame[column], unknown = truths(self.frame[column])
            self._note_words(column, unknown, "they count as missing")
        if "status" in self.roles:
            column = self.roles["status"]
            done, unknown = ended_well(self.frame[column])
            self._note_words(column, unknown, "they count as not done")
            self._exclude([(~done, lambda rows: "status " + rows[column].map(str) + _details(rows), "", "")])

    def _note_words(self, column: str, unknown: list[str], how: str) -> None:
        if unknown:
            shown = ", ".join(repr(word[:40]) for word in unknown[:5])
            self.notes.append(
                note("unknown_words", "warning", f"{column} has words that are not known: {shown}; {how}")
            )

    def _number_rows(self) -> None:
        """Give the rows numbers for names, in a column of their own."""
        self.nameless = True
        column = next(name for name in ("run", "row", "number of the row") if name not in self.frame)
        for part in (self.frame, self.excluded):
            part[column] = [f"row {i + 1}" for i in part.index]
        self.roles["run"] = column

    def _exclude_repeats(self) -> None:
        """Leave out repeated rows and earlier checkpoints of a run."""
        if not self.nameless:
            column = self.roles["run"]
            names = self.frame[column]
            if not names.duplicated().any():
                return
            found = repeats(self.frame, names, self.roles)
            if not found.contradiction:
                last = f"an earlier checkpoint of the same run (by {found.by})"
                why = f"row(s) are earlier checkpoints of their run; the last of each by {found.by} was used"
                same = _repeat(found.same, "the same run name appears above", names)
                self._exclude([same, (found.earlier, last, "earlier_checkpoints", why)])
                return
            if "run" not in self.guessed:
                hint = "add a column step, tokens or iteration that orders its checkpoints, or name another with --run"
                raise UserError(f"{self.name}: the run {found.contradiction}; {hint}")
            text = f"the column {column!r} does not name the runs ({found.contradiction}); every row counts as a run"
            self.notes.append(note("unused_column", "info", text))
            self._number_rows()
        own = self.roles["run"]
        self._exclude([_repeat(_same_rows(self.frame.drop(columns=own)), "identical to a row above", self.frame[own])])
        progress = progress_column(self.frame, self.roles)
        if progress is not None:
            text = f"every row counts as a run of its own, but {progress!r} takes several values in one cell"
            self.notes.append(note("checkpoints", "warning", text))


def _repeat(rows: pd.Series, why: str, names: pd.Series) -> Unusable:
    example = names[rows].iloc[0] if rows.any() else ""
    return rows, why, "duplicate_run", f"row(s) repeat another, e.g. {example}: {why}"


def _each_column_once(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    """The frame with one of each columns of equal names. Raises `UserError` if their values differ."""
    repeated = frame.columns.duplicated()
    for column in frame.columns[repeated].unique():
        first, *others = (values.astype(str) for _, values in frame.loc[:, frame.columns == column].items())
        if not all(first.equals(other) for other in others):
            raise UserError(f"{name}: the column {column!r} appears twice with different values; rename or remove one")
    return frame.loc[:, ~repeated]


def _shown(values: pd.Series, wanted: str) -> Callable[[pd.DataFrame], pd.Series]:
    """The reason for rows whose value is not `wanted`; it shows that value."""
    return lambda rows: f"{values.name} is " + values[rows.index].map(_brief) + f", not {wanted}"


def _brief(value: Any) -> str:
    try:
        return repr(value)[:40]
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return "a huge integer"


def _same_rows(frame: pd.DataFrame) -> pd.Series:
    """Whether each row equals an earlier one; lists and dicts are compared as text."""
    try:
        return frame.duplicated(keep="first")
    except TypeError:
        return frame.astype(str).duplicated(keep="first")


def _numbers(series: pd.Series) -> np.ndarray:
    """The values as float64 (rows,); NaN for anything but a real number, e.g. for a truth value or a date."""
    if pd.api.types.is_numeric_dtype(series) and not pd.api.types.is_bool_dtype(series):
        numbers = series.to_numpy(dtype=complex if series.dtype.kind == "c" else float, na_value=np.nan)
        return np.where(np.imag(numbers) == 0, np.real(numbers), np.nan) if series.dtype.kind == "c" else numbers
    if not (series.dtype == object or isinstance(series.dtype, pd.StringDtype | pd.CategoricalDtype)):
        return np.full(len(series), np.nan)
    values = series.astype(object)
    values = values.where(~values.map(lambda value: isinstance(value, bool | np.bool_ | complex)), None)
    values = values.map(lambda value: np.inf if isinstance(value, int) and abs(value) > LARGEST else value)
    return pd.to_numeric(values, errors="coerce").to_numpy(dtype=float)


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
        step = pd.Series(_numbers(frame["diverged_at_step"]), frame.index)
        diverged = step.notna()
        text[diverged] = step[diverged].map(lambda step: f" at step {step:,.0f}")
    if "error" in frame:
        failed = frame["error"].notna() & (frame["error"].astype(str) != "")
        text[failed] = text[failed] + ": " + frame.loc[failed, "error"].astype(str).str.split("\n").str[0].str[:400]
    return text
